"""`Cluster`: the machines as a value: nodes of devices, and the links between them. Unlike devices are normal."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from itertools import pairwise

from msgspec import Struct, field

from shardwise.errors import SpecError


def _not_negative(owner: str, **values: float) -> None:
    for name, value in values.items():
        if not value >= 0:
            raise SpecError(f"{name} of {owner} is {value}; it cannot be negative. Correct it in the cluster file.")


class Device(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One device. `peak_flops` maps a dtype name (`float32`) to FLOP/s; sizes in bytes, rates in bytes/s."""

    kind: str
    memory_bytes: int
    peak_flops: dict[str, float] = field(default_factory=dict)
    memory_bandwidth: float = 0.0
    measured: bool = False

    def __post_init__(self) -> None:
        _not_negative(f"device '{self.kind}'", memory_bytes=self.memory_bytes, memory_bandwidth=self.memory_bandwidth)
        _not_negative(f"device '{self.kind}'", **{f"peak_flops.{k}": v for k, v in self.peak_flops.items()})


class Link(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A path between two devices: `latency_s` seconds and `bandwidth` bytes/s, one way."""

    latency_s: float
    bandwidth: float
    measured: bool = False

    def __post_init__(self) -> None:
        _not_negative("link", latency_s=self.latency_s, bandwidth=self.bandwidth)


class Transport(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a backend usually reaches between two ranks, and what an exchange takes from computing meanwhile.

    A message that travels while a rank computes costs that rank `wake_s` seconds (another thread is woken on a core
    that is busy, and both lose their caches) and its bytes at `work_bandwidth` bytes/s.
    """

    link: Link
    wake_s: float
    work_bandwidth: float

    def work_s(self, nbytes: int) -> float:
        """Seconds of computing that a message of `nbytes` costs."""
        return self.wake_s + nbytes / self.work_bandwidth


# Rough, for where nothing was measured; the costs are those of `bench buckets` on two ranks that fill two cores.
TRANSPORTS = {
    "shm": Transport(link=Link(latency_s=20e-6, bandwidth=10e9), wake_s=0.2e-3, work_bandwidth=12e9),
    "shm-torch": Transport(link=Link(latency_s=0.1e-3, bandwidth=5e9), wake_s=0.5e-3, work_bandwidth=6e9),
    "gloo": Transport(link=Link(latency_s=0.3e-3, bandwidth=0.9e9), wake_s=1.5e-3, work_bandwidth=1.2e9),  # loopback
    "nccl": Transport(link=Link(latency_s=20e-6, bandwidth=20e9), wake_s=0.0, work_bandwidth=1e15),  # PCIe 4.0 x16
}


class Pair(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The measured link from rank `source` to rank `target`."""

    source: int
    target: int
    link: Link

    def __post_init__(self) -> None:
        _not_negative("pair", source=self.source, target=self.target)


class Calibration(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What `ranks` ranks measured between each other over `backend` (`shm`, `gloo`, `nccl`).

    `pairs` has both directions of every two ranks. `collectives` maps an operation (`all_reduce`) to `(bytes, seconds)`
    by rising bytes; they are those of the whole tensor, also where each rank has or gets a piece of it.
    """

    backend: str
    ranks: int
    pairs: tuple[Pair, ...] = ()
    collectives: dict[str, tuple[tuple[int, float], ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for operation, rows in self.collectives.items():
            _not_negative(f"collective '{operation}'", **{f"{size} bytes": seconds for size, seconds in rows})
            if not all(before[0] < after[0] for before, after in pairwise(rows)):
                raise SpecError(f"the sizes of collective '{operation}' do not rise. Correct them in the cluster file.")

    def seconds(self, operation: str, nbytes: int) -> float | None:
        """How long `operation` takes for `nbytes`: on the line between the two nearest sizes; None if not measured.

        Below the smallest size it is that of the smallest; above the largest it goes on as between the last two.
        """
        rows = self.collectives.get(operation, ())
        if not rows:
            return None
        if nbytes <= rows[0][0]:
            return rows[0][1]
        if len(rows) == 1:
            return rows[0][1] * nbytes / max(1, rows[0][0])
        after = next((i for i, (size, _) in enumerate(rows) if size >= nbytes), len(rows) - 1)
        (size, low), (larger, high) = rows[after - 1], rows[after]
        return low + max(0.0, high - low) * (nbytes - size) / (larger - size)


def typical_link(pairs: Sequence[Pair]) -> Link | None:
    """The median latency and bandwidth of `pairs`; None without any."""
    if not pairs:
        return None
    return Link(
        latency_s=statistics.median(pair.link.latency_s for pair in pairs),
        bandwidth=statistics.median(pair.link.bandwidth for pair in pairs),
        measured=True,
    )


class Node(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One host: its devices, the link between any two of them, its cores and memory."""

    devices: tuple[Device, ...]
    link: Link
    name: str = "localhost"
    cores: int = 1
    memory_bytes: int = 0

    def __post_init__(self) -> None:
        _not_negative(f"node '{self.name}'", cores=self.cores, memory_bytes=self.memory_bytes)


class Cluster(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Nodes, the link between any two of them (`between`; unused with one node), and what their ranks measured."""

    nodes: tuple[Node, ...]
    between: Link = Link(latency_s=50e-6, bandwidth=1.25e9)
    calibrations: tuple[Calibration, ...] = ()

    def __post_init__(self) -> None:
        if not self.devices:
            raise SpecError("the cluster has no device. Give it at least one node with one device.")

    @property
    def devices(self) -> tuple[Device, ...]:
        """All devices in rank order: node after node."""
        return tuple(device for node in self.nodes for device in node.devices)

    @property
    def link(self) -> Link:
        """The slowest link that ranks on all devices need: between nodes where there are several, else the node's."""
        return self.nodes[0].link if len(self.nodes) == 1 else self.between

    def calibration(self, ranks: int) -> Calibration | None:
        """What `ranks` ranks measured here, or the number of ranks nearest to it; None where nobody measured."""
        return min(self.calibrations, key=lambda found: abs(found.ranks - ranks), default=None)

    @property
    def transport(self) -> str:
        """The backend that ranks on all devices need: as it was measured, else what such machines usually have."""
        if self.calibrations:
            return self.calibrations[0].backend
        if not self.devices[0].kind.startswith("cpu"):
            return "nccl"
        return "shm" if len(self.nodes) == 1 else "gloo"
