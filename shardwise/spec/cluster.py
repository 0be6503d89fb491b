"""`Cluster`: the machines as a value: nodes of devices, and the links between them. Unlike devices are normal."""

from __future__ import annotations

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
    """Nodes and the link between any two of them (`between`; unused with one node)."""

    nodes: tuple[Node, ...]
    between: Link = Link(latency_s=50e-6, bandwidth=1.25e9)

    def __post_init__(self) -> None:
        if not self.devices:
            raise SpecError("the cluster has no device. Give it at least one node with one device.")

    @property
    def devices(self) -> tuple[Device, ...]:
        """All devices in rank order: node after node."""
        return tuple(device for node in self.nodes for device in node.devices)
