"""A transformer encoder that classifies sequences with padding.

Shapes: B batch, T positions, W width, H heads, D width of one head (W = H * D). Normalisation comes before each branch
(Xiong et al. 2020), positions are learned.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shardwise.errors import JobError, did_you_mean

POOLS = ("mean", "first")
INIT_STD = 0.02


class Attention(nn.Module):
    """Self-attention in both directions; `mask` [B, 1, 1, T] is true where a key may be seen."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        mixed: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return mixed


class Block(nn.Module):
    """One layer: attention, then a GELU MLP, each normalised before and added to its input."""

    def __init__(self, width: int, heads: int, mlp: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads, dropout)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, mlp), nn.GELU(), nn.Linear(mlp, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), mask))
        x = x + self.dropout(self.mlp(self.mlp_norm(x)))
        return x


class Encoder(nn.Module):
    """Tokens [B, T] int64, T <= context, and `mask` [B, T] (true or 1 for a token, false or 0 for padding) -> class
    scores [B, classes].

    Without `mask` every position counts, or every one whose token is not `pad` if `pad` is given. What stands in the
    padding does not change the result. `pool` makes one vector of a sequence: the mean of its tokens or its first.
    Raises JobError for arguments that do not fit together and for an input longer than `context`.
    """

    def __init__(
        self,
        layers: int,
        width: int,
        heads: int,
        vocab: int,
        context: int,
        classes: int,
        mlp: int | None = None,
        pool: Literal["mean", "first"] = "mean",
        pad: int | None = None,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if pool not in POOLS:
            raise JobError(f"pool='{pool}' of the encoder is unknown{did_you_mean(pool, POOLS)}")
        if heads < 1 or width % heads:
            raise JobError(f"width={width} of the encoder must be a multiple of heads={heads}.")
        self.context, self.pool, self.pad = context, pool, pad
        self.embed = nn.Embedding(vocab, width)
        self.position = nn.Embedding(context, width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(width, heads, mlp or 4 * width, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Normal weights of one small deviation, zero biases, as in BERT (Devlin et al. 2019)."""
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                module.reset_parameters()
            elif isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=INIT_STD)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        length = tokens.shape[1]
        if length > self.context:
            raise JobError(
                f"the encoder has context={self.context} but was given {length} tokens a sample. "
                f"Cut the samples to {self.context} tokens, or build the encoder with a larger context."
            )
        if mask is None and self.pad is not None:
            mask = tokens != self.pad
        seen = None
        if mask is not None:
            mask = mask.bool()
            # A sample of padding alone would give NaN for the whole batch's gradient: let it see itself instead.
            seen = (mask | ~mask.any(1, keepdim=True))[:, None, None]
        x = self.dropout(self.embed(tokens) + self.position.weight[:length])
        for block in self.blocks:
            x = block(x, seen)
        scores: Tensor = self.head(self.pooled(self.norm(x), mask))
        return scores

    def pooled(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """[B, T, W] -> [B, W]."""
        if self.pool == "first":
            return x[:, 0]
        if mask is None:
            return x.mean(1)
        weights = mask.to(x.dtype)[:, :, None]
        return (x * weights).sum(1) / weights.sum(1).clamp(min=1)
