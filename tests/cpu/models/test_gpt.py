"""The reference GPT against an implementation written for clarity alone, and against transformers' Llama."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from shardwise.errors import JobError
from shardwise.models.gpt import GPT, rope_table, rotate
from shardwise.models.gpt_llama import to_llama


def small(**changes: object) -> GPT:
    torch.manual_seed(0)
    arguments = dict(layers=2, width=32, heads=4, vocab=50, context=16) | changes
    gpt = GPT(**arguments).double()
    gpt.init_weights()
    with torch.no_grad():  # the usual start is so small that errors in attention would hide in the rounding
        for parameter in gpt.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return gpt


def plain_rotation(x: Tensor, base: float = 10000.0) -> Tensor:
    """Rotary embedding as the paper has it: pairs (i, i + D/2) are complex numbers turned by position * frequency."""
    _, positions, _, dim = x.shape
    pairs = torch.complex(x[..., : dim // 2], x[..., dim // 2 :])
    for t in range(positions):
        for i in range(dim // 2):
            angle = torch.tensor(t * base ** (-2 * i / dim), dtype=torch.float64)
            pairs[:, t, :, i] *= torch.polar(torch.tensor(1.0, dtype=torch.float64), angle)
    return torch.cat([pairs.real, pairs.imag], dim=-1)


def plain_gpt(gpt: GPT, tokens: Tensor) -> Tensor:
    """Every head on its own, scores as a full matrix, no fused products."""
    config, state = gpt.config, gpt.state_dict()
    width, heads, kv_heads = config["width"], config["heads"], config["kv_heads"]
    dim, batch, length = width // heads, *tokens.shape

    def norm(x: Tensor, name: str) -> Tensor:
        if config["norm"] == "layer":
            x = x - x.mean(-1, keepdim=True)
            bias = state[f"{name}.bias"]
        else:
            bias = 0.0
        return x / (x.pow(2).mean(-1, keepdim=True) + config["norm_eps"]).sqrt() * state[f"{name}.weight"] + bias

    x = state["embed.weight"][tokens]
    hidden = torch.ones(length, length).triu(1).bool()
    for layer in range(config["layers"]):
        name = f"blocks.{layer}"
        y = norm(x, f"{name}.attention_norm")
        q, k, v = (y @ state[f"{name}.attention.qkv.weight"].T).split([width, kv_heads * dim, kv_heads * dim], -1)
        q = plain_rotation(q.reshape(batch, length, heads, dim))
        k = plain_rotation(k.reshape(batch, length, kv_heads, dim))
        v = v.reshape(batch, length, kv_heads, dim)
        parts = []
        for head in range(heads):
            group = head * kv_heads // heads
            scores = torch.einsum("btd,bsd->bts", q[:, :, head], k[:, :, group]) / dim**0.5
            parts.append(scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v[:, :, group])
        x = x + torch.cat(parts, -1) @ state[f"{name}.attention.out.weight"].T
        up = norm(x, f"{name}.mlp_norm") @ state[f"{name}.mlp.up.weight"].T
        if config["activation"] == "swiglu":
            gate, up = up.chunk(2, -1)
            up = gate * gate.sigmoid() * up
        else:
            up = 0.5 * up * (1 + torch.erf(up / 2**0.5))
        x = x + up @ state[f"{name}.mlp.down.weight"].T
    return norm(x, "norm") @ state["head.weight"].T


@pytest.mark.parametrize(
    "changes",
    [{}, {"kv_heads": 2}, {"kv_heads": 1, "tied": False}, {"norm": "layer", "activation": "gelu"}, {"mlp": 40}],
)
def test_logits_equal_the_plain_implementation(changes: dict[str, object]) -> None:
    gpt = small(**changes)
    tokens = torch.randint(50, (2, 13))
    torch.testing.assert_close(gpt(tokens), plain_gpt(gpt, tokens), rtol=1e-10, atol=1e-10)


def test_rotation_keeps_lengths_and_depends_on_distance_only() -> None:
    rope = rope_table(32, 8)
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)
    turned_q, turned_k = (rotate(x.expand(1, 32, 1, 8), rope)[0, :, 0] for x in (q, k))
    torch.testing.assert_close(turned_q.norm(dim=-1), q.norm().expand(32))
    scores = turned_q @ turned_k.T
    torch.testing.assert_close(scores[5, 2], scores[25, 22])
    assert not torch.allclose(scores[5, 2], scores[5, 3])


def test_a_token_does_not_see_later_ones() -> None:
    gpt = small()
    tokens = torch.randint(50, (1, 12))
    changed = tokens.clone()
    changed[0, 7] = (changed[0, 7] + 1) % 50
    before, after = gpt(tokens), gpt(changed)
    torch.testing.assert_close(before[:, :7], after[:, :7], rtol=0, atol=0)
    assert (before[:, 7:] - after[:, 7:]).abs().amax(-1).min() > 1e-4


def test_names_sizes_and_ties() -> None:
    gpt = GPT(layers=6, width=320, heads=5, vocab=4096, context=256)
    assert sum(p.numel() for p in gpt.parameters()) == 8_933_440
    assert gpt.head.weight is gpt.embed.weight
    assert [n for n, _ in gpt.named_parameters() if not n.startswith("blocks.")] == ["embed.weight", "norm.weight"]
    assert [n.removeprefix("blocks.5.") for n in gpt.state_dict() if n.startswith("blocks.5.")] == [
        "attention_norm.weight",
        "attention.qkv.weight",
        "attention.out.weight",
        "mlp_norm.weight",
        "mlp.up.weight",
        "mlp.down.weight",
    ]
    assert "rope" not in gpt.state_dict()


def test_start_is_near_the_uniform_guess_and_residual_layers_start_smaller() -> None:
    torch.manual_seed(0)
    gpt = GPT(layers=8, width=128, heads=4, vocab=1000, context=64)
    tokens = torch.randint(1000, (4, 64))
    loss = torch.nn.functional.cross_entropy(gpt(tokens).flatten(0, 1), torch.randint(1000, (4 * 64,)))
    assert abs(loss.item() - torch.tensor(1000.0).log().item()) < 0.1
    block = gpt.blocks[0]
    assert block.mlp.up.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert block.mlp.down.weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)
    assert block.attention.out.weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)


def test_a_model_built_without_memory_is_whole_after_init_weights() -> None:
    with torch.device("meta"):
        gpt = GPT(layers=1, width=16, heads=2, vocab=20, context=8)
    assert gpt.rope.is_meta
    gpt.to_empty(device="cpu")
    torch.manual_seed(3)
    gpt.init_weights()
    other = GPT(layers=1, width=16, heads=2, vocab=20, context=8)
    torch.manual_seed(3)
    other.init_weights()
    tokens = torch.randint(20, (1, 8))
    assert gpt.rope.isfinite().all()
    assert gpt.head.weight is gpt.embed.weight
    torch.testing.assert_close(gpt(tokens), other(tokens), rtol=0, atol=0)


def test_bfloat16_autocast_stays_near_float32() -> None:
    torch.manual_seed(0)
    gpt = GPT(layers=2, width=64, heads=2, vocab=100, context=32)
    tokens = torch.randint(100, (2, 32))
    with torch.autocast("cpu", torch.bfloat16):
        low = gpt(tokens)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), gpt(tokens), atol=0.02, rtol=0.02)


def test_dropout_acts_in_training_only() -> None:
    gpt = small(dropout=0.3)
    tokens = torch.randint(50, (2, 8))
    assert not torch.equal(gpt(tokens), gpt(tokens))
    gpt.eval()
    torch.testing.assert_close(gpt(tokens), gpt(tokens), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"heads": 5}, "width=32 and heads=5"),
        ({"width": 36, "heads": 4}, "multiple of 2 \\* heads"),
        ({"kv_heads": 3}, "kv_heads=3"),
        ({"layers": 0}, "layers=0"),
        ({"norm": "rmss"}, "did you mean 'rms'"),
        ({"activation": "swigly"}, "did you mean 'swiglu'"),
        ({"dropout": 1.0}, "dropout=1.0"),
    ],
)
def test_arguments_that_do_not_fit_are_named(changes: dict[str, object], words: str) -> None:
    with pytest.raises(JobError, match=words):
        small(**changes)


def test_too_long_an_input_names_the_context() -> None:
    with pytest.raises(JobError, match="context=16 but was given 17"):
        small()(torch.zeros(1, 17, dtype=torch.int64))


@pytest.mark.parametrize("changes", [{}, {"kv_heads": 2, "tied": False, "rope_base": 500.0}])
def test_logits_equal_transformers_llama(changes: dict[str, object]) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install -e .[hf]")
    gpt = small(**changes).float()
    gpt.rope.copy_(rope_table(16, 8, base=gpt.config["rope_base"]))
    config, state = to_llama(gpt)
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).eval()
    loaded = llama.load_state_dict(state, strict=False)
    assert not loaded.unexpected_keys
    assert loaded.missing_keys == (["lm_head.weight"] if gpt.config["tied"] else [])
    llama.tie_weights()
    tokens = torch.randint(50, (3, 16))
    theirs = llama(input_ids=tokens).logits
    torch.testing.assert_close(gpt(tokens), theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max().item())


def test_a_gpt_that_is_no_llama_is_refused() -> None:
    with pytest.raises(JobError, match="norm='layer'"):
        to_llama(small(norm="layer"))
