"""Whole runs in real processes: ranks agree with one process, a killed run goes on, and what is kept is right."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from shardwise import events
from shardwise.errors import ClusterError, NonFiniteLoss, RunError
from shardwise.train import api

Train = Callable[..., Any]


def losses(run: Path) -> list[float]:
    return [e["loss"] for e in events.read(run / "events.jsonl") if e["event"] == "step"]


def named(run: Path, name: str) -> list[dict[str, Any]]:
    return [e for e in events.read(run / "events.jsonl") if e["event"] == name]


def weights(run: Path) -> dict[str, torch.Tensor]:
    from shardwise.train import use
    from shardwise.train.folder import RunFolder

    folder = RunFolder(run)
    return dict(use.load_module(folder, use.load_job(folder), "latest").state_dict())


def goes_on(before: str, after: str, trained: Train, tmp_path: Path) -> Any:
    """A run that was killed under one plan goes on under another as if nothing had happened; the run that went on."""
    flag = str(tmp_path / "killed")
    whole = trained(plan="data=1")
    with pytest.raises(ClusterError):
        trained(plan=before, die_at=7, flag=flag)
    went_on = trained(plan=after, resume="latest")
    assert named(went_on.path, "resumed")[0]["step"] == 4
    assert losses(went_on.path)[-8:] == pytest.approx(losses(whole.path)[4:], rel=1e-5)
    for name, tensor in weights(whole.path).items():
        torch.testing.assert_close(weights(went_on.path)[name], tensor, rtol=1e-4, atol=1e-6)
    return went_on


def test_two_ranks_train_like_one(trained: Train) -> None:
    one, two = trained(plan="data=1"), trained(plan="data=2")
    assert one.status == two.status == "finished"
    assert len(losses(one.path)) == 12
    assert losses(two.path) == pytest.approx(losses(one.path), rel=1e-5)
    for name, tensor in weights(one.path).items():
        torch.testing.assert_close(weights(two.path)[name], tensor, rtol=1e-4, atol=1e-6)
    assert losses(one.path)[-1] < losses(one.path)[0]


def test_a_batch_that_ranks_do_not_divide_weighs_right(trained: Train) -> None:
    one, two = trained(plan="data=1", batch=13, steps=6), trained(plan="data=2,microbatches=2", batch=13, steps=6)
    assert losses(two.path) == pytest.approx(losses(one.path), rel=1e-5)
    assert all(e["weight"] == 13 for e in named(two.path, "step"))


def test_exact_gives_the_same_bits_on_one_and_two_ranks_and_through_a_kill(trained: Train, tmp_path: Path) -> None:
    flag = str(tmp_path / "killed")
    one = trained(plan="data=1,exact=true", dropout=0.3)
    two = trained(plan="data=2,exact=true", dropout=0.3)
    with pytest.raises(ClusterError, match="SIGKILL"):
        trained(plan="data=2,exact=true", dropout=0.3, die_at=6, flag=flag)
    went_on = trained(plan="data=1", resume="latest")
    assert [x.hex() for x in losses(two.path)] == [x.hex() for x in losses(one.path)]
    by_step = {e["step"]: e["loss"].hex() for e in named(went_on.path, "step")}
    assert [by_step[step] for step in range(1, 13)] == [x.hex() for x in losses(one.path)]
    for name, tensor in weights(one.path).items():
        assert torch.equal(weights(two.path)[name], tensor), name
        assert torch.equal(weights(went_on.path)[name], tensor), name


def test_a_killed_run_goes_on_from_its_last_checkpoint_on_another_number_of_ranks(
    trained: Train, tmp_path: Path
) -> None:
    flag = str(tmp_path / "killed")
    whole = trained(plan="data=1")
    with pytest.raises(ClusterError) as caught:
        trained(plan="data=1", die_at=7, flag=flag)
    assert "rank 0" in str(caught.value)
    went_on = trained(plan="data=2", resume="latest")
    (resumed,) = named(went_on.path, "resumed")
    assert (resumed["step"], resumed["from_ranks"]) == (4, 1)
    steps = [e["step"] for e in named(went_on.path, "step")]
    assert steps == [*range(1, 7), *range(5, 13)] or steps == [*range(1, 8), *range(5, 13)]
    assert losses(went_on.path)[-8:] == pytest.approx(losses(whole.path)[4:], rel=1e-5)


def test_resuming_a_changed_job_is_refused_with_a_diff(trained: Train, tmp_path: Path) -> None:
    trained(steps=4)
    file = tmp_path / "small.py"
    with pytest.raises(RunError, match="steps = 4"):
        trained(steps=5, resume="latest")
    file.write_text(file.read_text().replace("lr=0.01", "lr=0.02"))
    with pytest.raises(RunError, match=r"\+.*lr=0\.02"):
        trained(resume="latest")


def test_a_finished_run_resumed_does_nothing_more(trained: Train) -> None:
    first = trained(steps=4)
    again = trained(resume="latest")
    assert again.path.resolve() == first.path.resolve()
    assert len(losses(first.path)) == 4


def test_every_train_opens_a_new_run_and_keeps_its_job(trained: Train, tmp_path: Path) -> None:
    first, second = trained(steps=2), trained(steps=2)
    assert first.path != second.path
    assert (first.path / "code" / "small.py").read_text() == (tmp_path / "small.py").read_text()
    (tmp_path / "small.py").write_text("raise SystemExit('the original is not what is used later')")
    assert api.evaluate(first.path)["loss"] == pytest.approx(api.evaluate(second.path)["loss"])


def test_a_loss_that_is_not_a_number_stops_before_anything_changes(trained: Train, tmp_path: Path) -> None:
    with pytest.raises(NonFiniteLoss) as caught:
        trained(plan="data=2", nan_at=6)
    said = str(caught.value)
    assert "step 6" in said
    assert "step-00000004" in said
    assert "on_nan='skip'" in said
    (run,) = [p for p in (tmp_path / "runs").iterdir() if not p.is_symlink()]
    batch = {s for e in named(run, "non_finite") for s in e["samples"]}
    assert len(batch) == 16, "the samples of the whole global batch are in the record"
    assert all(torch.isfinite(t).all() for t in weights(run).values())


def test_steps_that_are_not_finite_are_skipped_when_the_job_says_so(trained: Train) -> None:
    run = trained(nan_at=6, on_nan="skip", steps=8, plan="data=1").path
    skipped = [e["skipped"] for e in named(run, "step")]
    assert skipped == [False] * 5 + [True] * 3
    assert all(torch.isfinite(t).all() for t in weights(run).values())


def test_evaluation_metrics_and_early_stop(trained: Train) -> None:
    run = trained(steps=40, eval_every=2, patience=2, plan="data=2").path  # a falling loss counts as getting worse
    found = named(run, "evaluation")
    assert {"loss", "accuracy"} <= set(found[0])
    (stopped,) = named(run, "early_stop")
    assert (stopped["step"], stopped["best_step"]) == (6, 2)
    assert len(losses(run)) == 6


def test_the_same_metrics_on_one_rank_and_from_the_checkpoint(trained: Train) -> None:
    two = trained(plan="data=2")
    last = named(two.path, "evaluation")[-1]
    found = api.evaluate(two.path)
    assert found["loss"] == pytest.approx(last["loss"], rel=1e-5)
    assert found["accuracy"] == pytest.approx(last["accuracy"])


def test_predicted_and_measured_are_both_there(trained: Train) -> None:
    run = trained(plan="data=2")
    (started,) = named(run.path, "run_started")
    assert started["predicted"]["step_s"] > 0
    assert {e["rank"] for e in named(run.path, "memory")} == {0, 1}
    step = named(run.path, "step")[-1]
    parts = step["compute_s"] + step["comm_s"] + step["optimizer_s"] + step["wait_s"]
    assert 0 < parts <= step["seconds"] * 1.05


def test_a_tracker_gets_the_events(trained: Train) -> None:
    pytest.importorskip("tensorboard")
    run = trained(log="tensorboard", steps=4).path
    assert list(run.rglob("events.out.tfevents.*"))


def test_export_gives_the_weights(trained: Train, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    run = trained(steps=4).path
    out = api.export(run, to="safetensors", out=tmp_path / "out")
    exported = load_file(out / "model.safetensors")
    assert exported.keys() == weights(run).keys()
    assert all(torch.equal(exported[name], tensor) for name, tensor in weights(run).items())


def test_show_writes_a_report_that_needs_no_network(trained: Train) -> None:
    run = trained(steps=4).path
    summary = api.show(run)
    assert summary.step == 4
    page = (run / "report.html").read_text()
    assert "<svg" in page
    assert "://" not in page.replace("http://www.w3.org/", "")


def test_perplexity_is_the_exponential_of_the_loss(trained: Train, tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    for i in range(20):
        (tmp_path / "text" / f"{i}.txt").write_text(f"the {i} cats sat on the {i % 3} mats\n" * 40)
    job = tmp_path / "words.py"
    job.write_text(
        "import shardwise as sw\nfrom shardwise.models.gpt import GPT\n"
        "def job() -> sw.TrainJob:\n"
        "    return sw.TrainJob(model=lambda: GPT(layers=1, width=16, heads=2, vocab=257, context=16),\n"
        f"        loss=sw.next_token_loss, data=sw.text({str(tmp_path / 'text')!r}, tokenizer='bytes', vocab=257,\n"
        "        context=16, held_out=0.2), optimizer=sw.adamw(lr=1e-2), global_batch=8, steps=6, eval_every=2)\n"
    )
    exact = [losses(trained(job, plan=f"data={ranks},exact=true").path) for ranks in (1, 2)]
    assert [x.hex() for x in exact[0]] == [x.hex() for x in exact[1]], "evaluating in between changes no bit"
    run = trained(job, plan="data=2").path
    last = named(run, "evaluation")[-1]
    assert last["perplexity"] == pytest.approx(math.exp(last["loss"]))
    assert "unigram_perplexity" in named(run, "data_ready")[0]["facts"]
    pieces = list(api.sample(run, "the ", tokens=8, seed=1))
    assert pieces
    assert pieces == list(api.sample(run, "the ", tokens=8, seed=1))
