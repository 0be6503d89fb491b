"""Write run folders with made-up events, for the tests of this folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Line = dict[str, Any]


class Story:
    """Events of a run, one after the other, on a clock that only these calls move."""

    def __init__(self, t: float = 1000.0) -> None:
        self.t = t
        self.events: list[Line] = []

    def tell(self, name: str, after: float = 0.0, **fields: Any) -> Story:
        self.t += after
        self.events.append({"t": self.t, "event": name, **fields})
        return self

    def start(self, steps: int = 4, ranks: int = 2, **fields: Any) -> Story:
        return self.tell(
            "run_started", run="r", job="j.py:job", ranks=ranks, plan=f"data={ranks}", steps=steps, **fields
        )

    def step(self, step: int, loss: float, seconds: float = 1.0, **fields: Any) -> Story:
        told = {
            "lr": 0.1,
            "samples": 8,
            "tokens": 80,
            "compute_s": 0.6,
            "comm_s": 0.2,
            "wait_s": 0.1,
            "optimizer_s": 0.05,
        }
        return self.tell("step", seconds, step=step, loss=loss, seconds=seconds, skipped=False, **(told | fields))

    def write(self, run: Path) -> Path:
        run.mkdir(parents=True, exist_ok=True)
        (run / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in self.events))
        return run
