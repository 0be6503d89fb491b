"""A group's bookkeeping and its errors, on a backend whose faults are scripted."""

from __future__ import annotations

import time

import pytest
import torch

from shardwise.comm.collectives import broadcast_all, gather_rows, largest, totals
from shardwise.comm.fake import fake_group
from shardwise.comm.store import first_line
from shardwise.errors import CommError


def test_collectives_count_what_they_hand_over() -> None:
    group = fake_group(4)
    tensor = torch.ones(3)
    group.all_reduce(tensor).wait()
    assert tensor.tolist() == [4.0] * 3
    assert totals([1.0, 2.0], group) == [4.0, 8.0]
    assert largest([1.0, 2.0], group) == [1.0, 2.0]
    assert gather_rows(torch.tensor([[True, False]]), [1, 1, 1, 1], group).tolist() == [[True, False]] * 4
    broadcast_all([torch.ones(2), torch.ones(3, dtype=torch.int64), torch.ones(2)], group)
    assert group.wire["all_reduce"] == (3, 12 + 16 + 16)
    assert group.wire["broadcast"] == (2, 16 + 24)


def test_a_hang_ends_at_the_limit() -> None:
    group = fake_group(3, {2: "hang"}, timeout_s=0.3)
    group.step = 12
    group.all_reduce(torch.ones(1)).wait()
    began = time.monotonic()
    with pytest.raises(CommError) as caught:
        group.all_reduce(torch.ones(1)).wait()
    assert 0.25 < time.monotonic() - began < 2
    text = str(caught.value)
    assert "all_reduce number 2 of group 'data' (generation 0, step 12) on rank 0 waited longer than" in text
    assert "waited for rank(s) 1, 2" in text
    assert "1 all_reduce, 2 all_reduce" in text


def test_a_death_closes_the_group_for_good() -> None:
    group = fake_group(2, {1: "die"})
    with pytest.raises(CommError, match="Connection closed by peer"):
        group.all_reduce(torch.ones(1)).wait()
    with pytest.raises(CommError, match=r"broadcast number 2 .* all_reduce number 1 failed.*never used again"):
        group.broadcast([torch.ones(1)], root=0)


def test_a_tensor_of_a_device_without_a_backend_is_refused() -> None:
    with pytest.raises(CommError, match="no backend for meta tensors, only for cpu"):
        fake_group(2).all_reduce(torch.ones(1, device="meta"))


def test_torchs_errors_are_cut_to_their_sentence() -> None:
    raw = RuntimeError("[/pytorch/gloo/pair.cc:553] Connection closed by peer [::1]:62. Check the logs.\nframe #0")
    assert first_line(raw) == "Connection closed by peer [::1]:62."
    assert first_line(ValueError()) == "ValueError."
