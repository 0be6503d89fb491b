"""The systems of `slow_link` as data: which program runs them, with what settings, and how often they repeat."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, replace
from typing import Any

from shardwise.errors import ShardwiseError
from shardwise.plan.support import refuse_unbuilt
from shardwise.spec.plan import build_plan, parse_plan

RANKS = 2
SOON = 3


@dataclass(frozen=True)
class System:
    """`module` is what a rank runs, `settings` are what it is told.

    `exact`: its losses must be DDP's. `start`: for that many steps it sends whole gradients, as DDP does. `period`:
    steps after which what it sends repeats. `adapts`: it looks at the link before it chooses, so its losses depend on
    the link. `whole`: it does not get over being stopped, so all its rounds are played in one go.
    """

    package: str
    install: str
    module: str
    settings: dict[str, Any]
    exact: bool = False
    start: int = 0
    period: int = 1
    adapts: bool = False
    whole: bool = False

    def briefly(self) -> System:
        """The same with its own way after three steps, which is all that is timed."""
        if "start" not in self.settings:
            return self
        return replace(self, settings=self.settings | {"start": SOON}, start=SOON)

    def absent(self) -> str | None:
        """What is missing for it to run here, or what this version of shardwise says against its plan."""
        if importlib.util.find_spec(self.package) is None:
            return self.install
        if "plan" in self.settings:
            try:
                refuse_unbuilt(build_plan(parse_plan(self.settings["plan"])))
            except ShardwiseError as error:
                return str(error)
        return None


def _ours(sync: str, *, period: int = 1, start: int = 0, exact: bool = False, adapts: bool = False) -> System:
    settings = {"plan": f"data={RANKS},{sync}", "allow": [] if exact else list(ALLOWED)}
    module = "bench.subjects.slow_link_shardwise"
    return System("shardwise", "pip install -e .", module, settings, exact, start, period, adapts)


def _torch(way: str, *, exact: bool = False, **more: Any) -> System:
    start = more.get("start", 0)
    return System("torch", "pip install torch", "bench.subjects.slow_link", {"way": way, **more}, exact, start)


AUTO = 25  # exact steps before `sync=auto` chooses
ALLOWED = ("compressed", "local")
BASE, LIMIT, PICKED = "ddp", "unsynchronised", "shardwise:auto"
MEETING = 250  # steps of hivemind between two averages: twice as long as its peers look for each other
TURNS = (  # the halves of the parameters take turns, one every second step, in 2 bits
    "sync.every=4,sync.bits=2,sync.overlap=1,sync.fragments=2,sync.outer_lr=1,sync.outer_momentum=0,"
    "sync.beta1=0.8,sync.beta2=0.99"
)
QUICK = ("shardwise", BASE, LIMIT)
SYSTEMS = {
    "shardwise": _ours("sync=all_reduce", exact=True),
    PICKED: _ours("sync=auto", start=AUTO, adapts=True),
    "shardwise:int8": _ours("sync=compressed,sync.method=int8"),
    "shardwise:local": _ours(f"sync=local,sync.method=streaming,{TURNS}", period=4),
    "shardwise:diloco": _ours("sync=local,sync.method=diloco,sync.every=50,sync.bits=8", period=50),
    BASE: _torch("ddp", exact=True),
    "ddp:fp16": _torch("fp16"),
    "ddp:powersgd": _torch("powersgd", rank=4, start=150),
    "hivemind": System(
        "hivemind",
        "pip install hivemind",
        "bench.subjects.slow_link_hivemind",
        {"every": MEETING},
        period=2 * MEETING,
        whole=True,
    ),
    LIMIT: _torch("alone"),
}


def peers(names: list[str]) -> list[str]:
    """Those that we are measured against: others' systems that train one model."""
    return [name for name in names if name != LIMIT and not name.startswith("shardwise")]
