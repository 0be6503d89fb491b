"""`Layout`: which boxes of a global tensor a rank holds under a plan, as pure functions; the arithmetic of boxes."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from math import prod
from urllib.parse import unquote

from msgspec import Struct

from shardwise.errors import SpecError
from shardwise.spec.plan import Plan, Split

Shape = tuple[int, ...]
Span = tuple[int, int]

_SPLIT_DIM = {"column": 0, "vocabulary": 0, "experts": 0, "row": 1}
_V_SCHEDULES = ("zbv", "dualpipev")  # their second half of stages runs back from the last rank to the first
_SMALLEST_CUT_BYTES = 64 * 1024
_IN_BLOCKS = "/block_scales"  # numbers for blocks of 256 elements of a parameter, not for its rows


class Box(Struct, frozen=True, forbid_unknown_fields=True):
    """A rectangle of a global tensor: `offset[d] <= index[d] < offset[d] + shape[d]`; `Box((), ())` of a 0-dim one."""

    offset: Shape
    shape: Shape

    @property
    def size(self) -> int:
        """The number of elements."""
        return prod(self.shape)

    @property
    def slices(self) -> tuple[slice, ...]:
        """Index of this box in an array of the global shape."""
        return tuple(slice(o, o + s) for o, s in zip(self.offset, self.shape, strict=True))

    def within(self, outer: Box) -> Box:
        """The same elements, with offsets counted from the corner of `outer`."""
        return Box(tuple(o - at for o, at in zip(self.offset, outer.offset, strict=True)), self.shape)


def whole(shape: Shape) -> Box:
    """The box of the whole tensor."""
    return Box((0,) * len(shape), tuple(shape))


def boxes(name: str, shape: Shape, plan: Plan, rank: int) -> tuple[Box, ...]:
    """The boxes of the tensor `name` of global `shape` that `rank` holds: disjoint, not empty, in local order.

    `name` is `model/<parameter>`, `buffer/<buffer>`, `optimizer/<parameter>/<state>`, or any other name, which is taken
    for the parameter's. Optimizer state lies like its parameter. Axes, in the order in which they cut:

    - pipeline: the stages that own the tensor's block; see `holds`.
    - tensor: `plan.splits` maps a glob pattern over parameter or module names to a `Split`; the first match decides.
      `column`, `vocabulary` and `experts` cut dim 0, `row` dim 1 (a 1-dim bias stays whole). Without `parts` the dim
      falls into ceil-sized chunks like `torch.chunk`. With `parts` it is one or more fused pieces, one after the other,
      each cut into one part a rank: `parts[piece * tensor + rank]` counts its units, of which the dim has `sum(parts)`.
      For two ranks, `(3, 2)` cuts 5 heads into 3 and 2, and `(4, 4, 1, 1, 1, 1)` halves a fused query (8 heads), key (2
      heads) and value (2 heads) weight.
    - shard: dim 0 of what is left, in ceil-sized chunks (FSDP2's rule). Buffers are never sharded; parameters only
      with `zero=3` or where a rank has a master of its rows alone, optimizer state always.
    - data, context, expert: whole replicas.

    A tensor `sync/...` holds what each rank keeps for itself: dim 0 counts the ranks, whatever the axes.

    Several boxes of one rank lie in its local tensor joined along the dim in which they differ (`local_offsets`).
    Raises SpecError when `parts` do not fit the dim or a block is in no stage.
    """
    if not holds(name, plan, rank):
        return ()
    sides = _sides(name, shape, plan, rank)
    found = (Box(tuple(a for a, _ in side), tuple(b - a for a, b in side)) for side in itertools.product(*sides))
    return tuple(box for box in found if box.size)


def holds(name: str, plan: Plan, rank: int) -> bool:
    """Whether the pipeline stage of `rank` has the tensor at all, be it with an empty box; see `stages_with`."""
    if plan.pipeline == 1 or not plan.stages:
        return True
    here = plan.coordinates(rank)["pipeline"]
    return any(stage_rank(number, plan) == here for number in stages_with(name, plan))


def stages_with(name: str, plan: Plan) -> list[int]:
    """The numbers of the stages that have the tensor.

    One under a block belongs to the stages that have the block, and any tensor also to those whose `holds` patterns
    match it; one that is in neither to every stage. Raises SpecError for a block in no stage.
    """
    tensor = parameter(name)
    blocks = [i for i, block in enumerate(plan.blocks) if tensor.startswith(block + ".") or tensor == block]
    for block in blocks:
        if not any(stage.first <= block <= stage.last for stage in plan.stages):
            raise SpecError(
                f"block {block} ({plan.blocks[block]}) is in no stage of the plan. "
                "Extend the first..last of a stage over it."
            )
    found = [
        number
        for number, stage in enumerate(plan.stages)
        if any(stage.first <= block <= stage.last for block in blocks)
        or any(_matches(tensor, pattern) for pattern in stage.holds)
    ]
    return found or list(range(len(plan.stages)))


def parameter(name: str) -> str:
    """The parameter or buffer that the tensor `name` belongs to: `optimizer/a.weight/exp_avg` -> `a.weight`.

    What is quoted in the names of a checkpoint (a slash) is as the module has it.
    """
    head, _, rest = name.partition("/")
    if head in ("model", "buffer"):
        return unquote(rest)
    return unquote(rest.partition("/")[0]) if head == "optimizer" else name


def local_shape(name: str, shape: Shape, plan: Plan, rank: int) -> Shape:
    """The shape of the local tensor of a `rank` whose stage has it; a dim of 0 where its part of the cut is empty."""
    return tuple(sum(stop - start for start, stop in side) for side in _sides(name, shape, plan, rank))


def local_offsets(held: Sequence[Box]) -> list[Shape]:
    """Where each of one rank's boxes starts in its local tensor: joined along the dim in which their offsets differ."""
    found: list[Shape] = []
    filled = 0
    dim = (
        next((d for d in range(len(held[0].shape)) if held[0].offset[d] != held[-1].offset[d]), None) if held else None
    )
    for box in held:
        found.append(tuple(filled if d == dim else 0 for d in range(len(box.shape))))
        filled += box.shape[dim] if dim is not None else 0
    return found


def intersect(a: Box, b: Box) -> Box | None:
    """The elements that both have; None when there are none."""
    start = tuple(map(max, a.offset, b.offset))
    shape = tuple(
        min(x + n, y + m) - s for x, n, y, m, s in zip(a.offset, a.shape, b.offset, b.shape, start, strict=True)
    )
    return Box(start, shape) if all(extent > 0 for extent in shape) else None


def covers(held: Sequence[Box], shape: Shape) -> bool:
    """Whether the boxes together are the whole tensor, each element exactly once."""
    limits = whole(shape)
    if sum(box.size for box in held) != limits.size:
        return False
    return all(_inside(box, limits) for box in held) and not _overlap([box for box in held if box.size])


def written_by(tensors: Mapping[str, tuple[Shape, int]], plan: Plan, rank: int) -> list[tuple[str, Box]]:
    """What `rank` writes of `tensors` (name -> global shape and bytes an element), so that every box is written once.

    The ranks that hold the same boxes share them out evenly by bytes: largest first to the least loaded, a box of
    more than a quarter of a fair share cut along its first long dim. It is decided among those holders alone, so a
    rank needs to list only the tensors that it holds itself.
    """
    shared: dict[tuple[int, ...], list[tuple[str, Box]]] = {}
    places = _places(plan)
    alone = {(r, 0, 0): [r] for r in range(plan.ranks)}
    for name in sorted(tensors):
        holders = _holders(name, tensors[name][0], plan, alone if _is_own(name) else places)
        for box in boxes(name, tensors[name][0], plan, rank):
            shared.setdefault(holders[box], []).append((name, box))
    mine: list[tuple[str, Box]] = []
    for ranks, pieces in shared.items():
        mine += _deal(pieces, tensors, len(ranks))[ranks.index(rank)]
    return mine


def _sides(name: str, shape: Shape, plan: Plan, rank: int) -> list[list[Span]]:
    """For each dim the spans that `rank` holds; at most one dim has several."""
    if _is_own(name):
        return [[_chunk(shape[0], plan.ranks, rank)], *([(0, extent)] for extent in shape[1:])]
    if name.startswith("optimizer/") and name.endswith(_IN_BLOCKS):
        return [[(0, extent)] for extent in shape]
    at = plan.coordinates(rank)
    dim, spans = _tensor_cut(name, shape, plan, at["tensor"])
    cut: dict[int, list[Span]] = {dim: spans} if dim is not None else {}
    if shape and plan.shard > 1 and _is_sharded(name, plan):
        cut[0] = _window(cut.get(0, [(0, shape[0])]), plan.shard, at["shard"])
    return [cut.get(d, [(0, extent)]) for d, extent in enumerate(shape)]


def _places(plan: Plan) -> dict[tuple[int, int, int], list[int]]:
    """The ranks that hold the same boxes of every tensor, by their place on the axes that cut."""
    found: dict[tuple[int, int, int], list[int]] = {}
    for rank in range(plan.ranks):
        at = plan.coordinates(rank)
        found.setdefault((at["pipeline"], at["shard"], at["tensor"]), []).append(rank)
    return found


def _holders(
    name: str, shape: Shape, plan: Plan, places: Mapping[tuple[int, int, int], list[int]]
) -> dict[Box, tuple[int, ...]]:
    found: dict[Box, list[int]] = {}
    for ranks in places.values():
        for box in boxes(name, shape, plan, ranks[0]):
            found.setdefault(box, []).extend(ranks)
    return {box: tuple(sorted(ranks)) for box, ranks in found.items()}


def _deal(
    pieces: list[tuple[str, Box]], tensors: Mapping[str, tuple[Shape, int]], hands: int
) -> list[list[tuple[str, Box]]]:
    if hands == 1:
        return [pieces]
    total = sum(box.size * tensors[name][1] for name, box in pieces)
    limit = max(_SMALLEST_CUT_BYTES, total // (4 * hands))
    sized = [
        (part.size * tensors[name][1], name, part)
        for name, box in pieces
        for part in _cut(box, max(1, limit // tensors[name][1]))
    ]
    sized.sort(key=lambda piece: (-piece[0], piece[1], piece[2].offset))
    dealt: list[list[tuple[str, Box]]] = [[] for _ in range(hands)]
    loads = [(0, hand) for hand in range(hands)]
    for num_bytes, name, part in sized:
        load, hand = heapq.heappop(loads)
        dealt[hand].append((name, part))
        heapq.heappush(loads, (load + num_bytes, hand))
    return dealt


def _cut(box: Box, elements: int) -> list[Box]:
    """`box` in slabs of at most `elements`, as far as cutting its first dim of more than 1 allows."""
    dim = next((d for d, extent in enumerate(box.shape) if extent > 1), None)
    if dim is None or box.size <= elements:
        return [box]
    rows = max(1, elements * box.shape[dim] // box.size)
    parts = []
    for start in range(0, box.shape[dim], rows):
        offset, shape = list(box.offset), list(box.shape)
        offset[dim] += start
        shape[dim] = min(rows, box.shape[dim] - start)
        parts.append(Box(tuple(offset), tuple(shape)))
    return parts


def _tensor_cut(name: str, shape: Shape, plan: Plan, index: int) -> tuple[int | None, list[Span]]:
    """The dim that the tensor axis cuts and this rank's spans of it; `(None, [])` when it stays whole."""
    split = _split_of(parameter(name), plan)
    dim = _SPLIT_DIM.get(split.how) if split is not None else None
    if plan.tensor == 1 or split is None or dim is None or dim >= len(shape):
        return None, []
    if not split.parts:
        return dim, [_chunk(shape[dim], plan.tensor, index)]
    units = sum(split.parts)
    if len(split.parts) % plan.tensor or units < 1 or shape[dim] % units:
        raise SpecError(
            f"splits.parts={split.parts} of '{name}' does not fit: there must be one part for each fused piece and "
            f"each of the {plan.tensor} tensor ranks, and their sum must divide the {shape[dim]} elements of dim {dim}."
        )
    unit, ends = shape[dim] // units, [0, *itertools.accumulate(split.parts)]
    spans = [(ends[i] * unit, ends[i + 1] * unit) for i in range(index, len(split.parts), plan.tensor)]
    return dim, [span for span in spans if span[0] < span[1]]


def tensor_spans(name: str, shape: Shape, plan: Plan) -> tuple[int | None, list[list[Span]]]:
    """The dim of `name` that the tensor axis cuts, and each tensor rank's spans of it; `(None, [])` where it is whole.

    Raises SpecError when the split's parts do not fit the dim.
    """
    cuts = [_tensor_cut(name, shape, plan, index) for index in range(plan.tensor)]
    return cuts[0][0], [spans for dim, spans in cuts if dim is not None]


def split_of(name: str, plan: Plan) -> Split | None:
    """The split of the plan that decides about the tensor `name`, if one does."""
    return _split_of(parameter(name), plan)


def _split_of(tensor: str, plan: Plan) -> Split | None:
    return next((split for pattern, split in plan.splits.items() if _matches(tensor, pattern)), None)


def _matches(tensor: str, pattern: str) -> bool:
    """A pattern names a tensor (`*.mlp.up.weight`) or the module that it sits in (`*.mlp.up`)."""
    return fnmatchcase(tensor, pattern) or fnmatchcase(tensor.rpartition(".")[0], pattern)


def _is_own(name: str) -> bool:
    return name.startswith("sync/")


def _is_sharded(name: str, plan: Plan) -> bool:
    head = name.partition("/")[0]
    return head == "optimizer" or (head != "buffer" and (plan.zero == 3 or has_master_rows(plan)))


def has_master_rows(plan: Plan) -> bool:
    """Whether a rank's float32 values of the parameters are masters, of its rows alone."""
    return plan.shard > 1 and plan.parameters == "bfloat16" and plan.master == "float32"


def _chunk(extent: int, parts: int, index: int) -> Span:
    size = -(-extent // parts)
    return min(index * size, extent), min((index + 1) * size, extent)


def _window(spans: list[Span], parts: int, index: int) -> list[Span]:
    """The chunk `index` of `parts` of the spans laid end to end, as spans."""
    start, stop = _chunk(sum(b - a for a, b in spans), parts, index)
    found, done = [], 0
    for a, b in spans:
        first, last = max(start - done, 0), min(stop - done, b - a)
        if first < last:
            found.append((a + first, a + last))
        done += b - a
    return found


def stage_rank(stage: int, plan: Plan) -> int:
    """The place on the pipeline axis that runs stage number `stage` of `pipeline` x `virtual`."""
    turn, place = divmod(stage, plan.pipeline)
    back = turn % 2 == 1 and plan.schedule.lower() in _V_SCHEDULES
    return plan.pipeline - 1 - place if back else place


def _inside(box: Box, limits: Box) -> bool:
    if len(box.offset) != len(limits.shape) or len(box.shape) != len(limits.shape):
        return False
    return all(o >= 0 and s >= 0 and o + s <= n for o, s, n in zip(box.offset, box.shape, limits.shape, strict=True))


def _overlap(held: list[Box]) -> bool:
    """Whether any two boxes share an element: a sweep along dim 0 with the boxes that are open there."""
    if held and not held[0].shape:
        return len(held) > 1
    open_boxes: list[Box] = []
    for box in sorted(held, key=lambda box: box.offset):
        open_boxes = [other for other in open_boxes if other.offset[0] + other.shape[0] > box.offset[0]]
        if any(intersect(box, other) is not None for other in open_boxes):
            return True
        open_boxes.append(box)
    return False
