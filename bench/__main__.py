"""`python -m bench`: list the benchmarks, or run one."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

from bench import machine
from bench.options import Options
from bench.rounds import Lost
from bench.rows import Row, of_another, other_cases, result, table, write

BENCHMARKS = {
    "data_parallel": "seconds a training step, 2 ranks, against DDP, four frameworks and a bare barrier",
    "buckets": "seconds a training step by the size of gradient buckets, 2 ranks, shared memory and gloo",
    "startup": "seconds from the shell to the end of step 1, against a bare script, torchrun and accelerate launch",
    "collectives": "seconds a collective between ranks of one host, against gloo and OpenMPI, 2 and 4 ranks",
    "slow_link": "tokens a second and seconds to a loss over links of 10 Mbit/s and up, against DDP and its hooks",
    "compression": "held-out loss, bytes and computing of compressed gradients, 2 ranks, against an all-reduce",
    "param_server": "seconds a step with parameter servers, and the fast workers' rate beside one that is slowed 4 x",
    "pipeline": "the bubble of each schedule on 2 and 4 ranks, and seconds a step against torch's and DeepSpeed's",
    "memory": "peak bytes of each feature that saves memory, and a GPT of 1 billion parameters in 10 GB",
    "tensor": "seconds a step of layers split over 2 ranks, against DTensor over gloo and one process",
    "loader": "tokens a second of packed text from disk, and the memory that a corpus of 2 GB takes",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0 when the benchmark ran, whatever its figures say."""
    parsed = _parser().parse_args(arguments)
    if parsed.name is None:
        print("\n".join(f"{name:<16}{text}" for name, text in BENCHMARKS.items()))
        return 0
    signal.signal(signal.SIGTERM, _interrupt)
    about = machine.describe()
    print(machine.in_words(about), flush=True)
    options = Options(
        quick=parsed.quick,
        only=_words(parsed.only),
        cases=_words(parsed.cases),
        rounds=parsed.rounds,
        device=parsed.device,
        run=parsed.run,
        keep=lambda rows: _keep(parsed, about, rows),
    )
    run: Callable[[Options], list[Row]] = import_module(f"bench.{parsed.name}").run
    try:
        rows = run(options)
    except Lost as lost:
        print(f"bench {parsed.name} could not run: {lost}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"bench {parsed.name} was interrupted; its systems are ended.", file=sys.stderr)
        return 130
    print(table(rows))
    if parsed.json and not _write(parsed, about, rows, others=bool(options.cases)):
        print(f"Nothing was measured; {parsed.json} is left as it is.", file=sys.stderr)
    return 0


def _keep(parsed: argparse.Namespace, about: dict[str, Any], rows: list[Row]) -> None:
    """Write the rows of a run that goes on, unless --json has the whole result of another machine."""
    if parsed.json and not of_another(parsed.json, about):
        _write(parsed, about, rows, others=True)


def _write(parsed: argparse.Namespace, about: dict[str, Any], rows: list[Row], *, others: bool) -> bool:
    """Write the rows to --json, with the `others` cases that it has; False where none was measured."""
    if parsed.json is None or all("missing" in row for row in rows):
        return False
    kept = other_cases(parsed.json, rows, about) if others else []
    write(parsed.json, result(parsed.name, about, [*kept, *rows], quick=parsed.quick))
    return True


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("name", nargs="?", choices=list(BENCHMARKS), help="the benchmark; without it, they are listed")
    parser.add_argument("--quick", action="store_true", help="one case, few peers, 3 rounds, within 60 s")
    parser.add_argument("--json", metavar="FILE", help="write the result there")
    parser.add_argument("--only", metavar="SYSTEM,...", help="run these systems only")
    parser.add_argument(
        "--cases",
        metavar="WORD,...",
        help="run the cases with one of these words in their name; the others of --json are kept",
    )
    parser.add_argument("--rounds", type=int, help="instead of the benchmark's own number")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--run", metavar="FOLDER", help="loader: the run whose waiting share is read (runs/latest)")
    return parser


def _words(text: str | None) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip()) if text else ()


def _interrupt(number: int, frame: Any) -> None:
    """SIGTERM ends the run as Ctrl-C does, so that every system is ended too."""
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
