"""PowerSGD: the sum of matrices by two thin factors (Vogels, Karimireddy and Jaggi 2019, algorithms 1 and 2).

With M_r a rank's matrix [rows, columns] and Q [columns, rank] from the step before:

    P = sum of M_r Q       first message, with all that is not a matrix and the tail
    P = orthonormal(P)     alike on every rank
    Q = sum of M_r^T P     second message, one for all buckets
    P Q^T                  in the place of the sum of M_r

A rank's residual is M_r - P (M_r^T P)^T: what its own matrix has outside P. Measured against the mean of all ranks
instead, as is also done, it would hold the differences between ranks as well, and those grow without end.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from shardwise.comm.exchange import Bucketed, Pending, Piece
from shardwise.comm.group import Group
from shardwise.comm.residuals import wide

LEAST_RATIO = 2  # matrices whose factors are not at least this much smaller are sent as they are


class Matrix(NamedTuple):
    """A parameter's gradient as a matrix in its bucket, and the rank of its approximation."""

    name: str
    offset: int
    rows: int
    columns: int
    rank: int

    def of(self, flat: Tensor) -> Tensor:
        """[rows, columns] inside a flat bucket."""
        return flat[self.offset : self.offset + self.rows * self.columns].view(self.rows, self.columns)


class Parts(NamedTuple):
    """What a bucket consists of: matrices, and where the rest is."""

    matrices: list[Matrix]
    rest: list[slice]


class PowerSGD:
    """A `Method` of rank `rank`: of each matrix `(rows + columns) * rank` values are sent, of the rest everything.

    `seed` is where Q begins, the same on every rank. On machines of one kind the sums have the same bits on every
    rank; between unlike ones, orthogonalisation and matrix products may differ in the last bit.
    """

    def __init__(self, group: Group, rank: int, *, seed: int = 0) -> None:
        self._group = group
        self._rank = rank
        self._seed = seed
        self._buckets: Sequence[Bucketed] = ()
        self._parts: list[Parts] = []
        self._bases: dict[str, Tensor] = {}
        self._underway: list[_Underway] = []

    def arrange(self, buckets: Sequence[Bucketed]) -> None:
        self._buckets = buckets
        self._underway = []
        self._parts = [parts(bucket.pieces, self._rank) for bucket in buckets]
        for bucket, (matrices, _) in zip(buckets, self._parts, strict=True):
            for each in matrices:
                kept = self._bases.get(each.name)
                fits = kept is not None and kept.shape == (each.columns, each.rank)
                start = kept if kept is not None and fits else first_basis(each, self._seed)
                self._bases[each.name] = start.to(bucket.device, wide(bucket.dtype))

    def begin(self, number: int, residual: Tensor | None, body: Tensor, tail: Tensor, *, mean: bool) -> Pending:
        if number == 0:
            self._underway = []
        values = body.to(wide(body.dtype))
        if residual is not None:
            values = values.add_(residual) if values is body else values + residual
        matrices, rest = self._parts[number]
        bases = [self._bases[each.name] for each in matrices]
        first = _first_message(matrices, bases, rest, values, tail)
        work = self._group.all_reduce(first)
        one = _Underway(self, matrices, bases, rest, values, residual, body, tail, first, work, mean=mean)
        self._underway.append(one)
        return one

    def second_messages(self) -> None:
        """One message for the second factors of all that was begun, in the order of the buckets."""
        begun, self._underway = self._underway, []
        going = [(one, factors) for one in begun if (factors := one.second_factors()) is not None]
        for _, alike in itertools.groupby(going, key=lambda pair: (pair[1].dtype, pair[1].device)):
            members = list(alike)
            message = torch.cat([factors for _, factors in members])
            work = self._group.all_reduce(message)
            arriving = message.split([factors.numel() for _, factors in members])
            for (one, own), summed in zip(members, arriving, strict=True):
                one.go_on(work, own, summed)

    @property
    def ranks(self) -> int:
        """How many ranks the group has."""
        return self._group.size()

    def renew(self, each: Matrix, basis: Tensor, factor: Tensor) -> None:
        """`factor` [columns, rank] is the next basis. A direction in which nothing lies would never come back: it
        begins anew."""
        basis.copy_(factor)
        alive = factor.abs().amax(0) > 0
        if not alive.all():
            basis.copy_(torch.where(alive, factor, first_basis(each, self._seed).to(factor)))

    def state(self) -> dict[str, Tensor]:
        return dict(self._bases)

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """A basis that does not fit (of another rank than this one's) is left aside."""
        self._bases |= state
        self.arrange(self._buckets)


