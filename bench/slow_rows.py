"""The rows of one wire of `slow_link`: what was measured, the time to a loss that follows, and the targets."""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.curves import Curve, time_to
from bench.data_parallel import agreement
from bench.line import Message
from bench.netns import Measured, Wire
from bench.rows import Row, number, ratio, row
from bench.slow_case import SlowCase
from bench.slow_systems import BASE, LIMIT, PICKED, SYSTEMS, peers

NEAR = 1.01  # the loss to reach is the one that DDP ends with, times this
AS_GOOD = 1.05  # times DDP's loss: what ends above that is fast at something else
COMPARED = 100  # steps over which exact systems must agree; rounding drives them apart later
OFF_BY = 0.15  # a wire that is further from its nominal rate is not what its name says


@dataclass(frozen=True)
class Found:
    """Everything about one wire: seconds a step of each round, and a curve for each seed; those of `real` were trained
    over this very wire."""

    wire: Wire
    measured: Measured
    case: SlowCase
    step_s: Mapping[str, Sequence[float]]
    curves: Mapping[str, Sequence[Curve]]
    real: Collection[str]
    told: Mapping[str, Message]
    lost: Mapping[str, str]

    @property
    def title(self) -> str:
        return str(self.wire)

    @property
    def base(self) -> str | None:
        """The system that sets the target loss: DDP, or the first one that was trained."""
        trained = [name for name in self.step_s if self.curves.get(name)]
        return BASE if BASE in trained else next(iter(trained), None)

    def rates(self, name: str) -> list[float]:
        """Tokens a second of each round; 0 where it was lost."""
        return [self.case.tokens / seconds if math.isfinite(seconds) else 0.0 for seconds in self.step_s[name]]


def rows_of(found: Found) -> list[Row]:
    """All rows of the wire; the wire itself comes first."""
    rows = [_wire(found)]
    for name in found.step_s:
        note = found.lost.get(name) or _chosen(found.told.get(name, {}))
        rows.append(row(found.title, name, "tokens_per_s", "1/s", "higher", found.rates(name), note=note))
    seconds = {name: _seconds(found, name) for name in found.step_s}
    rows += [_time(found, name, seconds[name]) for name in found.step_s if seconds[name]]
    rows += [_loss(found, name) for name in found.step_s if found.curves.get(name)]
    return [*rows, *_waiting(found), *_speed_ratios(found), *_time_ratio(found, seconds), *_loss_ratios(found)]


def _chosen(told: Message) -> str | None:
    """What `sync=auto` says of its choice, and of giving it up; and whether its turns were too short for a check."""
    found = [str(told[event]["why"]) for event in ("sync_chosen", "sync_given_up") if event in told]
    if "unchecked" in told:
        found.append(f"Timed without the exact step that checks it every {told['unchecked']} steps.")
    return " ".join(found) or None


def _wire(found: Found) -> Row:
    asked, got = found.wire.rate_mbit, found.measured.mbit_per_s
    note = f"{found.measured.round_trip_ms:.3g} ms round trip"
    if asked and abs(got / asked - 1) > OFF_BY:
        note += f"; not the {asked} Mbit/s that were asked for"
    return row(found.title, "limit", "bandwidth", "Mbit/s", "higher", [got], note=note)


def _seconds(found: Found, name: str) -> list[float]:
    """Seconds to the target loss, one for each seed; infinite where it was not reached."""
    if found.base is None:
        return []
    targets = [NEAR * curve.last for curve in found.curves[found.base]]
    both = list(zip(found.curves.get(name, ()), targets, strict=False))
    if name in found.real:
        return [curve.seconds_to(target) for curve, target in both]
    step_s, start = statistics.median(found.step_s[name]), SYSTEMS[name].start
    whole_s = statistics.median(found.step_s.get(BASE, [step_s]))
    return [time_to(curve.steps_to(target), step_s, start=start, start_step_s=whole_s) for curve, target in both]


def _time(found: Found, name: str, seconds: Sequence[float]) -> Row:
    assert found.base is not None
    target = NEAR * found.curves[found.base][0].last
    curve = found.curves[name][0]
    if name in found.real:
        how = f"trained over this link, {number(curve.steps_to(target))} steps"
    else:
        how = f"{number(curve.steps_to(target))} steps x {number(1e3 * statistics.median(found.step_s[name]))} ms"
    note = f"to a loss of {target:.4f}: {how} (seed 1)"
    return row(found.title, name, "time_to_loss", "s", "lower", seconds, note=note)


