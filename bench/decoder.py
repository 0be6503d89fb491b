"""The model of `tensor`: a decoder as tutorials of tensor parallelism write it, with a layer for each of q, k and v.

Its views leave the number of heads to the tensor's own size, so it runs on whole tensors and on local parts alike.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.case import Case


class Attention(nn.Module):
    """Causal self-attention without biases."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.head = width // heads
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(width, width, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = (w(x).view(batch, length, -1, self.head).transpose(1, 2) for w in (self.wq, self.wk, self.wv))
        found = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        mixed: Tensor = self.wo(found.transpose(1, 2).reshape(batch, length, -1))
        return mixed


class FeedForward(nn.Module):
    """SwiGLU with a gate of its own."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w1, self.w3 = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.w2 = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        mixed: Tensor = self.w2(F.silu(self.w1(x)) * self.w3(x))
        return mixed


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention, self.feed_forward = Attention(width, heads), FeedForward(width, 4 * width)
        self.attention_norm, self.ffn_norm = nn.RMSNorm(width), nn.RMSNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        x = x + self.feed_forward(self.ffn_norm(x))
        return x


class Decoder(nn.Module):
    """Tokens [B, T] -> scores [B, T, V]."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(case.vocab, case.width)
        self.positions = nn.Embedding(case.context, case.width)
        self.layers = nn.ModuleList(Block(case.width, case.heads) for _ in range(case.layers))
        self.norm = nn.RMSNorm(case.width)
        self.output = nn.Linear(case.width, case.vocab, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        x: Any = self.tok_embeddings(tokens) + self.positions(places)
        for layer in self.layers:
            x = layer(x)
        scores: Tensor = self.output(self.norm(x))
        return scores


def model(case: Case) -> Decoder:
    """The case's decoder; the seed makes it the same in every system."""
    torch.manual_seed(case.seed)
    return Decoder(case)
