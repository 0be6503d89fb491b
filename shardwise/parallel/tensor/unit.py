"""A module whose parameters are cut, run as this rank's program: made at the first call of each kind, then kept."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, fx, nn
from torch.utils._pytree import tree_unflatten

from shardwise import events
from shardwise.parallel.tensor.atoms import Conflict, Cut
from shardwise.parallel.tensor.capture import Captured, capture, signature
from shardwise.parallel.tensor.links import GroupLinks
from shardwise.parallel.tensor.mixed import called_children
from shardwise.parallel.tensor.parted import Parted
from shardwise.parallel.tensor.program import Program, build, steps
from shardwise.parallel.tensor.propose import Owned
from shardwise.parallel.tensor.scores import Scores

MOST = 256  # programs that a unit keeps
TRIES = 8  # calls of which no graph could be made, before none is tried any more
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
        self._failed = 0
        self._parts = list(module.modules())
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
        key, leaves, args, kwargs = self._key(args, kwargs)
        try:
            run = self._programs.get(key)
        except TypeError:  # an argument that no dictionary takes
            return self._openly(leaves, args, kwargs)
        if run is None:
            if len(self._programs) == MOST:
                self._programs.pop(next(iter(self._programs)))
            run = self._programs[key] = self._make(key, args, kwargs)
        return run(leaves, args, kwargs)

    def _key(self, args: Any, kwargs: Any) -> tuple[Any, list[Any], Any, Any]:
        """What of a call decides which program runs, and the call."""
        return *signature(self._parts, args, kwargs), args, kwargs

    def _make(self, key: Any, args: Any, kwargs: Any) -> Run:
        captured = None
        if self._failed < TRIES:
            with self._closed():
                captured = capture(self.module, args, kwargs, self._shapes)
        if captured is None:
            self._failed += 1
            self._tell("no graph can be made of its code")
            return self._openly
        try:
            program = self._program(captured, key)
        except Conflict as conflict:
            self._tell(str(conflict))
            return self._gathered
        function = fx.GraphModule(captured.constants, program.graph).forward
        state: dict[str, tuple[dict[str, Any], str]] = {}
        for name, place in self._places:
            state.setdefault(name, place)
        assert tuple(state) == captured.names

        def run(leaves: Sequence[Any], args: Any, kwargs: Any) -> Any:
            tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
            mine = [_local(one) if place in program.parts else _whole(one) for place, one in enumerate(tensors)]
            found = function(self.links, *(_local(held[key]) for held, key in state.values()), *mine)
            for index, one in program.cut.items():
                found[index] = self._left(found[index], one)
            return tree_unflatten(found, captured.tree)

        return run

    def _tell(self, why: str) -> None:
        """Say once of each kind of module that it is slow."""
        kind = type(self.module).__name__
        if self.links.rank == 0 and (kind, why) not in self.links.told:
            self.links.told.add((kind, why))
            events.emit("warning", message=f"{kind} runs its own code and gathers what it reads of cut weights: {why}.")

    def _program(self, captured: Captured, key: Any) -> Program:
        """Raises Conflict where an operation cannot run with parameters cut as they are."""
        return build(captured, steps(captured, self._owned, self.links.ranks), self.links.rank, leave=self._scores)

    def _left(self, local: Tensor, cut: Cut) -> Tensor:
        """What is handed out of an output that stays cut."""
        return Scores.made(local, cut.dim, cut.ids, self.links)

    def _openly(self, leaves: Sequence[Any], args: Any, kwargs: Any) -> Any:
        """Its own code, which no graph was made of: the parts inside are run as programs, where they have what is cut,
        and what else it reads of that, it gets whole."""
        if not self._children:
            children = [self._child(part) for _, part in called_children(self.module)]
            self._children = [child for child in children if child is not None]
            for child in self._children:
                child.open()
        return self._gathered(leaves, args, kwargs)

    def _child(self, part: nn.Module) -> Unit | None:
        """The unit of what is inside, if any of it is cut; a tied parameter may have its first name elsewhere."""
        held = {(id(held), key): one for one, (held, key) in self._places}
        first = {inner: held[id(store), key] for inner, (store, key) in _places(part, "_parameters")}
        owned = {inner: self._owned[one] for inner, one in first.items() if one in self._owned}
        if not owned:
            return None
        return self._inner(part, owned, {inner: self._shapes[one] for inner, one in first.items()})

    def _inner(self, part: nn.Module, owned: dict[str, Owned], shapes: dict[str, tuple[int, ...]]) -> Unit:
        return Unit(part, owned, shapes, self.links)

    def _gathered(self, leaves: Sequence[Any], args: Any, kwargs: Any) -> Any:
        """Its own code, which gets whole parameters where it reads them: right for whatever a rule is missing for, and
        slow."""
        before: list[tuple[Any, str, Any]] = []
        whole: dict[str, Tensor] = {}
        try:
            for name, (held, key) in self._places:
                if name in self._owned:
                    before.append((held, key, held[key]))
                    if name not in whole:
                        whole[name] = Parted.of(_local(held[key]), *self._owned[name], self.links)
                    held[key] = whole[name]
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
    """Where each parameter (or buffer) is looked up, by its name in the module: a tied one in several places, by the
    first of its names."""
    found: list[tuple[str, tuple[dict[str, Any], str]]] = []
    names: dict[int, str] = {}
    for prefix, part in module.named_modules():
        held = getattr(part, kind)
        for key, tensor in held.items():
            if tensor is not None:
                name = names.setdefault(id(tensor), f"{prefix}.{key}" if prefix else key)
                found.append((name, (held, key)))
    return found


def _local(tensor: Tensor) -> Tensor:
    """This rank's part, also where a unit around this one handed out the whole."""
    return tensor.local if isinstance(tensor, Parted) else tensor


def _whole(tensor: Tensor) -> Tensor:
    """All of it, also of what is handed on cut."""
    return tensor.whole() if isinstance(tensor, Parted) else tensor
