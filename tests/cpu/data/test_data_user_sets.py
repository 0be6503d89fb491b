"""Data sets of the user: seeds by sample, workers, iterables, Hugging Face, and failures that name the sample."""

from __future__ import annotations

import itertools
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, IterableDataset

from shardwise.data.ahead import BURST_BYTES
from shardwise.data.datasets import dataset
from shardwise.data.loader import PAGE, Batches, LocalStep, Micro, _nbytes, eval_batches, open_batches
from shardwise.data.samples import Prepared
from shardwise.errors import DataError

NOWHERE = Path("/nonexistent")


class Augmented(Dataset[Any]):
    """Each sample is its index and one draw from each generator."""

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> Any:
        return index, torch.tensor([random.random(), float(np.random.rand()), float(torch.rand(()))])


def prepared(*args: Any, **kwargs: Any) -> Prepared:
    return dataset(*args, **kwargs).prepare(NOWHERE, seed=0)


def opened(data: Any, **how: Any) -> Batches:
    how = {"global_batch": 6, "seed": 3, "rank": 0, "ranks": 1, "steps": 8, **how}
    return open_batches(data, **how)


def drawn(ranks: int, **how: Any) -> dict[tuple[int, int], list[float]]:
    """(step, sample) -> what its augmentation drew, over all ranks."""
    found = {}
    for rank in range(ranks):
        with opened(prepared(Augmented()).train, rank=rank, ranks=ranks, **how) as batches:
            for local in batches:
                for micro in local.micro:
                    for sample, index, numbers in zip(micro.samples, *micro.batch, strict=True):
                        assert sample == int(index)
                        found[local.step, sample] = numbers.tolist()
    return found


def test_augmentation_depends_on_seed_and_position_only() -> None:
    alone = drawn(1)
    assert drawn(1, workers=2) == alone
    assert drawn(2) == alone
    assert drawn(3, workers=1) == alone
    assert drawn(1, logical_shards=4, workers=2) == alone
    assert drawn(1, start_step=5) == {key: value for key, value in alone.items() if key[0] >= 5}
    assert drawn(1, seed=4) != alone
    draws = [number for numbers in alone.values() for number in numbers]
    assert len(set(draws)) == len(draws)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_process_keeps_its_own_random_generators(workers: int) -> None:
    def states() -> tuple[Any, ...]:
        legacy: Any = np.random.get_state()
        return random.getstate(), legacy[1].tolist(), legacy[2], torch.get_rng_state().tolist()

    before = states()
    with opened(prepared(Augmented(), Augmented()).train, workers=workers, steps=3) as batches:
        for _ in batches:
            pass
    list(eval_batches(prepared(Augmented()).train, batch=6, rank=0, ranks=1, workers=workers))
    assert states() == before


def test_evaluation_draws_the_same_each_time_and_on_any_number_of_ranks() -> None:
    def numbers(ranks: int, workers: int = 0) -> list[Any]:
        samples = prepared(Augmented()).train
        parts = [eval_batches(samples, batch=4, rank=rank, ranks=ranks, workers=workers) for rank in range(ranks)]
        rounds = itertools.zip_longest(*parts)
        return torch.cat([one[1] for each in rounds for one in each if one is not None]).tolist()

    assert numbers(1) == numbers(1) == numbers(3) == numbers(2, workers=1)


def test_code_of_the_user_runs_in_the_callers_thread_without_workers() -> None:
    class Where(Augmented):
        def __getitem__(self, index: int) -> Any:
            return threading.current_thread() is threading.main_thread()

    with opened(prepared(Where()).train, steps=3) as batches:
        assert all(bool(micro.batch.all()) for local in batches for micro in local.micro)


class Failing(Augmented):
    def __getitem__(self, index: int) -> Any:
        if index == 13:
            raise KeyError("no such column")
        return index


