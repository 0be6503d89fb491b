"""No rank ever has the whole model in memory: pretrained weights of 211 MiB on four ranks, by stages and by rows."""

from __future__ import annotations

import gc
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

import shardwise as sw
from shardwise.data.source import Prepared
from shardwise.parallel.allocator import give_back_freed_memory
from shardwise.spec.layout import holds
from shardwise.spec.plan import Plan
from shardwise.train.run import Trainer, cut_here
from shardwise.train.state import Saver
from tests.ranks import Rank, run_ranks

MIB = 2**20
OVERHEAD = 24 * MIB  # code that runs for the first time, activations, messages
SIZES: dict[str, Any] = dict(num_attention_heads=8, num_key_value_heads=4, vocab_size=8000, tie_word_embeddings=False)


def llama(layers: int = 12, width: int = 512) -> Any:
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
    return tf.LlamaForCausalLM(tf.LlamaConfig(**sizes, **SIZES, use_cache=False))


def job(folder: Path | None, **sizes: int) -> sw.TrainJob:
    return sw.TrainJob(
        model=lambda: sw.pretrained(llama(**sizes), folder) if folder else llama(**sizes),
        loss=sw.next_token_loss,
        forward=lambda model, batch: model(input_ids=batch["tokens"]).logits,
        data=sw.arrays({"tokens": TOKENS, "targets": TOKENS}),
        optimizer=sw.sgd(lr=1e-4, momentum=0.0),
        global_batch=4,
        steps=1,
        seed=7,
    )


TOKENS = torch.arange(4 * 8).view(4, 8)


def prepared(described: sw.TrainJob, cache: Path) -> Prepared:
    found: Prepared = described.data.prepare(cache, seed=0)
    return found


class HighWater:
    """The most bytes that this process has had in memory since it began, above what it had then."""

    def __init__(self) -> None:
        gc.collect()  # memory that others have freed would hide what is taken here
        give_back_freed_memory()
        Path("/proc/self/clear_refs").write_text("5")
        self._before = self._now()

    @property
    def bytes(self) -> int:
        return self._now() - self._before

    @staticmethod
    def _now() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


def write(_: Rank, folder: Path) -> int:
    torch.manual_seed(1)
    module = llama()
    module.save_pretrained(folder)
    return sum(p.nbytes for p in module.parameters())


def warm(rank: Rank, tiny: sw.TrainJob, cache: Path, world: int) -> None:
    """What is imported and compiled on first use is there."""
    cut_here(tiny, Plan(pipeline=world, microbatches=4), prepared(tiny, cache))


def load(rank: Rank, plan: Plan, folder: Path | None, cache: Path) -> tuple[list[int], dict[str, float]]:
    """[bytes held, of the largest tensor, at the peak of building, at that of a step too], sums of what is held."""
    described = job(folder)
    data, mesh = prepared(described, cache), rank.mesh(plan)
    warm(rank, job(None, layers=8, width=64), cache, rank.world)
    water = HighWater()
    trainer = Trainer(described, plan, mesh, data, Saver(None, mesh, described))
    built, module = water.bytes, trainer.replica.module
    names = {name for name in trainer.replica.shapes if holds(f"model/{name}", trainer.plan, rank.rank)}
    held = {name: p.detach() for name, p in module.named_parameters() if name in names}
    sums = {name: float(p.double().sum()) for name, p in held.items()}
    mine, largest = sum(p.nbytes for p in held.values()), max(prod(shape) for shape in trainer.replica.shapes.values())
    trainer.train()
    trained = water.bytes
    trainer.close()
    return [mine, 4 * largest, built, trained], sums


def whole(rank: Rank, folder: Path) -> tuple[int, dict[str, float]]:
    water = HighWater()
    module = job(folder).model()
    return water.bytes, {name: float(p.detach().double().sum()) for name, p in module.named_parameters()}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    folder = tmp_path_factory.mktemp("weights")
    return folder, run_ranks(1, write, folder, timeout_s=120)[0]


@pytest.mark.slow
@pytest.mark.parametrize("plan", [Plan(pipeline=4, microbatches=4), Plan(shard=4, zero=3)], ids=str)
def test_a_rank_has_its_part_in_memory_and_never_the_whole(
    plan: Plan, weights: tuple[Path, int], tmp_path: Path
) -> None:
    folder, size = weights
    assert size > 200e6
    peak, expected = run_ranks(1, whole, folder, timeout_s=120)[0]
    assert peak > 0.9 * size
    ranks = run_ranks(4, load, plan, folder, tmp_path, timeout_s=200)
    print(str(plan), size // MIB, [[number // MIB for number in numbers] for numbers, _ in ranks])
    assert sum(numbers[0] for numbers, _ in ranks) == size
    for (mine, largest, built, trained), _ in ranks:
        assert mine < 0.5 * size
        assert built < mine + 2 * largest + OVERHEAD
        assert plan.shard > 1 or trained < 0.6 * 2 * size  # weights and gradients, and what a step computes with
    for name, total in expected.items():
        assert sum(sums.get(name, 0.0) for _, sums in ranks) == pytest.approx(total, rel=1e-9, abs=1e-6), name
