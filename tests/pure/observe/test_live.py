"""What a run says while it goes on: deterministic plain lines, a bar on a terminal, files that grow in pieces."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from shardwise.observe.live import Display, Follow, Tail
from shardwise.observe.narrate import Narrator, log_line
from tests.pure.observe.story import Story

SHARES = "compute 60 % communicate 20 % (200.0 ms a step) wait 10 %"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(run: Path, of_steps: int | None = None) -> list[str]:
    out = io.StringIO()
    with Display(run, of_steps=of_steps, out=out) as display:
        display.poll()
    return out.getvalue().splitlines()


def test_plain_lines_of_a_run(tmp_path: Path) -> None:
    predicted = {"step_s": 0.5, "peak_bytes": 1024, "parts_s": {"communication": 0.125}}
    story = Story().start(steps=12, predicted=predicted)
    story.tell("data_ready", 1.0, seconds=1.0, facts={"tokens": 5_000_000, "vocab": 4096})
    story.tell("connected", axes=[{"axis": "data", "ranks": 2, "backend": "shm"}])
    story.tell("rank_ready", rank=1, seconds=0.1).tell("rank_ready", rank=0, seconds=0.2)
    for step in range(1, 13):
        story.step(step, 10.0 - step / 2)
    story.tell("evaluation", step=12, loss=4.0, perplexity=54.6, seconds=2.0)
    story.tell("checkpoint_saved", step=12, seconds=0.5, bytes=2048, path="p")
    story.tell("wire", rank=0, groups=[]).tell("run_finished", step=12, seconds=15.0, status="finished")
    run = story.write(tmp_path / "r")
    (run / "job.json").write_text('{"parameters": {"lr": 0.1}}')
    lines = shown(run)
    assert lines == [
        f"run         {run}",
        "job         j.py:job   lr=0.1",
        "plan        data=2   on 2 ranks",
        "predicted   500.0 ms a step (125.0 ms of it exposed communication), 1.0 KiB a rank, 12 steps in 6.0 s",
        "data        5.0 M tokens, vocab 4096   1.0 s",
        "mesh        data: 2 ranks over shm",
        "ranks       2 ready   200.0 ms",
        f"step         1/12   loss 9.500   80 tokens/s   {SHARES}   11 s left",
        f"step         6/12   loss 7.000   80 tokens/s   {SHARES}   6 s left",
        f"step        11/12   loss 4.500   80 tokens/s   {SHARES}   1 s left",
        f"step        12/12   loss 4.000   80 tokens/s   {SHARES}",
        "held out    12/12   loss 4.000   perplexity 54.6   2.0 s",
        "saved       12/12   2.0 KiB   500.0 ms",
        "finished    at step 12   15.0 s",
    ]
    assert shown(run) == lines


def test_a_resumed_run_begins_with_its_resumption(tmp_path: Path) -> None:
    story = Story().start().step(1, 9.0).tell("evaluation", step=1, loss=1.0)
    story.start().tell("resumed", step=1, path="checkpoints/x", from_ranks=3).step(2, 8.0)
    lines = shown(story.write(tmp_path / "r"))
    assert not any("held out" in line or "9.000" in line for line in lines)
    assert "resumed     at step 1 from checkpoints/x, written by 3 ranks" in lines


def test_loss_that_is_nan_and_steps_of_unknown_number_are_shown(tmp_path: Path) -> None:
    lines = shown(Story().tell("step", step=1, loss=math.nan).write(tmp_path / "r"))
    assert lines == ["step        1   loss nan"]


def test_warnings_are_lines_of_their_own(tmp_path: Path) -> None:
    story = Story().tell("warning", message="two\nlines").tell("checkpoint_damaged", path="p", why="cut")
    assert shown(story.write(tmp_path / "r")) == [
        "warning     two lines",
        "warning     checkpoint p is damaged: cut",
    ]


def test_what_rank_0_prints_from_now_on_is_shown_without_control_characters(tmp_path: Path) -> None:
    run = Story().start().write(tmp_path / "r")
    (run / "logs").mkdir()
    log = run / "logs" / "rank-0.log"
    log.write_bytes(b"from before the resumption\n")
    out = io.StringIO()
    display = Display(run, out=out)
    with log.open("ab") as file:
        file.write(b"hello\n\x1b[31mred\x1b[0m \x07bell\n 10%\r 50%\r100%\nhalf a li")
        file.flush()
        display.poll()
        file.write(b"ne\n")
    display.close()
    assert "from before" not in out.getvalue()
    assert out.getvalue().splitlines()[:3] == ["hello", "red bell", "100%"]
    assert out.getvalue().splitlines()[-1] == "half a line"


def test_a_terminal_gets_a_bar_with_the_lines_above_it(tmp_path: Path) -> None:
    story = Story().start(steps=4).step(1, 9.0).tell("warning", message="[bold]kept as it is[/bold]").step(4, 8.0)
    out = Terminal()
    with Display(story.write(tmp_path / "r"), of_steps=4, out=out) as display:
        display.poll()
    text = out.getvalue()
    assert "[bold]kept as it is[/bold]" in text
    assert "4/4" in text
    assert "loss 8.000" in text
    assert text.endswith("\n\x1b[?25h")
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1  # the cursor comes back


def test_output_that_lacks_a_character_gets_another(tmp_path: Path) -> None:
    run = Story().tell("warning", message="\u2588").write(tmp_path / "r")
    raw = io.BytesIO()
    out = io.TextIOWrapper(raw, encoding="ascii")
    with Display(run, out=out):
        pass
    assert raw.getvalue() == b"warning     ?\n"


def test_a_file_that_is_not_there_yet_is_followed_once_it_is(tmp_path: Path) -> None:
    tail = Tail(tmp_path / "events.jsonl")
    assert tail.poll() == []
    Story().start().write(tmp_path)
    assert [event["event"] for event in tail.poll()] == ["run_started"]
    assert tail.poll() == []


@settings(max_examples=60, deadline=None)
@given(st.lists(st.binary(max_size=40), max_size=8))
def test_following_gives_every_whole_line_once_however_the_file_grows(tmp_path_factory, pieces: list[bytes]) -> None:
    path = tmp_path_factory.mktemp("f") / "log"
    follow = Follow(path)
    got: list[bytes] = []
    with path.open("wb", buffering=0) as file:
        for piece in pieces:
            file.write(piece)
            got += follow.lines()
    assert got == b"".join(pieces).split(b"\n")[:-1]


@given(st.binary(max_size=60))
def test_log_lines_are_printable(line: bytes) -> None:
    assert log_line(line).isprintable()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 20), min_size=1, max_size=40))
def test_step_lines_are_at_least_five_seconds_apart_but_for_the_last(gaps: list[float]) -> None:
    narrator = Narrator("r", len(gaps))
    t, said = 0.0, []
    for step, gap in enumerate(gaps, 1):
        t += gap
        if narrator.hear({"t": t, "event": "step", "step": step, "loss": 1.0}):
            said.append(t)
    assert said[0] == gaps[0]
    assert said[-1] == t
    assert all(b - a >= 5.0 for a, b in zip(said[:-1], said[1:-1], strict=False))


def test_the_display_reads_only_what_is_new(tmp_path: Path) -> None:
    run = Story().start(steps=2).write(tmp_path / "r")
    out = io.StringIO()
    display = Display(run, out=out)
    display.poll()
    with (run / "events.jsonl").open("a") as file:
        file.write(json.dumps({"t": 5.0, "event": "step", "step": 1, "loss": 3.0}) + "\n")
    display.poll()
    display.poll()
    assert out.getvalue().count("loss 3.000") == 1
