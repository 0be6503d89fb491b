"""The reference GPT: a plain decoder-only transformer in one file, meant to be read, copied and changed.

Shapes: B batch, T positions, W width, H heads, K key-value heads, D width of one head (W = H * D), M width of the MLP,
V vocabulary. The parts are those of Llama (Touvron et al. 2023): RMSNorm before each branch, rotary positions, SwiGLU,
no biases; LayerNorm and a GELU MLP by choice. Nothing in it knows how it will be split.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shardwise.errors import JobError, did_you_mean

Norm = Literal["rms", "layer"]
Activation = Literal["swiglu", "gelu"]
NORMS = {"rms": nn.RMSNorm, "layer": nn.LayerNorm}
INIT_STD = 0.02


def rope_table(positions: int, dim: int, *, base: float = 10000.0) -> Tensor:
    """Cosines and sines [2, positions, dim] of rotary position embedding (Su et al. 2021, section 3.4.2).

    The sines' first half is negated, so that rotating is `x * cos + swap_halves(x) * sin`.
    """
    frequencies = base ** (-torch.arange(0, dim, 2, device="cpu", dtype=torch.float64) / dim)
    angles = torch.outer(torch.arange(positions, device="cpu", dtype=torch.float64), frequencies)
    cos, sin = angles.cos(), angles.sin()
    return torch.stack([torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)])


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Turn `x` [B, T, heads, D] by its positions; `rope` is [2, T, D] in the same dtype."""
    cos, sin = rope[:, :, None]
    first, second = x.chunk(2, dim=-1)
    turned: Tensor = x * cos + torch.cat([second, first], dim=-1) * sin
    return turned


class Attention(nn.Module):
    """Causal self-attention with rotary positions; `kv_heads < heads` is grouped-query (Ainslie et al. 2023)."""

    def __init__(self, width: int, heads: int, kv_heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.dropout = heads, kv_heads, dropout
        self.head_width = width // heads
        self.qkv = nn.Linear(width, (heads + 2 * kv_heads) * self.head_width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def project(self, x: Tensor, rope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, T, W] -> queries [B, H, T, D], keys and values [B, K, T, D], all views of one product where possible."""
        heads = self.qkv(x).unflatten(-1, (-1, self.head_width))
        q, k, v = heads.split([self.heads, self.kv_heads, self.kv_heads], dim=2)
        rope = rope.to(heads.dtype)
        return rotate(q, rope).transpose(1, 2), rotate(k, rope).transpose(1, 2), v.transpose(1, 2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Causal attention of `q` on `k` and `v`, heads joined again and mixed: [B, T, W].

        As many queries as keys, or one query that sees all keys (the last position of a cache).
        """
        y = F.scaled_dot_product_attention(
            q,
            k,
            v,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=q.shape[2] > 1,
            enable_gqa=self.kv_heads != self.heads,
        )
        mixed: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return mixed

    def forward(self, x: Tensor, rope: Tensor) -> Tensor:
        return self.attend(*self.project(x, rope))


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020), gate and up in one product: `down(silu(gate) * up)`; or `down(gelu(up))`."""

    def __init__(self, width: int, hidden: int, activation: Activation) -> None:
        super().__init__()
        self.gated = activation == "swiglu"
        self.up = nn.Linear(width, 2 * hidden if self.gated else hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.up(x)
        if self.gated:
            gate, up = hidden.chunk(2, dim=-1)
            hidden = F.silu(gate) * up
        else:
            hidden = F.gelu(hidden)
        x = self.down(hidden)
        return x


class Block(nn.Module):
    """One layer: attention, then the MLP, each normalised before and added to its input."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        width, dropout = config["width"], config["dropout"]
        self.attention_norm = NORMS[config["norm"]](width, eps=config["norm_eps"])
        self.attention = Attention(width, config["heads"], config["kv_heads"], dropout)
        self.mlp_norm = NORMS[config["norm"]](width, eps=config["norm_eps"])
        self.mlp = MLP(width, config["mlp"], config["activation"])
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, rope: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), rope))
        x = x + self.dropout(self.mlp(self.mlp_norm(x)))
        return x


