"""Whether ranks share memory, and by what: all of them must come to the same."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from shardwise.comm import shm_connect
from shardwise.comm.kernel import library
from shardwise.errors import CommError
from tests.ranks import Rank, run_ranks


def without(rank: Rank, lacks: str, transport: str) -> tuple[str, float] | str:
    """One rank cannot have shared memory; all of them must come to the same."""

    def refuse(*_: Any) -> Any:
        raise OSError(lacks)

    os.environ["SHARDWISE_TRANSPORT"] = transport
    if lacks == "kernel" and rank.rank == 1:
        shm_connect.loadable = lambda: False
    elif lacks == "file" and rank.rank == 0:
        shm_connect.os = SimpleNamespace(**{**vars(os), "memfd_create": refuse})  # type: ignore[assignment]
    elif lacks == "mapping" and rank.rank == 2:
        shm_connect._length = refuse
    try:
        group = rank.mesh().axis("data").group
    except CommError as error:
        return str(error)
    assert group is not None
    tensor = torch.ones(3)
    group.all_reduce(tensor).wait()
    return type(group._inners["cpu"].backend).__name__, float(tensor[0])


@pytest.mark.parametrize("transport", ["auto", "shm"])
def test_ranks_agree_on_torch_when_one_of_them_has_no_kernel(transport: str) -> None:
    assert run_ranks(3, without, "kernel", transport) == [("ShmTorch", 3.0)] * 3


@pytest.mark.parametrize("lacks", ["file", "mapping"])
def test_ranks_agree_on_gloo_when_one_of_them_cannot_share_memory(lacks: str) -> None:
    assert run_ranks(3, without, lacks, "auto") == [("ProcessGroupGloo", 3.0)] * 3


@pytest.mark.parametrize("lacks", ["file", "mapping"])
@pytest.mark.parametrize("transport", ["shm", "shm-torch"])
def test_shared_memory_that_was_asked_for_is_an_error_where_there_is_none(lacks: str, transport: str) -> None:
    for text in run_ranks(3, without, lacks, transport):
        assert "cannot share memory" in text
        assert "SHARDWISE_TRANSPORT=gloo" in text


@pytest.mark.parametrize(("transport", "taken"), [("auto", "Shm"), ("shm", "Shm"), ("shm-torch", "ShmTorch")])
@pytest.mark.skipif(library() is None, reason="built without a C compiler")
def test_nothing_lacks_here(transport: str, taken: str) -> None:
    assert run_ranks(3, without, "", transport) == [(taken, 3.0)] * 3


def test_a_transport_that_there_is_not_is_refused() -> None:
    assert "none of auto, shm, shm-torch, gloo" in str(run_ranks(2, without, "", "tcp"))
