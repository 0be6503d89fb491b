"""A unit whose values between its layers are cut along the sequence, and which takes and hands out such values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from shardwise.parallel.tensor.aliases import written
from shardwise.parallel.tensor.atoms import Cut
from shardwise.parallel.tensor.capture import Captured
from shardwise.parallel.tensor.handed import Handed, brought_together
from shardwise.parallel.tensor.program import Program
from shardwise.parallel.tensor.propose import Owned
from shardwise.parallel.tensor.sequence import sequenced
from shardwise.parallel.tensor.sequence_program import build_sequence
from shardwise.parallel.tensor.shares import SequenceLinks
from shardwise.parallel.tensor.unit import Unit


class SequenceUnit(Unit):
    """With `hands` its outputs may be left cut, for a block that comes next."""

    def __init__(
        self,
        module: nn.Module,
        owned: Mapping[str, Owned],
        shapes: Mapping[str, tuple[int, ...]],
        links: SequenceLinks,
        *,
        hands: bool = False,
    ) -> None:
        super().__init__(module, owned, shapes, links)
        self._hands = hands

    def _key(self, args: Any, kwargs: Any) -> tuple[Any, list[Any], Any, Any]:
        leaves, tree = tree_flatten((args, kwargs))
        cuts = [leaf.passes() if isinstance(leaf, Handed) else None for leaf in leaves]
        told = [leaf if cut is not None else brought_together(leaf) for leaf, cut in zip(leaves, cuts, strict=True)]
        args, kwargs = tree_unflatten(told, tree)
        key, leaves, args, kwargs = super()._key(args, kwargs)
        of_tensors = tuple(cut for cut, leaf in zip(cuts, leaves, strict=True) if isinstance(leaf, Tensor))
        return (key, of_tensors), leaves, args, kwargs

    def _program(self, captured: Captured, key: Any) -> Program:
        changed = written(captured.graph)
        inputs = captured.inputs[len(captured.names) :]
        given = {node: cut for node, cut in zip(inputs, key[1], strict=True) if cut is not None}
        given = {node: cut for node, cut in given.items() if not any(node in group for group in changed)}
        plan = sequenced(captured, self._owned, self.links.ranks, given, leave=self._hands)
        if plan is None:
            return super()._program(captured, key)
        found = build_sequence(captured, plan, self.links.rank, self.links.ranks, leave=self._hands)
        return found._replace(parts=frozenset(place for place, node in enumerate(inputs) if node in given))

    def _left(self, local: Tensor, cut: Cut) -> Tensor:
        return Handed.of(local, cut.dim, cut.ids, self.links)

    def _inner(self, part: nn.Module, owned: dict[str, Owned], shapes: dict[str, tuple[int, ...]]) -> Unit:
        assert isinstance(self.links, SequenceLinks)
        return SequenceUnit(part, owned, shapes, self.links)
