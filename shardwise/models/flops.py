"""FLOPs of operators that torch's counter leaves out, counted as it does: an addition is one, a multiplication too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
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

# What is dear to compute, so that selective recomputation keeps it.
PRODUCTS = frozenset(
    {
        torch.ops.aten.mm,
        torch.ops.aten.addmm,
        torch.ops.aten.bmm,
        torch.ops.aten.baddbmm,
        torch.ops.aten.linear,
        torch.ops.aten.convolution,
        torch.ops.aten._scaled_mm,
        torch.ops.aten._grouped_mm,
        torch.ops.aten.mkldnn_rnn_layer,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu,
        torch.ops.aten._scaled_dot_product_flash_attention,
        torch.ops.aten._scaled_dot_product_efficient_attention,
        torch.ops.aten._scaled_dot_product_cudnn_attention,
    }
)


class ProductBytes(TorchDispatchMode):
    """Hands `count` the bytes of the outputs of every operator of `PRODUCTS`."""

    def __init__(self, count: Callable[[int], None]) -> None:
        super().__init__()
        self._count = count

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = operator(*args, **(kwargs or {}))
        if operator.overloadpacket in PRODUCTS:
            outputs = found if isinstance(found, tuple) else (found,)
            self._count(sum(tensor.nbytes for tensor in outputs if isinstance(tensor, Tensor)))
        return found
