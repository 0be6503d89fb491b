"""Prepared folders: made once, whole or not there, with errors that say what to do."""

from __future__ import annotations

import errno
import multiprocessing
import os
import time
from pathlib import Path

import pytest

from shardwise.data import cache
from shardwise.errors import DataError


def write_hello(made: Path) -> None:
    (made / "hello.txt").write_text("hello")


def forbid(made: Path) -> None:
    raise AssertionError("the folder was made a second time")


def test_a_folder_is_made_once_and_then_only_opened(tmp_path: Path) -> None:
    made = cache.folder(tmp_path, "kind", "key", write_hello)
    assert (made / "hello.txt").read_text() == "hello"
    assert cache.folder(tmp_path, "kind", "key", forbid) == made


def test_the_root_follows_the_xdg_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache.cache_root() == Path("/somewhere/shardwise")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert cache.cache_root() == Path("/home/me/.cache/shardwise")


@pytest.mark.parametrize("harm", ["truncate", "delete", "no sizes"])
def test_a_damaged_folder_is_made_again(tmp_path: Path, harm: str) -> None:
    made = cache.folder(tmp_path, "kind", "key", write_hello)
    if harm == "truncate":
        (made / "hello.txt").write_text("hel")
    elif harm == "delete":
        (made / "hello.txt").unlink()
    else:
        (made / "sizes.json").unlink()
    assert not cache.is_whole(made)
    assert (cache.folder(tmp_path, "kind", "key", write_hello) / "hello.txt").read_text() == "hello"


def test_a_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    def fail(made: Path) -> None:
        write_hello(made)
        raise DataError("the text is bad")

    with pytest.raises(DataError, match="the text is bad"):
        cache.folder(tmp_path, "kind", "key", fail)
    assert [path.name for path in (tmp_path / "kind").iterdir()] == [".key.lock"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_explained_and_leaves_nothing_behind(tmp_path: Path, code: int) -> None:
    def fail(made: Path) -> None:
        write_hello(made)
        raise OSError(code, os.strerror(code), str(made / "train.bin"))

    with pytest.raises(DataError, match=r"full: writing .*train\.bin.*XDG_CACHE_HOME"):
        cache.folder(tmp_path, "kind", "key", fail)
    assert [path.name for path in (tmp_path / "kind").iterdir()] == [".key.lock"]


def test_a_cache_that_cannot_be_written_is_explained(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file where the cache should be")
    with pytest.raises(DataError, match=r"cache cannot be used: .*taken.*XDG_CACHE_HOME"):
        cache.folder(tmp_path / "taken", "kind", "key", write_hello)


def _slow(root: Path, log: Path) -> None:
    def make(made: Path) -> None:
        with open(log, "a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(0.2)
        write_hello(made)

    assert (cache.folder(root, "kind", "key", make) / "hello.txt").read_text() == "hello"


def test_of_several_processes_one_makes_and_the_others_wait(tmp_path: Path) -> None:
    log = tmp_path / "log"
    forks = multiprocessing.get_context("fork")
    processes = [forks.Process(target=_slow, args=(tmp_path, log)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0] * 4
    assert len(log.read_text().split()) == 1


def _die_half_way(root: Path) -> None:
    def make(made: Path) -> None:
        write_hello(made)
        os._exit(9)

    cache.folder(root, "kind", "key", make)


def test_what_a_killed_process_left_is_swept_and_never_used(tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=_die_half_way, args=(tmp_path,))
    process.start()
    process.join(30)
    assert process.exitcode == 9
    left = [path for path in (tmp_path / "kind").iterdir() if path.is_dir()]
    assert len(left) == 1
    assert not (tmp_path / "kind" / "key").exists()
    cache.folder(tmp_path, "kind", "key", write_hello)
    assert [path.name for path in (tmp_path / "kind").iterdir() if path.is_dir()] == ["key"]


def test_keys_follow_every_setting() -> None:
    assert cache.key_of("text", 1, {"b": 2, "a": 1}) == cache.key_of("text", 1, {"a": 1, "b": 2})
    assert cache.key_of("text", 1, None) != cache.key_of("text", 1, 0)
