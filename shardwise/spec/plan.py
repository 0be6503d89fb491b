"""`Plan`: how a job is split over ranks, as a value: it prints, compares, saves and is obeyed by every room."""

from __future__ import annotations

from typing import Any, Literal

from msgspec import NODEFAULT, UNSET, Struct, field, structs

from shardwise.errors import SpecError, did_you_mean
from shardwise.spec.files import convert
from shardwise.spec.sync import Sync

AXES = ("pipeline", "data", "shard", "tensor", "context", "expert")  # outermost first: neighbours share the last ones
Precision = Literal["float32", "bfloat16", "float16", "float64"]
HEADS = {"sync": "word", "recompute": "mode"}  # the field of a group that a plan string gives by the group's own name


# Dimensions that have names, wherever in a model they are: heads (indices that stay together in groups), hidden (single
# indices between two layers), and the rows of tables.
DIMENSIONS = ("@heads", "@hidden", "@vocabulary", "@experts")


class Split(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How one weight is cut over the tensor axis.

    `parts[piece * tensor + rank]` are sizes in units, of which the cut dimension is a multiple: `(4, 4, 1, 1, 1, 1)`
    is a fused query, key and value with 8, 2 and 2 heads on 2 ranks. Empty: equal parts. `experts` cuts dim 0: of a
    mixture's parameter [experts, ...] each rank has its experts' rows, and of one that belongs to a single expert all
    or nothing (`parts` such as `(0, 1)`). `split` is for the names of `DIMENSIONS`.
    """

    how: Literal["column", "row", "vocabulary", "experts", "whole", "split"]
    parts: tuple[int, ...] = ()


class Stage(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Blocks `first..last` (inclusive) of one pipeline stage; `holds` are patterns of further tensors kept there."""

    first: int
    last: int
    holds: tuple[str, ...] = ()
    devices: tuple[int, ...] = ()
    share: float = 1.0


class Recompute(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which activations are computed again in backward instead of kept (Chen et al. 2016, section 4.1).

    `full`: all that is inside the module's repeated blocks; `blocks`: inside those with these numbers; `selective`:
    what is cheap to compute, so that the outputs of matrix products, convolutions and attention are kept.
    """

    mode: Literal["none", "selective", "full", "blocks"] = "none"
    blocks: tuple[int, ...] = ()


class Offload(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What lives in host memory or on disk instead of on the device: the optimizer's states (and float32 masters of
    bfloat16 parameters), and the activations that wait for backward."""

    optimizer: Literal["none", "host", "disk"] = "none"
    activations: Literal["none", "host", "disk"] = "none"


class Prediction(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the planner expects: seconds a step and bytes on the fullest device, each with its parts."""

    step_s: float
    peak_bytes: int
    parts_s: dict[str, float] = field(default_factory=dict)
    parts_bytes: dict[str, int] = field(default_factory=dict)
    limit: str = ""


class Plan(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The mesh, the cuts, the schedule, the precision and the synchronisation of one job on one cluster."""

    data: int = 1
    shard: int = 1
    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    expert: int = 1
    zero: int = 3
    sequence: bool = False  # activations between split layers are cut over the tensor axis too
    splits: dict[str, Split] = field(default_factory=dict)
    blocks: tuple[str, ...] = ()
    stages: tuple[Stage, ...] = ()
    schedule: str = "1f1b"
    microbatches: int = 1
    virtual: int = 1
    precision: Precision = "float32"
    parameters: Literal["float32", "bfloat16"] = "float32"  # what a step computes with; float32: as they are built
    master: Literal["float32", "none"] = "float32"  # what the optimizer updates; none: rounded by chance to bfloat16
    states: Literal["float32", "bfloat16", "int8"] = "float32"  # what the optimizer remembers between steps
    recompute: Recompute = Recompute()
    offload: Offload = Offload()
    sync: Sync = Sync()
    exact: bool = False
    predicted: Prediction | None = None

    def __post_init__(self) -> None:
        for name in (*AXES, "microbatches", "virtual"):
            if getattr(self, name) < 1:
                raise SpecError(f"{name}={getattr(self, name)} in the plan: it must be at least 1.")
        if any(isinstance(split, str) for split in self.splits.values()):
            splits = {k: Split(how=v) if isinstance(v, str) else v for k, v in self.splits.items()}  # type: ignore[arg-type]
            structs.force_setattr(self, "splits", splits)
        _check_dimensions(self.splits)
        if self.zero not in (1, 2, 3):
            raise SpecError(f"zero={self.zero} in the plan: it must be 1, 2 or 3 (what the shard axis shards).")
        if self.sequence and self.tensor == 1:
            raise SpecError(
                "sequence=true in the plan cuts activations over the tensor axis, which has one rank. Add tensor=2 or "
                "more."
            )
        if self.recompute.blocks and self.recompute.mode != "blocks":
            raise SpecError(
                f"recompute.blocks in the plan is for recompute=blocks, not for recompute={self.recompute.mode}."
            )
        if self.stages and len(self.stages) != self.pipeline * self.virtual:
            raise SpecError(
                f"the plan has {len(self.stages)} stages but pipeline x virtual is {self.pipeline * self.virtual}."
            )

    @property
    def ranks(self) -> int:
        """The number of ranks: the product of all axes."""
        product = 1
        for axis in AXES:
            product *= getattr(self, axis)
        return product

    @property
    def replicas(self) -> int:
        """The number of parts that the samples of a step are split into: the ranks of data and shard together."""
        return self.data * self.shard

    def coordinates(self, rank: int) -> dict[str, int]:
        """Where `rank` stands on each axis; the last axis of `AXES` varies fastest."""
        if not 0 <= rank < self.ranks:
            raise SpecError(f"rank {rank} is not in a plan of {self.ranks} ranks.")
        found: dict[str, int] = {}
        for axis in reversed(AXES):
            rank, found[axis] = divmod(rank, getattr(self, axis))
        return found

    def __str__(self) -> str:
        """The shortest string that `parse_plan` reads back as this plan (prediction, splits and stages left out)."""
        words: list[str] = []
        for name, value in _changed(self):
            if name in ("predicted", "splits", "stages", "blocks"):
                continue
            if isinstance(value, Struct):
                head = HEADS.get(name, "")
                words += [f"{name}={v}" if k == head else f"{name}.{k}={_text(v)}" for k, v in _changed(value)]
            else:
                words.append(f"{name}={_text(value)}")
        return ",".join(words) or "data=1"


def _check_dimensions(splits: dict[str, Split]) -> None:
    """Names of dimensions are known, and are kept whole or split, nothing finer; patterns say how."""
    for name, split in splits.items():
        if name.startswith("@") and name not in DIMENSIONS:
            raise SpecError(f"splits of the plan has '{name}'{did_you_mean(name, DIMENSIONS)}")
        if name in DIMENSIONS and (split.how not in ("whole", "split") or split.parts):
            raise SpecError(f"splits of the plan has '{name}': '{split.how}'. A dimension is 'split' or 'whole'.")
        if name not in DIMENSIONS and split.how == "split":
            raise SpecError(
                f"splits of the plan has '{name}': 'split'. Say of a layer how: column, row, vocabulary or whole; only "
                f"{', '.join(DIMENSIONS)} are split wherever they are."
            )


def parse_plan(text: str) -> dict[str, Any]:
    """`"data=2,sync=local,sync.every=50"` -> the fields that it fixes, nested; what it leaves out is searched.

    Raises SpecError for an unknown field, a value of the wrong type or a field given twice.
    """
    fixed: dict[str, Any] = {}
    for word in filter(None, (part.strip() for part in text.split(","))):
        name, equals, value = word.partition("=")
        if not equals or not value:
            raise SpecError(
                f"'{word}' in the plan '{text}' has no value. "
                "Write NAME=VALUE pairs, such as data=2,precision=bfloat16."
            )
        outer, _, inner = name.partition(".")
        if outer not in Plan.__struct_fields__:
            raise SpecError(
                f"unknown field '{outer}' in the plan '{text}'{did_you_mean(outer, Plan.__struct_fields__)}"
            )
        inner = inner or HEADS.get(outer, "")
        place = fixed.setdefault(outer, {}) if inner else fixed
        key = inner or outer
        if key in place:
            raise SpecError(f"the plan '{text}' gives '{name}' twice. Keep one of them.")
        read = _value(name, value, text)
        place[key] = {"how": read} if outer == "splits" else read
    build_plan(fixed)
    return fixed


def _value(name: str, value: str, text: str) -> Any:
    if name == "recompute.blocks":
        numbers = value.split("+")
        if not all(number.isdecimal() for number in numbers):
            raise SpecError(f"recompute.blocks={value} in the plan '{text}': give numbers of blocks, such as 0+2+5.")
        return [int(number) for number in numbers]
    return {"true": True, "false": False}.get(value.lower(), value)


def build_plan(fixed: dict[str, Any]) -> Plan:
    """A Plan from parsed fields; every other field has its default."""
    return convert(fixed, Plan, source="the plan", strict=False)


def _changed(value: Struct) -> list[tuple[str, Any]]:
    defaults = {f.name: f.default if f.default is not NODEFAULT else f.default_factory for f in structs.fields(value)}
    found = []
    for name in value.__struct_fields__:
        default = defaults.get(name, UNSET)
        default = default() if callable(default) else default
        if getattr(value, name) != default:
            found.append((name, getattr(value, name)))
    return found


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return "+".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)