class GPT(nn.Module):
    """Tokens [B, T] int64, T <= context -> logits [B, T, V].

    `mlp` is M; without it 8/3 of the width for SwiGLU, rounded up to a multiple of 64, or 4 times the width for GELU.
    `tied` shares the embedding with the output layer. `config` holds every argument with its default filled in.
    Raises JobError for arguments that do not fit together and for an input longer than `context`.
    """

    rope: Tensor

    def __init__(
        self,
        layers: int,
        width: int,
        heads: int,
        vocab: int,
        context: int,
        kv_heads: int | None = None,
        mlp: int | None = None,
        norm: Norm = "rms",
        activation: Activation = "swiglu",
        tied: bool = True,
        dropout: float = 0.0,
        rope_base: float = 10000.0,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        default_mlp = -(-8 * width // (3 * 64)) * 64 if activation == "swiglu" else 4 * width
        self.config: dict[str, Any] = {
            "layers": layers,
            "width": width,
            "heads": heads,
            "vocab": vocab,
            "context": context,
            "kv_heads": heads if kv_heads is None else kv_heads,
            "mlp": default_mlp if mlp is None else mlp,
            "norm": norm,
            "activation": activation,
            "tied": tied,
            "dropout": dropout,
            "rope_base": rope_base,
            "norm_eps": norm_eps,
        }
        check(self.config)
        self.context = context
        self.embed = nn.Embedding(vocab, width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(self.config) for _ in range(layers))
        self.norm = NORMS[norm](width, eps=norm_eps)
        self.head = nn.Linear(width, vocab, bias=False)
        # A buffer that follows the module to its device and dtype, but is no part of the saved state.
        self.register_buffer("rope", torch.empty(2, context, width // heads), persistent=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Fill parameters and buffers anew, as GPT-2 does (Radford et al. 2019, section 2.3): the layers that write
        into the residual stream start smaller by sqrt(2 * layers). Needed after `to_empty` on a meta-device model."""
        if self.config["tied"]:
            self.head.weight = self.embed.weight  # here, because `to_empty` unties parameters
        residual_std = INIT_STD / (2 * self.config["layers"]) ** 0.5
        for name, module in self.named_modules():
            if isinstance(module, (nn.RMSNorm, nn.LayerNorm)):
                module.reset_parameters()
            elif isinstance(module, (nn.Linear, nn.Embedding)):
                residual = name.endswith(("attention.out", "mlp.down"))
                nn.init.normal_(module.weight, std=residual_std if residual else INIT_STD)
        config = self.config
        self.rope.copy_(rope_table(self.context, config["width"] // config["heads"], base=config["rope_base"]))

    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        if length > self.context:
            raise JobError(
                f"the model has context={self.context} but was given {length} tokens a sample. "
                f"Cut the samples to {self.context} tokens, or build the GPT with a larger context."
            )
        x = self.dropout(self.embed(tokens))
        rope = self.rope[:, :length]
        for block in self.blocks:
            x = block(x, rope)
        logits: Tensor = self.head(self.norm(x))
        return logits

    def generate(
        self,
        tokens: Tensor,
        max_new: int,
        temperature: float = 0.0,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
        stop: int | None = None,
    ) -> Tensor:
        """`tokens` [B, T] with up to `max_new` tokens appended; see `shardwise.models.generate.generate`."""
        from shardwise.models.generate import generate  # it imports this file

        return generate(self, tokens, max_new, temperature=temperature, top_k=top_k, generator=generator, stop=stop)


def check(config: dict[str, Any]) -> None:
    """Raise JobError, naming the argument, when a GPT's arguments do not fit together."""
    for name in ("layers", "width", "heads", "vocab", "context", "kv_heads", "mlp"):
        if config[name] < 1:
            raise JobError(f"{name}={config[name]} of the GPT: it must be at least 1.")
    width, heads, kv_heads = config["width"], config["heads"], config["kv_heads"]
    if width % heads or (width // heads) % 2:
        raise JobError(
            f"width={width} and heads={heads} of the GPT: each head needs an even number of features. "
            f"Choose a width that is a multiple of 2 * heads = {2 * heads}."
        )
    if heads % kv_heads:
        raise JobError(f"kv_heads={kv_heads} of the GPT must divide heads={heads}: key-value heads serve equal groups.")
    for name, known in (("norm", NORMS), ("activation", ("swiglu", "gelu"))):
        if config[name] not in known:
            raise JobError(f"{name}='{config[name]}' of the GPT is unknown{did_you_mean(str(config[name]), known)}")
    if not 0 <= config["dropout"] < 1:
        raise JobError(f"dropout={config['dropout']} of the GPT: it must be at least 0 and below 1.")
