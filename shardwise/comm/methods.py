"""The methods of `compressed` by name."""

from __future__ import annotations

from collections.abc import Callable

import torch

from shardwise.comm.codec import Blockwise, Cast, Codec
from shardwise.comm.topk import TopK
from shardwise.errors import SpecError, did_you_mean

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
