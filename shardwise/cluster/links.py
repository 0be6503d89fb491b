"""What `shardwise cluster calibrate` measured on this machine, kept for later runs, and as a `Cluster` of its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
from msgspec import structs

from shardwise.cluster.probe import default_cache
from shardwise.errors import ClusterError, SpecError
from shardwise.spec.cluster import TRANSPORTS, Calibration, Cluster, Link, Node, typical_link
from shardwise.spec.files import write_whole

FILE = "links.json"  # beside the measured speeds
_Kept = dict[str, tuple[Calibration, ...]]


def kept(machine: str, backend: str, *, cache: Path | None = None) -> tuple[Calibration, ...]:
    """What ranks measured over `backend` on `machine` (`probe.machine_key`), one for each number of ranks."""
    return tuple(found for found in _read(_file(cache)).get(machine, ()) if found.backend == backend)


def keep(machine: str, calibration: Calibration, *, cache: Path | None = None) -> Path:
    """Add to what is kept, in place of the same backend's and number of ranks'. Raises ClusterError."""
    file = _file(cache)
    known = _read(file)
    same = (calibration.backend, calibration.ranks)
    others = tuple(old for old in known.get(machine, ()) if (old.backend, old.ranks) != same)
    known[machine] = tuple(sorted((*others, calibration), key=lambda one: (one.backend, one.ranks)))
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, msgspec.json.format(msgspec.json.encode(known), indent=1) + b"\n")
    except OSError as error:
        raise ClusterError(
            f"cannot keep the measured links in {file}: {error.strerror}. Write them elsewhere with --out FILE."
        ) from None
    return file


def link_of(calibrations: Sequence[Calibration], backend: str) -> Link:
    """The link between two devices of a node: as measured by the most ranks, else roughly the transport's."""
    widest = max((found for found in calibrations if found.pairs), key=lambda one: one.ranks, default=None)
    return (typical_link(widest.pairs) if widest else None) or TRANSPORTS[backend].link


def cluster_of(nodes: Sequence[Node], calibration: Calibration) -> Cluster:
    """The machines of ranks whose nodes are `nodes`, in rank order, with the links that they measured.

    Ranks with a node of the same name share it.
    """
    names = [node.name for node in nodes]
    inside = [pair for pair in calibration.pairs if names[pair.source] == names[pair.target]]
    across = [pair for pair in calibration.pairs if names[pair.source] != names[pair.target]]
    unlike: dict[str, Node] = {}
    for node in nodes:
        own = typical_link([pair for pair in inside if names[pair.source] == node.name])
        unlike.setdefault(node.name, structs.replace(node, link=own or node.link))
    return Cluster(
        nodes=tuple(unlike.values()),
        between=typical_link(across) or Cluster(nodes=tuple(nodes[:1])).between,
        calibrations=(calibration,),
    )


def _file(cache: Path | None) -> Path:
    return (cache or default_cache()).with_name(FILE)


def _read(file: Path) -> _Kept:
    """What was kept before; a file that is missing or not ours is as good as empty."""
    try:
        return msgspec.json.decode(file.read_bytes(), type=_Kept)
    except (OSError, msgspec.DecodeError, SpecError):
        return {}
