"""Modules built by part: the values of one process for what is held, and no memory for the rest."""

from __future__ import annotations

import copy
import ctypes
import functools
import gc
import random
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn

from shardwise.errors import JobError
from shardwise.models.gpt import GPT
from shardwise.models.partial import Holds, build_part, parts_in_memory
from shardwise.spec.layout import boxes, whole
from shardwise.spec.plan import Plan
from tests.ranks import Rank, run_ranks

PAGE = resource.getpagesize()
SMALL = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}


class Reads(nn.Module):
    """Its parameters are made of each other, of a copy, of numbers of Python's and numpy's, and of a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 64)
        self.second = nn.Linear(64, 64)
        with torch.no_grad():
            self.second.weight.copy_(self.first.weight * 2)
        self.third = nn.utils.parametrizations.weight_norm(nn.Linear(64, 64))
        self.fourth = nn.Parameter(torch.randn(64, 64) * random.random())
        self.fifth = nn.Parameter(torch.tensor(self.first.weight.detach().numpy() + 1))
        self.register_buffer("noise", torch.randn(64, 64))
        nn.init.orthogonal_(self.first.weight)
        nn.init.trunc_normal_(self.second.weight[:, ::2])
        nn.init.sparse_(self.fourth, 0.5)


def llama(**more: Any) -> nn.Module:
    return tf.LlamaForCausalLM(tf.LlamaConfig(vocab_size=300, num_key_value_heads=2, **SMALL, **more))


def bert() -> nn.Module:
    return tf.BertForMaskedLM(tf.BertConfig(vocab_size=300, max_position_embeddings=64, **SMALL))


def t5() -> nn.Module:
    return tf.T5ForConditionalGeneration(
        tf.T5Config(vocab_size=300, d_model=64, d_ff=128, d_kv=16, num_layers=2, num_heads=4)
    )


def swin() -> nn.Module:
    sizes: dict[str, Any] = dict(depths=[1, 1], num_heads=[2, 4], image_size=32, patch_size=2, window_size=4)
    return tf.SwinForImageClassification(tf.SwinConfig(embed_dim=48, **sizes))


def copies() -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 4, 128, batch_first=True), 3)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "gpt": lambda: GPT(layers=2, width=64, heads=4, vocab=300, context=32),
    "llama": lambda: llama(),
    "llama, tied": lambda: llama(tie_word_embeddings=True),
    "bert": bert,
    "t5": t5,
    "swin": swin,
    "copies": copies,
    "lstm": lambda: nn.LSTM(64, 64, 2),
    "parameters of parameters": Reads,
}


def all_of(names: Callable[[str], bool]) -> Holds:
    """Whole parameters or nothing."""
    return lambda name, shape: (whole(shape),) if names(name) else ()


def rows_of(rank: int, ranks: int) -> Holds:
    """What a rank of a shard axis has."""
    return lambda name, shape: boxes(f"model/{name}", shape, Plan(shard=ranks, zero=3), rank)


def drawn() -> tuple[float, float]:
    return float(torch.rand(())), random.random()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("part", [0, 1])
def test_what_is_held_is_what_one_process_has(name: str, part: int) -> None:
    torch.manual_seed(3)
    random.seed(3)
    expected, after = MODELS[name](), drawn()
    mine = set([each for each, _ in expected.named_parameters()][part::2])
    torch.manual_seed(3)
    random.seed(3)
    module = build_part(MODELS[name], all_of(mine.__contains__)).module
    assert drawn() == after
    assert [each for each, _ in module.named_parameters()] == [each for each, _ in expected.named_parameters()]
    for each, parameter in module.named_parameters():
        there = expected.get_parameter(each)
        assert (parameter.shape, parameter.dtype) == (there.shape, there.dtype)
        assert parameter.stride() == there.stride()
        if each in mine:
            assert torch.equal(parameter, there), each
        elif name != "parameters of parameters" and parameter.nbytes >= PAGE:
            assert not parameter.detach().any(), each
    for (each, buffer), (_, other) in zip(module.named_buffers(), expected.named_buffers(), strict=True):
        assert torch.equal(buffer, other), each


@pytest.mark.parametrize("name", MODELS)
def test_rows_are_those_of_one_process(name: str) -> None:
    torch.manual_seed(3)
    random.seed(3)
    expected, after = MODELS[name](), drawn()
    for rank in range(3):
        torch.manual_seed(3)
        random.seed(3)
        module, by_part = build_part(MODELS[name], rows_of(rank, 3))
        assert (drawn(), by_part) == (after, True)
        for each, parameter in module.named_parameters():
            for box in rows_of(rank, 3)(each, tuple(parameter.shape)):
                assert torch.equal(parameter[box.slices], expected.get_parameter(each)[box.slices]), each


def test_a_module_that_was_there_before_is_left_alone() -> None:
    module = nn.Linear(64, 64)
    before = module.weight.detach().clone()
    assert build_part(lambda: module, lambda *_: ()) == (module, False)
    assert torch.equal(module.weight, before)


def test_one_that_is_handed_out_twice_is_refused() -> None:
    with pytest.raises(JobError, match="build a new module in each call"):
        build_part(functools.cache(lambda: nn.Linear(64, 64)), lambda *_: ())


def test_a_function_that_does_not_do_the_same_twice_builds_it_whole() -> None:
    calls: list[int] = []

    def model() -> nn.Module:
        calls.append(1)
        parts = [nn.Linear(64, 64), nn.Linear(64, 32)]
        return nn.Sequential(*(parts if len(calls) != 2 else reversed(parts)))

    torch.manual_seed(5)
    expected = [nn.Linear(64, 64), nn.Linear(64, 32)]
    torch.manual_seed(5)
    module, by_part = build_part(model, lambda *_: ())
    assert (len(calls), by_part) == (3, False)
    found = [p for p in module.parameters() if p.ndim > 1]
    assert all(torch.equal(a, b.weight) for a, b in zip(found, expected, strict=True))


def test_who_fills_parameters_knows_which_have_memory() -> None:
    found: list[bool] = []

    def model() -> nn.Module:
        module = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
        found[:] = [bool(parts_in_memory(part.weight)) for part in module]
        return module

    build_part(model, all_of(lambda name: name.startswith("1")))
    assert found == [False, True]
    model()
    assert found == [True, True]


def test_after_an_error_modules_are_built_as_ever() -> None:
    def model() -> nn.Module:
        nn.Linear(64, 64)
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        build_part(model, lambda *_: ())
    copied = copy.deepcopy(nn.Linear(64, 64))
    assert parts_in_memory(copied.weight) == (whole((64, 64)),)
    assert bool(copied.weight.detach().any())


def peak_growth(rank: Rank, holds: Holds) -> tuple[int, int, int]:
    """By how many bytes building raises the most that this process has had in memory; what is held; the largest."""
    build_part(lambda: nn.Linear(64, 64), lambda *_: ())  # what it loads on first use is loaded
    gc.collect()  # what other tests left behind, freed in the middle, would hide what is taken here
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _high_water()
    module = build_part(lambda: nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(24))), holds).module
    mine = sum(4 * box.size for name, p in module.named_parameters() for box in holds(name, tuple(p.shape)))
    return _high_water() - before, mine, max(p.nbytes for p in module.parameters())


def _high_water() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def test_the_peak_is_what_is_held_and_one_tensor() -> None:
    (grew, mine, largest) = run_ranks(1, peak_growth, all_of(lambda name: int(name.split(".")[0]) < 6))[0]
    assert mine == 6 * (1024 + 1) * 1024 * 4
    assert 0.9 * mine <= grew < mine + largest + 8 * 2**20
    (grew, mine, largest) = run_ranks(1, peak_growth, rows_of(1, 4))[0]
    assert mine == 24 * (1024 + 1) * 256 * 4
    assert 0.9 * mine <= grew < mine + 2 * largest + 8 * 2**20
    (grew, mine, _) = run_ranks(1, peak_growth, all_of(lambda name: True))[0]
    assert mine == 24 * (1024 + 1) * 1024 * 4
    assert grew > 0.9 * mine
