"""Packed windows and the loader over them, with tensors."""

from __future__ import annotations

import itertools
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from shardwise.data.loader import eval_batches, open_batches
from shardwise.data.pack import Windows
from shardwise.errors import DataError


def windows(tmp_path: Path, tokens: int, context: int, dtype: type = np.uint16) -> tuple[Windows, np.ndarray]:
    stored = np.random.default_rng(0).integers(0, 60_000, tokens).astype(dtype)
    stored.tofile(tmp_path / "train.bin")
    return Windows(tmp_path / "train.bin", dtype, tokens=tokens, context=context), stored


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
@pytest.mark.parametrize(("tokens", "context"), [(65, 8), (64, 8), (66, 8), (9, 8), (1000, 1)])
def test_windows_cut_the_tokens_without_gap_or_overlap_of_targets(
    tmp_path: Path, dtype: type, tokens: int, context: int
) -> None:
    found, stored = windows(tmp_path, tokens, context, dtype)
    assert len(found) == (tokens - 1) // context
    batch = found.batch(range(len(found)), [0] * len(found))
    assert batch["tokens"].dtype == batch["targets"].dtype == torch.int64
    assert batch["tokens"].shape == batch["targets"].shape == (len(found), context)
    assert batch["tokens"].is_contiguous()
    assert batch["targets"].is_contiguous()
    used = len(found) * context
    assert batch["tokens"].flatten().tolist() == stored[:used].tolist()
    assert batch["targets"].flatten().tolist() == stored[1 : used + 1].tolist()


def test_rows_come_in_the_order_asked_for(tmp_path: Path) -> None:
    found, stored = windows(tmp_path, 101, 10)
    batch = found.batch([7, 0, 7], [0] * 3)
    assert [row[0] for row in batch["tokens"].tolist()] == [stored[70], stored[0], stored[70]]


def test_a_file_that_became_shorter_is_an_error(tmp_path: Path) -> None:
    found, stored = windows(tmp_path, 101, 10)
    stored[:50].tofile(tmp_path / "train.bin")
    with pytest.raises(DataError, match="train.bin became shorter"):
        found.batch([9], [0])


def test_windows_travel_to_a_spawned_process(tmp_path: Path) -> None:
    found, _ = windows(tmp_path, 101, 10)
    expected = found.batch([3], [0])["tokens"]
    assert torch.equal(pickle.loads(pickle.dumps(found)).batch([3], [0])["tokens"], expected)


def test_ranks_and_workers_get_the_rows_of_one_rank(tmp_path: Path) -> None:
    found, _ = windows(tmp_path, 1001, 10)
    with open_batches(found, global_batch=6, seed=1, rank=0, ranks=1, steps=20) as batches:
        whole = [local.micro[0].batch["tokens"] for local in batches]
    for ranks, workers in ((3, 0), (2, 1)):
        parts = []
        for rank in range(ranks):
            with open_batches(
                found, global_batch=6, seed=1, rank=rank, ranks=ranks, steps=20, workers=workers
            ) as batches:
                parts.append([local.micro[0].batch["tokens"] for local in batches])
        assert [len(part) for part in parts] == [20] * ranks
        assert all(torch.equal(torch.cat(step), one) for step, one in zip(zip(*parts, strict=True), whole, strict=True))


def test_the_wait_is_measured_and_falls_to_nothing_when_batches_are_made_ahead(tmp_path: Path) -> None:
    import time

    class Slow:
        user_code = False
        weight_hint = 1

        def __len__(self) -> int:
            return 8

        def batch(self, indices: object, seeds: object) -> int:
            time.sleep(0.1)
            return 0

    with open_batches(Slow(), global_batch=2, seed=0, rank=0, ranks=1) as batches:
        first = next(batches)
        assert first.wait_s > 0.08
        time.sleep(0.5)  # a training step, in which the next ones are made
        assert next(batches).wait_s < 0.08


def test_evaluation_covers_every_window_in_order(tmp_path: Path) -> None:
    found, stored = windows(tmp_path, 1001, 10)
    rounds = itertools.zip_longest(*(eval_batches(found, batch=7, rank=rank, ranks=3) for rank in range(3)))
    batches = [one for each in rounds for one in each if one is not None]
    assert torch.cat([one["targets"] for one in batches]).flatten().tolist() == stored[1:].tolist()
