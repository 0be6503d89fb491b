"""FLOPs of operators that torch's counter leaves out, counted as it does: an addition is one, a multiplication too."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

Shape = Any  # the counter hands formulas a torch.Size for each tensor


def flop_counter() -> FlopCounterMode:
    """A counter that also knows attention on the CPU, the products of a mixture's experts, and recurrent layers."""
    return FlopCounterMode(display=False, custom_mapping=FORMULAS)


def attention_flops(query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    """Two matrix products, of shapes [B, H, T, D]: the scores, and the weighted values."""
    batch, heads, length, dim = query
    return int(2 * batch * heads * length * key[2] * (dim + value[3]))


def grouped_product_flops(left: Shape, right: Shape, *_: Any, **__: Any) -> int:
    """Products of groups: each row of `left` [.., M, K] meets one group of `right` [.., K, N]."""
    groups = left[0] if len(left) == len(right) == 3 else 1
    return int(2 * groups * left[-2] * left[-1] * right[-1])


def recurrent_flops(inputs: Shape, input_weight: Shape, hidden_weight: Shape, *_: Any, **__: Any) -> int:
    """One layer and direction over a whole sequence [T, B, features]; the gates are stacked in the weights' rows."""
    length, batch, _features = inputs
    return int(2 * length * batch * (input_weight[0] * input_weight[1] + hidden_weight[0] * hidden_weight[1]))


FORMULAS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops,
    torch.ops.aten._grouped_mm: grouped_product_flops,
    torch.ops.aten.mkldnn_rnn_layer: recurrent_flops,
}
