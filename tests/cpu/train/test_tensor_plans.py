"""Jobs under a tensor axis: splits on which all ranks agree, and a model of which no rank ever has the whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from msgspec import structs
from test_parts_in_memory import MIB, OVERHEAD, HighWater, job, prepared, weights, whole

import shardwise as sw
from shardwise.errors import JobError
from shardwise.plan.splits import splits_text
from shardwise.spec.layout import boxes
from shardwise.spec.plan import Plan
from shardwise.train.run import Trainer, build_replica
from shardwise.train.splits import found_splits, split_here
from shardwise.train.state import Saver
from tests.ranks import Rank, run_ranks

__all__ = ["weights"]  # a fixture


def tiny() -> sw.TrainJob:
    return job(None, layers=2, width=64)


def splits(rank: Rank, cache: Path, plan: Plan) -> tuple[Plan, list[str]]:
    """Where rank 0 alone looks at a model."""
    built: list[str] = []
    described = tiny()

    def model() -> torch.nn.Module:
        built.append("model")
        return described.model()

    mesh = rank.mesh(plan)
    found = split_here(structs.replace(described, model=model), plan, mesh, prepared(described, cache))
    return found, built


def test_one_rank_finds_the_splits_and_all_obey(tmp_path: Path) -> None:
    (first, built), (second, others) = run_ranks(2, splits, tmp_path, Plan(tensor=2))
    assert first == second
    assert first.splits["model.layers.*.mlp.down_proj.weight"].how == "row"
    assert built
    assert not others


def failing(rank: Rank, cache: Path) -> str:
    described = tiny()

    def model() -> Any:
        raise ValueError("no such width")

    mesh = rank.mesh(Plan(tensor=2))
    with pytest.raises(JobError) as caught:
        split_here(structs.replace(described, model=model), Plan(tensor=2), mesh, prepared(described, cache))
    return str(caught.value)


def test_a_rank_that_cannot_search_tells_the_others_why(tmp_path: Path) -> None:
    texts = run_ranks(2, failing, tmp_path)
    assert texts[0] == texts[1]
    assert "no such width" in texts[0]


def built(rank: Rank, cache: Path, plan: Plan) -> dict[str, torch.Tensor]:
    described = tiny()
    mesh = rank.mesh(plan)
    plan = mesh.plan = split_here(described, plan, mesh, prepared(described, cache))
    replica = build_replica(described, plan, mesh)
    parts = {name: p.detach().clone() for name, p in replica.named()}
    replica.gather()
    torch.manual_seed(described.seed)
    for name, p in described.model().named_parameters():
        assert torch.equal(p, replica.module.get_parameter(name)), name
        (box,) = boxes(f"model/{name}", tuple(p.shape), plan, rank.rank)
        assert torch.equal(p[box.slices], parts[name]), name
    return parts


def test_a_rank_builds_its_part_with_the_values_of_one_process(tmp_path: Path) -> None:
    ranks = run_ranks(2, built, tmp_path, Plan(tensor=2))
    halves = [name for name, p in ranks[0].items() if p.dim() == 2]
    assert halves
    assert all(ranks[0][name].shape == ranks[1][name].shape for name in halves)


def test_what_stays_whole_is_said_with_the_reason(tmp_path: Path) -> None:
    sizes: dict[str, Any] = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, vocab_size=8000)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, num_local_experts=4)
    mixture = structs.replace(tiny(), model=lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**sizes, **heads)))
    told = found_splits(mixture, Plan(tensor=2), prepared(mixture, tmp_path))
    assert told.hows["model.layers.*.self_attn.o_proj.weight"] == "row"
    whole = told.whole.keys() - told.splits.keys()
    assert "model.layers.*.mlp.gate.weight" in whole
    assert "model.layers.*.mlp.experts.down_proj" in {**told.whole, **told.splits}
    said = splits_text(told.hows, told.whole)
    assert next(line for line in said if line.startswith("by rows: ")).startswith("by rows: model.layers.*.self_attn.o")
    assert [line for line in said if line.startswith("whole (") and "model.layers.*.mlp.gate" in line]


def load(rank: Rank, plan: Plan, folder: Path, cache: Path) -> tuple[list[int], dict[str, float]]:
    """[bytes held, at the peak of finding splits and building, at that of a step too], sums of what is held."""
    described = job(folder)
    data, mesh = prepared(described, cache), rank.mesh(plan, timeout_s=120)
    Trainer(tiny(), plan, mesh, prepared(tiny(), cache), Saver(None, mesh, tiny())).close()  # imports, first uses
    mesh.obey(plan)
    water = HighWater()
    trainer = Trainer(described, plan, mesh, data, Saver(None, mesh, described))
    built = water.bytes
    held = {name: p.detach() for name, p in trainer.replica.named()}
    sums = {name: float(p.double().sum()) for name, p in held.items()}
    trainer.train()
    trained = water.bytes
    trainer.close()
    return [sum(p.nbytes for p in held.values()), built, trained], sums


@pytest.mark.slow
@pytest.mark.parametrize("plan", [Plan(tensor=2), Plan(tensor=2, pipeline=2, microbatches=4)], ids=str)
def test_a_tensor_rank_never_has_the_whole(plan: Plan, weights: tuple[Path, int], tmp_path: Path) -> None:
    folder, size = weights
    _, expected = run_ranks(1, whole, folder, timeout_s=120)[0]
    ranks = run_ranks(plan.ranks, load, plan, folder, tmp_path, timeout_s=400)
    print(str(plan), size // MIB, [[number // MIB for number in numbers] for numbers, _ in ranks])
    largest = 8000 * 512 * 4
    for number, ((mine, built, _), _) in enumerate(ranks):
        assert mine < 0.55 * size
        assert built < (mine + 2 * largest + OVERHEAD if number else 0.9 * size)
    for name in ("lm_head.weight", "model.layers.0.mlp.down_proj.weight"):
        assert sum(sums.get(name, 0.0) for _, sums in ranks) == pytest.approx(expected[name], rel=1e-9, abs=1e-6)