@pytest.mark.parametrize("workers", [0, 2])
def test_a_failing_sample_is_named(workers: int) -> None:
    with (
        opened(prepared(Failing()).train, workers=workers) as batches,
        pytest.raises(
            DataError, match=r"Sample 13 failed: KeyError: 'no such column' \(.*test_data_user_sets.py, line"
        ),
    ):
        list(batches)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_failing_collate_is_named_with_its_samples(workers: int) -> None:
    with (
        opened(prepared([torch.zeros(1), torch.zeros(2)]).train, global_batch=2, workers=workers) as batches,
        pytest.raises(DataError, match=r"Collate \(torch default_collate\) of samples [01], [01] failed: RuntimeError"),
    ):
        list(batches)


class Deadly(Augmented):
    def __getitem__(self, index: int) -> Any:
        if index == 13:
            os.kill(os.getpid(), signal.SIGKILL)
        return index


def test_a_killed_worker_is_an_error_that_names_the_sample() -> None:
    with (
        opened(prepared(Deadly()).train, workers=2) as batches,
        pytest.raises(DataError, match="worker process died while it made sample 13"),
    ):
        list(batches)


def test_closing_ends_the_workers() -> None:
    class Pid(Augmented):
        def __getitem__(self, index: int) -> Any:
            return os.getpid()

    batches = opened(prepared(Pid()).train, workers=2, steps=None)
    pids = {int(pid) for _ in range(3) for micro in next(batches).micro for pid in micro.batch}
    assert pids
    assert os.getpid() not in pids
    batches.close()
    deadline = time.monotonic() + 5
    while any(os.path.exists(f"/proc/{pid}") for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_data_set_that_hangs_is_reported() -> None:
    class Hanging(Augmented):
        def __getitem__(self, index: int) -> Any:
            time.sleep(30)

    with (
        opened(prepared(Hanging()).train, workers=1, timeout_s=0.3) as batches,
        pytest.raises(DataError, match="No data came within 0 s"),
    ):
        next(batches)


def test_tuples_and_mappings_are_stacked_and_a_collate_is_used() -> None:
    pairs = [(torch.full((3,), float(i)), i) for i in range(6)]
    inputs, targets = prepared(pairs).train.batch([4, 1], [0, 0])
    assert inputs.tolist() == [[4.0] * 3, [1.0] * 3]
    assert targets.tolist() == [4, 1]
    named = [{"inputs": torch.zeros(2), "targets": i} for i in range(6)]
    assert prepared(named).train.batch([5, 2], [0, 0])["targets"].tolist() == [5, 2]
    assert prepared(pairs, collate=len).train.batch([4, 1], [0, 0]) == 2
    assert prepared(pairs, eval=pairs[:2]).facts == {"samples": 6, "eval_samples": 2}


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ([], "train of the data set has length 0"),
        (iter([1, 2]), "an iterator, which can be read once"),
        (7, "train of the data set is a int"),
    ],
)
def test_data_sets_that_cannot_be_read_are_refused(train: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        prepared(train)
    if train == []:
        with pytest.raises(DataError, match="eval of the data set has length 0"):
            prepared([1], eval=train)


class Counting(IterableDataset[Any]):
    """Draws at random while it runs, as a shuffle buffer does; counts how often it was read."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.reads = 0
        self.epochs: list[int] = []

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)

    def __iter__(self) -> Iterator[Any]:
        for number in range(self.count):
            self.reads += 1
            yield number, random.random()


def streamed(ranks: int, start: int = 0, **how: Any) -> dict[int, list[tuple[int, float]]]:
    found: dict[int, list[tuple[int, float]]] = {}
    for rank in range(ranks):
        with opened(
            prepared(Counting(10)).train, global_batch=4, rank=rank, ranks=ranks, start_step=start, **how
        ) as got:
            for local in got:
                for micro in local.micro:
                    assert micro.samples == micro.batch[0].tolist()
                    pairs = zip(micro.samples, micro.batch[1].tolist(), strict=True)
                    found.setdefault(local.step, []).extend(pairs)
    return found


def test_an_iterable_is_the_same_stream_on_any_ranks_workers_and_after_a_resume() -> None:
    alone = streamed(1)
    samples = [sample for step in range(8) for sample, _ in alone[step]]
    assert samples == [position % 10 for position in range(32)]
    assert streamed(3) == alone
    assert streamed(2, workers=2) == alone
    assert streamed(2, start=5) == {step: alone[step] for step in range(5, 8)}


def test_whole_epochs_are_jumped_over_once_the_length_is_known() -> None:
    data = Counting(10)
    samples: Any = prepared(data).train
    assert samples.read([1_000_003], 0)[1] == [3]
    assert data.reads <= 10 + 1 + 4
    assert data.epochs[0] == 0
    assert data.epochs[-1] == 100_000


def test_an_iterable_without_samples_or_with_a_bad_one_is_an_error() -> None:
    with pytest.raises(DataError, match="gave no sample at all"):
        next(opened(prepared(Counting(0)).train))
    with pytest.raises(DataError, match="gave no sample at all"):
        list(eval_batches(prepared(Counting(0)).train, batch=2, rank=0, ranks=1))

    class Broken(Counting):
        def __iter__(self) -> Iterator[Any]:
            yield 0
            raise ValueError("bad record")

    with pytest.raises(DataError, match="Sample 1 of the iterable data set failed: ValueError: bad record"):
        next(opened(prepared(Broken(3)).train))


def test_a_hugging_face_data_set_gives_tensors() -> None:
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict({"input_ids": [[i, i + 1] for i in range(10)], "labels": list(range(10))})
    samples = prepared(table).train
    batch = samples.batch([7, 2], [0, 0])
    assert batch["input_ids"].tolist() == [[7, 8], [2, 3]]
    assert batch["labels"].tolist() == [7, 2]
    table.set_transform(lambda rows: {"x": [torch.rand(()) for _ in rows["labels"]]})
    drawn = prepared(table).train
    first = drawn.batch([7, 2], [5, 6])["x"].tolist()
    assert first == drawn.batch([7, 2], [5, 6])["x"].tolist()
    assert first[0] == drawn.batch([7], [5])["x"].tolist()[0]
    stream = prepared(table.with_format(None).to_iterable_dataset()).train
    assert not hasattr(stream, "__len__")


def test_text_from_a_hugging_face_column(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    from shardwise.data.table import rows
    from shardwise.data.text import text

    table = datasets.Dataset.from_dict({"text": [f"row {i} \u00e9\n" * (i % 5) for i in range(200)]})
    found = text(rows(table), tokenizer="bytes", context=16, held_out=0.1).prepare(tmp_path, seed=0)
    stored = np.fromfile(Path(found.facts["tokenizer"]).parent / "train.bin", dtype=np.uint16)
    held = np.fromfile(Path(found.facts["tokenizer"]).parent / "eval.bin", dtype=np.uint16)
    assert found.facts["documents"] == 180
    assert found.facts["eval_documents"] == 20
    decoded = [bytes(document[:-1].tolist()).decode() for part in (stored, held) for document in _documents(part)]
    assert sorted(decoded) == sorted(table["text"])
    with pytest.raises(DataError, match="no column 'body'; it has"):
        rows(table, "body")
    with pytest.raises(DataError, match=r"Row \d in column 'n' of the data set is a int"):
        text(rows(datasets.Dataset.from_dict({"n": [1, 2, 3]}), "n"), tokenizer="bytes").prepare(tmp_path)


def _documents(stored: np.ndarray) -> list[np.ndarray]:
    return np.split(stored, np.flatnonzero(stored == 256) + 1)[:-1]


def test_what_a_batch_holds_on_to_is_counted_and_what_is_unknown_is_large() -> None:
    def size(batch: Any) -> int:
        return _nbytes(LocalStep(step=0, micro=[Micro(batch=batch, stream=0, samples=[], shard=None)], wait_s=0.0))

    small, large = torch.zeros(3), torch.zeros(10_000)
    assert size(small) == PAGE
    assert size({"a": small, "b": [large, (small,)]}) == 2 * PAGE + 40_000
    assert size(large[:2]) == 40_000
    for unknown in (torch.eye(3).to_sparse(), "text", None, {"a": small, "b": object()}):
        assert size(unknown) > BURST_BYTES