def _loss(found: Found, name: str) -> Row:
    curves = found.curves[name]
    more: dict[str, Any] = {"first_loss": curves[0].training[0], "note": "trained over this link"}
    if name not in found.real:
        more["note"] = None
        if SYSTEMS[name].exact and found.base:
            both = [each[0].training[:COMPARED] for each in (curves, found.curves[found.base])]
            more |= agreement(*both, found.case.precision) | {"compared_with": found.base}
            more["note"] = None if more["agrees"] else f"losses differ from {found.base}'s"
    values = [curve.last for curve in curves]
    return row(found.title, name, "loss_at_equal_samples", "nats", "lower", values, **more)


def _waiting(found: Found) -> list[Row]:
    """The share of a DDP step in which its core has nothing to compute."""
    if not {BASE, LIMIT} <= found.step_s.keys():
        return []
    both = zip(found.step_s[BASE], found.step_s[LIMIT], strict=True)
    shares = [1 - alone / together for together, alone in both if math.isfinite(alone)]
    target = ">= 0.92" if found.wire == Wire(100) else None
    return [row(found.title, BASE, "waiting_share", "", "lower", shares, target=target)]


def _as_good(found: Found) -> list[str]:
    """The others that end near DDP's loss: whoever seldom meets is as fast as one that never does."""
    curves = found.curves
    names = peers(list(found.step_s))
    if found.base is None:
        return names
    most = AS_GOOD * curves[found.base][0].last
    return [name for name in names if not curves.get(name) or curves[name][0].last <= most]


def _fastest(found: Found, names: Sequence[str]) -> str:
    return max(names, key=lambda name: statistics.median(found.rates(name)), default=BASE)


def _speed_ratios(found: Found) -> list[Row]:
    """Tokens a second: all to DDP's, ours to the limit, ours to the fastest of the others and of those as good."""
    pairs: list[tuple[str, str, str | None]] = [
        (name, BASE, _never_slower(found.wire, name)) for name in found.step_s if name not in (BASE, LIMIT)
    ]
    pairs += [(name, LIMIT, _near_limit(found.wire, name)) for name in found.step_s if name.startswith("shardwise")]
    target = _best_other(found.wire)
    fastest = [_fastest(found, names) for names in (peers(list(found.step_s)), _as_good(found))]
    for best in dict.fromkeys(fastest):
        if best != BASE:
            pairs.append((PICKED, best, target))
        elif target:
            pairs = [(name, base, target if (name, base) == (PICKED, BASE) else told) for name, base, told in pairs]
    return [
        ratio(found.title, name, base, found.rates(name), found.rates(base), better="higher", target=target)
        for name, base, target in pairs
        if name in found.step_s and base in found.step_s
    ]


def _time_ratio(found: Found, seconds: Mapping[str, Sequence[float]]) -> list[Row]:
    """Our time to the loss against that of the best of the others, with the first seed, which all were trained with."""
    others = {name: seconds[name][:1] for name in peers(list(seconds)) if seconds[name]}
    if not others or not seconds.get(PICKED):
        return []
    best = min(others, key=lambda name: statistics.median(others[name]))
    slow = found.wire.rate_mbit == 10
    found_ratio = ratio(
        found.title, PICKED, best, seconds[PICKED][:1], others[best], target="<= 0.5" if slow else "<= 1.0"
    )
    return [found_ratio | {"metric": f"time_ratio_to_{best}"}]


def _loss_ratios(found: Found) -> list[Row]:
    """The loss at equal samples against DDP's, seed by seed."""
    base = found.base
    if base != BASE:
        return []
    theirs = [curve.last for curve in found.curves[BASE]]
    return [
        ratio(
            found.title,
            name,
            BASE,
            [curve.last for curve in found.curves[name]],
            theirs,
            target="<= 1.01" if name == PICKED else None,
        )
        | {"metric": f"loss_ratio_to_{BASE}"}
        for name in found.step_s
        if name != BASE and found.curves.get(name)
    ]


def _never_slower(wire: Wire, name: str) -> str | None:
    fast = wire.rate_mbit is None or wire.rate_mbit >= 1000
    return ">= 1.0" if fast and name in ("shardwise", PICKED) else None


def _near_limit(wire: Wire, name: str) -> str | None:
    return ">= 0.9" if wire.rate_mbit == 100 and name == PICKED else None


def _best_other(wire: Wire) -> str:
    return ">= 2.0" if wire.rate_mbit == 10 else ">= 1.0"
