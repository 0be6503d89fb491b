"""A module whose parameters are cut, run as this rank's program: made at the first call of each kind, then kept."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, fx, nn
from torch.utils._pytree import tree_unflatten

from shardwise.parallel.tensor.atoms import Conflict
from shardwise.parallel.tensor.capture import capture, signature
from shardwise.parallel.tensor.links import GroupLinks
from shardwise.parallel.tensor.program import build, steps
from shardwise.parallel.tensor.propose import Owned
from shardwise.parallel.tensor.scores import Scores

MOST = 256  # programs that a unit keeps
Run = Callable[[Sequence[Any], Any, Any], Any]


class Unit:
    """`module` with the parameters `owned` (by their names in it) cut in place; its forward is replaced while open.

    `shapes` are the whole shapes of those. With `scores` an output that is cut along its last dim stays so.
    """

    def __init__(
        self,
        module: nn.Module,
        owned: Mapping[str, Owned],
        shapes: Mapping[str, tuple[int, ...]],
        links: GroupLinks,
        *,
        scores: bool = False,
    ) -> None:
        self.module, self.links = module, links
        self._owned, self._shapes, self._scores = dict(owned), dict(shapes), scores
        self._programs: dict[Any, Run] = {}
        self._places = [*_places(module, "_parameters"), *_places(module, "_buffers")]
        self._own: Any = None
        self._children: list[Unit] = []

    def open(self) -> None:
        """Run as a program from now on."""
        self._own = vars(self.module).get("forward")
        self._forward = self.module.forward
        self.module.forward = self

    def close(self) -> None:
        """The module's own forward is back."""
        for child in self._children:
            child.close()
        if vars(self.module).get("forward") is self:
            del self.module.forward
            if self._own is not None:
                self.module.forward = self._own

    def dissolve(self) -> None:
        """Its parameters are whole again: its own forward is what runs, also before `close`."""
        self._owned = {}
        for child in self._children:
            child.dissolve()

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy of the module runs its own forward."""
        return copy.deepcopy(self._forward, memo)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self._owned:
            return self._forward(*args, **kwargs)
        key, leaves = signature(self.module, args, kwargs)
        try:
            run = self._programs.get(key)
        except TypeError:  # an argument that no dictionary takes
            return self._openly(leaves, args, kwargs)
        if run is None:
            if len(self._programs) == MOST:
                self._programs.pop(next(iter(self._programs)))
            run = self._programs[key] = self._make(args, kwargs)
        return run(leaves, args, kwargs)

    def _make(self, args: Any, kwargs: Any) -> Run:
        with self._closed():
            captured = capture(self.module, args, kwargs, self._shapes)
        if captured is None:
            return self._openly
        try:
            plan = steps(captured, self._owned, self.links.ranks)
        except Conflict:
            return self._gathered
        program = build(captured, plan, self.links.rank, leave=self._scores)
        function = fx.GraphModule(captured.constants, program.graph).forward
        state = [place for name, place in self._places]
        assert tuple(name for name, _ in self._places) == captured.names
        cut = {index: one for index, one in program.cut.items()}

        def run(leaves: Sequence[Any], args: Any, kwargs: Any) -> Any:
            tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
            found = function(self.links, *(held[name] for held, name in state), *tensors)
            for index, one in cut.items():
                found[index] = Scores.of(found[index], one.dim, one.ids, self.links)
            return tree_unflatten(found, captured.tree)

        return run

    def _openly(self, leaves: Sequence[Any], args: Any, kwargs: Any) -> Any:
        """Its own code, which no graph was made of: the parts inside are run as programs, where they have what is cut;
        a part that has none inside gets its parameters whole."""
        if any("." not in name for name in self._owned) or not any(True for _ in self.module.children()):
            return self._gathered(leaves, args, kwargs)
        if not self._children:
            self._children = [self._child(name, part) for name, part in self._with_cuts()]
            for child in self._children:
                child.open()
        return self._forward(*args, **kwargs)

    def _with_cuts(self) -> list[tuple[str, nn.Module]]:
        found: list[tuple[str, nn.Module]] = []
        for name, part in self.module.named_children():
            if any(one.startswith(name + ".") for one in self._owned):
                found.append((name, part))
        return found

    def _child(self, name: str, part: nn.Module) -> Unit:
        head = name + "."
        owned = {one.removeprefix(head): cut for one, cut in self._owned.items() if one.startswith(head)}
        shapes = {one.removeprefix(head): shape for one, shape in self._shapes.items() if one.startswith(head)}
        return Unit(part, owned, shapes, self.links)

    def _gathered(self, leaves: Sequence[Any], args: Any, kwargs: Any) -> Any:
        """Its own code with whole parameters: right for whatever a rule is missing for, and slow."""
        before: list[tuple[Any, str, Any]] = []
        try:
            for name, (held, key) in self._places:
                if name in self._owned:
                    before.append((held, key, held[key]))
                    held[key] = self.links.join(held[key], *self._owned[name])
            return self._forward(*args, **kwargs)
        finally:
            for held, key, tensor in before:
                held[key] = tensor

    @contextmanager
    def _closed(self) -> Iterator[None]:
        """In this block the module is as the user made it, but for the shapes of its parameters."""
        replaced = vars(self.module).pop("forward", None)
        if self._own is not None:
            self.module.forward = self._own
        for child in self._children:
            child.close()
        try:
            yield
        finally:
            for child in self._children:
                child.open()
            if replaced is not None:
                self.module.forward = replaced


def _places(module: nn.Module, kind: str) -> list[tuple[str, tuple[dict[str, Any], str]]]:
    """Where each parameter (or buffer) is looked up, by its name in the module; each tied one once."""
    found: list[tuple[str, tuple[dict[str, Any], str]]] = []
    seen: set[int] = set()
    for prefix, part in module.named_modules():
        held = getattr(part, kind)
        for key, tensor in held.items():
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                found.append((f"{prefix}.{key}" if prefix else key, (held, key)))
    return found
