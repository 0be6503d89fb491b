"""The methods of `compressed` by name."""

from __future__ import annotations

from collections.abc import Callable

import torch

from shardwise.comm.codec import Blockwise, Cast, Codec
from shardwise.comm.coded import Coded
from shardwise.comm.compressed import CompressedSum, Method
from shardwise.comm.group import Group
from shardwise.comm.powersgd import PowerSGD
from shardwise.comm.topk import TopK
from shardwise.errors import SpecError, did_you_mean
from shardwise.spec.sync import Sync

POWERSGD = "powersgd"
CODECS: dict[str, Callable[[float], Codec]] = {
    "none": lambda density: Cast(torch.float32),
    "bf16": lambda density: Cast(torch.bfloat16),
    "int8": lambda density: Blockwise(8, 256),
    "int4": lambda density: Blockwise(4, 64),
    "topk": TopK,
}


def make_codec(method: str, *, density: float = 0.01) -> Codec:
    """The codec called none, bf16, int8, int4 or topk (which sends the share `density` of all values).

    Raises SpecError for another name, and for a density that is no share.
    """
    if method not in CODECS:
        raise SpecError(f"there is no codec '{method}'{did_you_mean(method, CODECS)}")
    return CODECS[method](density)


def make_sum(group: Group, sync: Sync, *, feedback: bool = True, seed: int = 0) -> CompressedSum:
    """What sums gradients over `group` as a `sync` whose word is `compressed` says; `seed` is alike on all ranks.

    Raises SpecError for a method that is none of the codecs nor powersgd.
    """
    method: Method
    if sync.method == POWERSGD:
        method = PowerSGD(group, sync.rank, seed=seed)
    else:
        method = Coded(group, make_codec(sync.method, density=sync.density))
    return CompressedSum(group, method, feedback=feedback, start=sync.start)
