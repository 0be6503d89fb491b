"""The proof that a module computes with each expert on one rank what it computes whole."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from shardwise.parallel.doubles import Doubles
from shardwise.parallel.tensor.capture import PLAIN
from shardwise.parallel.tensor.experts import Mixture, Part
from shardwise.parallel.tensor.guards import Held, python_draws
from shardwise.parallel.tensor.propose import Owned
from shardwise.parallel.tensor.prove import TOLERANCE, as_leaf, compare, part, run_whole, with_gradients
from shardwise.parallel.tensor.standins import swapped


class Mixed(NamedTuple):
    """A proven mixture: parameters of the module's own that are cut by rows, modules inside -> the rank that has them,
    and the modules inside that work on what the experts gave."""

    tables: dict[str, Owned]
    experts: dict[str, int]
    inside: frozenset[str]

    def cuts(self, module: nn.Module) -> dict[str, Owned]:
        """Parameter of `module` -> how it is cut: an expert's is all on its rank."""
        found = dict(self.tables)
        for path, rank in self.experts.items():
            for name, p in module.get_submodule(path).named_parameters():
                found[f"{path}.{name}"] = Owned(0, (rank,) * p.shape[0])
        return found


class Unfit(Exception):
    """Why the experts of a module stay whole: the parameters called `names` in it."""

    def __init__(self, why: str) -> None:
        super().__init__(why)
        self.names: tuple[str, ...] = ()


class Alone:
    """One rank's crossing, where all ranks run in one process: what is whole is one tensor, so autograd itself sums."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def enter(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return list(tensors)

    def once(self, x: Tensor) -> Tensor:
        return x

    def leave(self, outputs: Sequence[Tensor], summed: Sequence[bool], tied: Sequence[Tensor], idle: Any) -> list[Any]:
        raise AssertionError("the ranks' terms are put together by the proof")


@contextmanager
def unchanged(module: nn.Module) -> Iterator[None]:
    """Buffers and torch's generators are as they were afterwards."""
    before = [(buffer, buffer.clone()) for buffer in module.buffers()]
    devices = {buffer.device for buffer in (*module.parameters(), *module.buffers()) if buffer.is_cuda}
    with torch.random.fork_rng(devices=list(devices)):
        try:
            yield
        finally:
            for buffer, value in before:
                buffer.detach().copy_(value)


def copied(given: Any) -> Any:
    return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, given)


class Proof:
    """Runs a module in float64, nobody else's, whole and by ranks, on what it was called with and on other numbers."""

    def __init__(self, module: nn.Module, args: Any, kwargs: Any, ranks: int) -> None:
        leaves, tree = tree_flatten((args, kwargs))
        if not all(isinstance(leaf, (Tensor, *PLAIN)) for leaf in leaves):
            raise Unfit("its mixture is given what is neither a tensor nor plain")
        self.ranks = ranks
        self.module = module
        chance = torch.Generator().manual_seed(0)
        for p in module.parameters():
            p.data = p.data.contiguous()
            if p.numel() > 1 and bool((p == p.flatten()[0]).all()):  # what is all zero shows nothing
                p.data = p.data + 0.1 * _random(p, chance)
        others = [_random(leaf, chance) if _floats(leaf) else leaf for leaf in leaves]
        self.given = [(args, kwargs), tree_unflatten(others, tree)]

    def of(self, tables: dict[str, Owned], experts: dict[str, int]) -> Mixed:
        """The mixture with these cut. Raises Unfit where it does not compute the same."""
        found: frozenset[str] = frozenset()
        with unchanged(self.module), Doubles():
            for number, (args, kwargs) in enumerate(self.given):
                try:
                    expected, chance = self._expected(args, kwargs)
                except Unfit:
                    raise
                except Exception as error:
                    if number:
                        continue  # its code refuses such numbers
                    raise Unfit(f"alone, it cannot be called ({type(error).__name__})") from None
                try:
                    ours, inside = self._ours(args, kwargs, tables, experts, chance)
                except Unfit:
                    raise
                except Exception as error:  # whatever its code does with stand-ins
                    raise Unfit(f"it cannot run with a rank's experts alone ({type(error).__name__})") from None
                gap, where = compare(expected, ours)
                if not gap <= TOLERANCE:
                    raise Unfit(f"with each expert on one rank, its {where} differs by {gap:.1e}")
                found |= inside
        return Mixed(tables, experts, found)

    def _expected(self, args: Any, kwargs: Any) -> tuple[dict[str, Tensor], Tensor]:
        before, versions = Held(self.module), _versions(self.module)
        torch.manual_seed(0)
        with torch.no_grad(), python_draws() as drawn:
            self.module(*copied(args), **copied(kwargs))
            if drawn():
                raise Unfit("its mixture draws from Python's generators")
        chance = torch.get_rng_state()
        if Held(self.module) != before or _versions(self.module) != versions:
            raise Unfit("its mixture keeps values from call to call")
        torch.manual_seed(0)
        return run_whole(self.module, args, kwargs), chance

    def _ours(
        self, args: Any, kwargs: Any, tables: dict[str, Owned], experts: dict[str, int], chance: Tensor
    ) -> tuple[dict[str, Tensor], frozenset[str]]:
        leaves, tree = tree_flatten((args, kwargs))
        ours = {n: p.detach().clone().requires_grad_(p.requires_grad) for n, p in self.module.named_parameters()}
        tensors = [as_leaf(leaf) for leaf in leaves if isinstance(leaf, Tensor)]
        parts: list[Part] = []
        for rank in range(self.ranks):
            handed = [tensor.clone() for tensor in tensors]  # what is no leaf may be written into
            given = iter(handed)
            a, k = tree_unflatten([next(given) if isinstance(leaf, Tensor) else leaf for leaf in leaves], tree)
            torch.manual_seed(0)
            with self._holding(ours, tables, rank):
                parts.append(Mixture(self.module, tables, experts, Alone(rank)).part(a, k))
            if any(tensor._version for tensor in handed):
                raise Unfit("its mixture writes into its arguments")
            if not torch.equal(torch.get_rng_state(), chance):
                raise Unfit("its experts draw random numbers")
        facts = parts[0].facts
        if not any(facts.summed):
            raise Unfit("none of its experts was given anything")
        state = {**ours, **dict(self.module.named_buffers())}
        inputs = {**state, **{f"argument {i}": one for i, one in enumerate(tensors)}}
        buffers = {f"buffer {name}": buffer for name, buffer in self.module.named_buffers()}
        return with_gradients(_together(parts), inputs) | buffers, facts.inside

    @contextmanager
    def _holding(self, ours: Mapping[str, Tensor], tables: Mapping[str, Owned], rank: int) -> Iterator[None]:
        """In this block the module's parameters are these, and its tables are this rank's."""
        with ExitStack() as stack:
            for name, tensor in ours.items():
                head, _, key = name.rpartition(".")
                held: Any = self.module.get_submodule(head)._parameters
                mine = part(tensor, *tables[name], rank) if name in tables else tensor
                stack.enter_context(swapped(held, key, mine))
            yield


def _together(parts: Sequence[Part]) -> list[Any]:
    found: list[Any] = []
    for leaves, summed in zip(zip(*(one.leaves for one in parts), strict=True), parts[0].facts.summed, strict=True):
        found.append(torch.stack(leaves).sum(0) if summed else leaves[0])
    return found


def _floats(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def _random(like: Tensor, chance: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=chance, dtype=torch.float64).to(like.device)


def _versions(module: nn.Module) -> list[Any]:
    return [(name, id(tensor), tensor._version) for name, tensor in module.named_buffers()]
