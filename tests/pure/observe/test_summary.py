"""The numbers of a summary against what the events say, and any damage to the events."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardwise.observe import history
from shardwise.observe.html import plan_html, summary_html
from shardwise.observe.narrate import Narrator
from shardwise.observe.report import report_html
from shardwise.observe.summary import read, summarise, warning_text
from shardwise.observe.text import summary_text
from shardwise.observe.trackers import scalars
from shardwise.spec.cluster import Cluster, Device, Link, Node
from shardwise.spec.files import save
from shardwise.spec.plan import Plan, Prediction
from shardwise.spec.profile import BlockProfile, ModelProfile
from tests.pure.observe.story import Story

PREDICTED = Prediction(
    step_s=0.5,
    peak_bytes=100,
    parts_s={"forward": 0.1, "backward": 0.2, "communication": 0.1, "optimizer": 0.1, "magic": 9.0},
)
DEVICE = Device(kind="cpu", memory_bytes=1, peak_flops={"float32": 1000.0})
CLUSTER = Cluster(nodes=(Node(devices=(DEVICE, DEVICE), link=Link(latency_s=0, bandwidth=1)),))
BLOCK = BlockProfile(
    name="b", parameters=1, parameter_bytes=4, forward_flops=25.0, activation_bytes=1, boundary_bytes=1
)


def whole_run() -> Story:
    story = (
        Story().start(steps=4).tell("data_ready", 3.0, seconds=3.0, facts={"tokens": 9000, "unigram_perplexity": 60.0})
    )
    story.step(1, 5.0, seconds=9.0).step(2, 4.0).step(3, 2.0).step(4, 3.0)
    story.tell("evaluation", 2.0, step=4, loss=2.5, perplexity=12.0, accuracy=0.75, seconds=2.0)
    story.tell("checkpoint_saved", 0.5, step=4, seconds=0.5, bytes=2048, path="checkpoints/step-00000004")
    story.tell("memory", rank=0, peak_bytes=150).tell("memory", rank=0, peak_bytes=140).tell(
        "memory", rank=1, peak_bytes=120
    )
    return story.tell("run_finished", step=4, seconds=17.5, status="finished")


def test_a_whole_run_in_numbers(tmp_path: Path) -> None:
    run = whole_run().write(tmp_path / "r")
    save(Plan(data=2, predicted=PREDICTED), run / "plan.json")
    save(CLUSTER, run / "cluster.json")
    save(ModelProfile(blocks=(BLOCK,)), run / "profile.json")
    found = read(run)
    assert (found.run, found.status, found.job, found.plan, found.ranks) == ("r", "finished", "j.py:job", "data=2", 2)
    assert (found.step, found.of_steps, found.seconds, found.silent_s) == (4, 4, pytest.approx(17.5), None)
    assert (found.loss.first, found.loss.last, found.loss.best, found.loss.best_step) == (5.0, 3.0, 2.0, 3)
    assert found.loss.curve == (5.0, 4.0, 2.0, 3.0)
    assert found.evaluation is not None
    assert (found.evaluation.perplexity, found.evaluation.metrics) == (12.0, {"accuracy": 0.75})
    # the first step warms up and does not count: 3 steps of 8 samples, 80 tokens and 1 s
    assert (found.rate.step_s, found.rate.samples_s, found.rate.tokens_s) == (1.0, 8.0, 80.0)
    assert found.rate.flop_share == pytest.approx(3 * 25.0 * 8.0 / 2000.0)
    assert found.peak_bytes == {0: 150, 1: 120}
    assert sum(found.time.values()) == pytest.approx(1.0)
    assert found.time["compute"] == pytest.approx(4 * 0.6 / 12.0)
    assert found.run_seconds == pytest.approx({"data": 3, "steps": 12, "evaluation": 2, "checkpoints": 0.5, "other": 0})
    compared = {row.name: (row.predicted, row.measured) for row in found.compared}
    assert compared == {
        "step": (0.5, 1.0),
        "compute": (pytest.approx(0.3), 0.6),
        "communicate": (0.1, 0.2),
        "optimizer": (0.1, 0.05),
        "peak memory": (100, 150),
    }


def test_the_text_of_a_whole_run(tmp_path: Path) -> None:
    found = read(whole_run().write(tmp_path / "r"))
    text = summary_text(found)
    assert "finished, 4 steps in 17.5 s" in text
    assert "loss 2.500, perplexity 12.0 against unigram 60.0 (5.0x), accuracy 0.75 (step 4)" in text
    assert "5.000 at first, 3.000 at step 4, best 2.000 at step 3" in text
    assert "checkpoints/step-00000004, 2.0 KiB in 500.0 ms, 1 save in all" in text
    assert text.isascii()
    assert summary_text(found, blocks=True).count("\u2588") == 1  # the first loss is the highest


def test_steps_that_a_resumption_took_back_do_not_count(tmp_path: Path) -> None:
    story = Story().start(steps=4).step(1, 5.0).step(2, 4.0).step(3, 1.0)
    story.tell("resumed", 100.0, step=2, path="x", from_ranks=1).step(3, 3.0)
    found = summarise(tmp_path, story.events)
    assert (found.step, found.loss.last, found.loss.best) == (3, 3.0, 3.0)
    assert found.resumed == ("at step 2, from 1 rank",)


def test_the_pause_before_a_resumption_is_no_part_of_the_time(tmp_path: Path) -> None:
    story = Story().start().step(1, 5.0).tell("run_started", 1000.0).step(2, 4.0)
    assert summarise(tmp_path, story.events).seconds == pytest.approx(2.0)


def test_a_failed_run_says_why(tmp_path: Path) -> None:
    story = Story().start().step(1, math.nan).tell("non_finite", step=1, rank=0, samples=list(range(20)))
    story.tell("run_failed", kind="NonFiniteLoss", message="the loss is NaN.\nLog:\n\x1b[31mend").tell(
        "run_finished", step=1, status="failed"
    )
    found = summarise(tmp_path, story.events)
    assert (found.status, found.failure) == ("failed", "the loss is NaN.\nLog:\nend")
    assert found.warnings == ("loss or gradient not finite in step 1, samples 0, 1, 2, 3, 4, 5, 6, 7, ...",)
    assert "nan at first" in summary_text(found)
    assert "failed      the loss is NaN.\n            Log:\n            end" in summary_text(found)
    assert found.loss.best is None


def test_a_silent_run_is_running_and_says_for_how_long(tmp_path: Path) -> None:
    story = Story().start(steps=9).step(1, 5.0)
    found = summarise(tmp_path, story.events, now=story.t + 120)
    assert (found.status, found.silent_s) == ("running", 120)
    assert "running, 1 of 9 steps in 1.0 s, silent for 2 min 0 s" in summary_text(found)


def test_tokens_of_text_are_the_weight_of_its_loss(tmp_path: Path) -> None:
    told = {"tokens": None, "weight": 64}
    steps = Story().start().tell("data_ready", facts={"tokens": 1}).step(1, 1.0, **told).step(2, 1.0, **told)
    assert summarise(tmp_path, steps.events).rate.tokens_s == 64
    others = Story().start().tell("data_ready", facts={"samples": 1}).step(1, 1.0, **told).step(2, 1.0, **told)
    assert summarise(tmp_path, others.events).rate.tokens_s is None


def test_an_empty_folder_has_an_empty_summary(tmp_path: Path) -> None:
    found = read(tmp_path)
    assert (found.status, found.step, found.compared, found.evaluation) == ("empty", 0, (), None)
    assert summary_text(found).startswith("run ")


def test_a_file_of_another_version_is_left_out_with_a_warning(tmp_path: Path) -> None:
    run = whole_run().write(tmp_path / "r")
    (run / "plan.json").write_text('{"data": 2, "tensr": 1}')
    found = read(run)
    assert found.plan == "data=2"
    assert any("unknown key 'tensr'" in text for text in found.warnings)


def test_the_report_holds_the_run_and_loads_nothing(tmp_path: Path) -> None:
    run = whole_run().write(tmp_path / "r")
    found = read(run)
    page = report_html(found, history.read(run), {"parameters": {"lr": 0.1}, "hash": "abc"})
    for shown in ("accuracy", "step-00000004", "held out", "lr=0.1", "<svg", "where the run&#x27;s time went"):
        assert shown in page, shown
    assert "default-src 'none'" in page
    for loads in ("src=", "href=", "<script", "@import", "url("):
        assert loads not in page, loads


def test_nothing_of_the_user_becomes_html(tmp_path: Path) -> None:
    evil = "<img src=x onerror=alert(1)>"
    story = Story().tell("run_started", run=evil, job=evil, plan=evil, ranks=1).step(1, 1.0)
    story.tell("evaluation", step=1, loss=1.0, **{evil: 1.0}).tell("warning", message=evil)
    story.tell("checkpoint_saved", step=1, path=evil).tell("run_failed", message=evil)
    found = summarise(tmp_path, story.events, job={"parameters": {evil: evil}})
    page = report_html(found, story.events, {evil: {evil: evil}}) + summary_html(found)
    assert "<img" not in page
    assert "&lt;img" in page


def test_a_plan_as_html_shows_its_mesh_and_its_prediction() -> None:
    page = plan_html(Plan(data=2, precision="bfloat16", predicted=PREDICTED))
    assert "data 2" in page
    assert "bfloat16" in page
    assert "500.0 ms" in page
    assert "<svg" in page
    assert "one rank" in plan_html(Plan())


def test_what_auto_did_is_told() -> None:
    chosen = {"event": "sync_chosen", "word": "local", "why": "the link carries 100 Mbit/s."}
    assert warning_text(chosen) == "sync=auto: the link carries 100 Mbit/s."
    assert "went back to all_reduce: it rose" in warning_text({"event": "sync_given_up", "why": "it rose"})


NAMES = (
    "run_started",
    "data_ready",
    "rank_ready",
    "step",
    "evaluation",
    "checkpoint_saved",
    "checkpoint_damaged",
    "resumed",
    "non_finite",
    "early_stop",
    "sync_chosen",
    "sync_given_up",
    "memory",
    "run_finished",
    "run_failed",
    "warning",
    "?",
)
FIELDS = """
t step loss lr samples tokens weight seconds compute_s comm_s wait_s optimizer_s grad_norm skipped perplexity rank
peak_bytes bytes path why status message kind run job ranks plan steps predicted facts from_ranks best_step accuracy
""".split()  # noqa: SIM905 - a list of 33 strings is longer than it is clear
NUMBERS = st.one_of(st.integers(-3, 50), st.integers(), st.floats(), st.just(10**400))
VALUES: st.SearchStrategy[Any] = st.one_of(
    NUMBERS,
    st.booleans(),
    st.none(),
    st.text(max_size=8),
    st.lists(NUMBERS, max_size=3),
    st.dictionaries(
        st.sampled_from(["step_s", "peak_bytes", "tokens", "vocab", "unigram_perplexity"]), NUMBERS, max_size=3
    ),
)
EVENTS = st.lists(
    st.tuples(st.sampled_from(NAMES), st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=8)).map(
        lambda pair: {**pair[1], "event": pair[0]}
    ),
    max_size=12,
)


@settings(max_examples=150, deadline=None)
@given(EVENTS)
def test_no_events_can_break_what_is_shown(events: list[dict[str, Any]]) -> None:
    told = [json.loads(json.dumps(event)) for event in events]
    found = summarise(
        Path("r"), told, plan=Plan(predicted=PREDICTED), cluster=CLUSTER, profile=ModelProfile(blocks=(BLOCK,)), now=0.0
    )
    assert all(share >= 0 for share in found.time.values())
    assert not found.time or sum(found.time.values()) == pytest.approx(1.0)
    assert all(line.isprintable() for line in summary_text(found, blocks=True).splitlines())
    page = report_html(found, told, {})
    assert page.count("<svg") == page.count("</svg>")
    assert not re.search(r'(points|[xy]|width)="[^"]*(nan|inf)', page)
    narrator = Narrator("r", 4)
    for event in told:
        assert all(line.isprintable() for line in narrator.hear(event))
        assert all(name and isinstance(value, float) for name, value in scalars(event).items())


@settings(max_examples=60, deadline=None)
@given(cut=st.integers(0, 5000), junk=st.binary(max_size=30))
def test_a_cut_or_altered_file_loses_only_the_lines_it_hits(tmp_path_factory: Any, cut: int, junk: bytes) -> None:
    run = whole_run().write(tmp_path_factory.mktemp("r"))
    raw = (run / "events.jsonl").read_bytes()
    (run / "events.jsonl").write_bytes(raw[: min(cut, len(raw))] + junk)
    kept = raw[: min(cut, len(raw))].count(b"\n")
    assert len(history.read(run)) in (kept, kept + 1)
    assert read(run).step <= 4