class _Underway:
    """One bucket on its way: `values` are its gradients with what was left out of them before."""

    def __init__(
        self,
        owner: PowerSGD,
        matrices: list[Matrix],
        bases: list[Tensor],
        rest: list[slice],
        values: Tensor,
        residual: Tensor | None,
        body: Tensor,
        tail: Tensor,
        first: Tensor,
        work: Pending,
        *,
        mean: bool,
    ) -> None:
        self._owner = owner
        self._matrices = matrices
        self._bases = bases
        self._rest = rest
        self._values = values
        self._residual = residual
        self._body = body
        self._tail = tail
        self._first = first
        self._length = sum(m.rows * m.rank for m in matrices)  # of the products in it
        self._work = work
        self._mean = mean
        self._finite = True
        self._lefts: list[Tensor] = []
        self._factors: Tensor | None = None

    def second_factors(self) -> Tensor | None:
        """This rank's part of all second factors, flat; None where nothing is to be sent."""
        self._work.wait()
        self._finite = bool(torch.isfinite(self._first).all())  # the same on every rank: it has been summed
        if not self._finite or not self._matrices:
            return None
        sums = self._first[: self._length].split([m.rows * m.rank for m in self._matrices])
        self._lefts = [orthonormal(p.view(m.rows, m.rank)) for m, p in zip(self._matrices, sums, strict=True)]
        own = [m.of(self._values).t() @ left for m, left in zip(self._matrices, self._lefts, strict=True)]
        return torch.cat([factor.reshape(-1) for factor in own])

    def go_on(self, work: Pending, own: Tensor, summed: Tensor) -> None:
        """While the second message travels: what this rank's matrices have beside the factors is left out."""
        self._work = work
        self._factors = summed
        if self._residual is None:
            return
        for each, left, factor in zip(self._matrices, self._lefts, self._each(own), strict=True):
            torch.addmm(each.of(self._values), left, factor.t(), alpha=-1, out=each.of(self._residual))

    def wait(self) -> None:
        self._owner.second_messages()
        self._work.wait()
        share = 1 / self._owner.ranks if self._mean else 1.0
        exact = self._first[self._length :]
        if self._mean:
            exact.mul_(share)
        lengths = [part.stop - part.start for part in self._rest]
        *rest, tail = exact.split([*lengths, self._tail.numel()])
        for part, values in zip(self._rest, rest, strict=True):
            self._body[part].copy_(values)
            if self._residual is not None and self._finite:
                self._residual[part].zero_()  # where another method had left something out, it has arrived now
        self._tail.copy_(tail)
        if self._factors is None:
            for each in self._matrices:  # what is not finite anywhere must not be taken for a gradient
                each.of(self._body).fill_(math.nan)
            return
        known = zip(self._matrices, self._bases, self._lefts, self._each(self._factors), strict=True)
        for each, basis, left, factor in known:
            whole = each.of(self._body)
            if whole.dtype == factor.dtype:
                torch.mm(left * share, factor.t(), out=whole)
            else:
                whole.copy_(left * share @ factor.t())
            self._owner.renew(each, basis, factor)

    def _each(self, factors: Tensor) -> list[Tensor]:
        """[columns, rank] of every matrix."""
        flat = factors.split([m.columns * m.rank for m in self._matrices])
        return [factor.view(m.columns, m.rank) for m, factor in zip(self._matrices, flat, strict=True)]


def _first_message(
    matrices: Sequence[Matrix], bases: Sequence[Tensor], rest: Sequence[slice], values: Tensor, tail: Tensor
) -> Tensor:
    """Every matrix times its basis, the rest of the bucket, the tail."""
    products = [(each.of(values) @ basis).view(-1) for each, basis in zip(matrices, bases, strict=True)]
    return torch.cat([*products, *(values[part] for part in rest), tail.to(values.dtype)])


def parts(pieces: Sequence[Piece], rank: int) -> Parts:
    """Which parameters of a bucket are cut into factors, and where the others are."""
    matrices = [each for piece in pieces if (each := matrix(piece, rank)) is not None]
    names = {each.name for each in matrices}
    rest = [slice(p.offset, p.offset + math.prod(p.shape)) for p in pieces if p.name not in names]
    return Parts(matrices, rest)


def matrix(piece: Piece, rank: int) -> Matrix | None:
    """A parameter as its first dimension against all others; None where factors would not save half of the values."""
    if len(piece.shape) < 2:
        return None
    rows, columns = piece.shape[0], math.prod(piece.shape[1:])
    kept = min(rank, rows, columns)
    if LEAST_RATIO * kept * (rows + columns) > rows * columns or not kept:
        return None
    return Matrix(piece.name, piece.offset, rows, columns, kept)


def first_basis(each: Matrix, seed: int) -> Tensor:
    """A basis [columns, rank] that depends on the name and the seed only."""
    digest = hashlib.sha256(f"{seed} {each.name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
    return torch.randn(each.columns, each.rank, generator=generator)


def orthonormal(columns: Tensor) -> Tensor:
    """An orthonormal basis of at least the span of the columns of [rows, rank], which may be zero or dependent.

    In float64, so that ranks which add in another order still round to the same float32.
    """
    return torch.linalg.qr(columns.double()).Q.to(columns.dtype)
