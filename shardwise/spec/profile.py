"""`ModelProfile`: what a module costs, as a chain of blocks. Counts are for one sample unless the name says else."""

from __future__ import annotations

from msgspec import Struct, field


class LinearProfile(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A linear layer of a block. `cut` lists the ways its weight may be split over the tensor axis."""

    name: str
    in_features: int
    out_features: int
    cut: tuple[str, ...] = ("column", "row")


class BlockProfile(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One block. FLOPs of the forward pass; bytes saved for backward; bytes that leave it, each for one sample.

    `product_bytes` of what is saved are outputs of matrix products, convolutions and attention.
    """

    name: str
    parameters: int
    parameter_bytes: int
    forward_flops: float
    activation_bytes: int
    boundary_bytes: int
    product_bytes: int = 0
    linears: tuple[LinearProfile, ...] = ()


class CallProfile(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A call of the part called `name`: a pipeline may be cut before it. FLOPs and bytes are for one sample.

    `crossing_bytes` is what a cut before it sends on; `reads` has the parameters outside of the part that the call,
    or the code before it, takes (of the last call also what the loss takes), by their first names where they are tied:
    how many elements and bytes each has. They are not among the `parameters`.
    """

    name: str
    parameters: int
    parameter_bytes: int
    forward_flops: float
    activation_bytes: int
    crossing_bytes: int
    reads: dict[str, tuple[int, int]] = field(default_factory=dict)


class ModelProfile(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A module as a chain of blocks, in the order of execution. `sample` names the input it was measured with.

    `batch_norms`: it normalises over the batch, so that cutting a batch into microbatches changes the numbers.
    `calls` are the places for cuts, where somebody asked for them.
    """

    blocks: tuple[BlockProfile, ...]
    sample: str = ""
    tied: tuple[tuple[str, ...], ...] = ()
    batch_norms: bool = False
    calls: tuple[CallProfile, ...] = ()

    @property
    def parameters(self) -> int:
        return sum(block.parameters for block in self.blocks)

    @property
    def parameter_bytes(self) -> int:
        return sum(block.parameter_bytes for block in self.blocks)

    @property
    def forward_flops(self) -> float:
        """FLOPs of one sample's forward pass; a training step is three times that (Narayanan et al. 2021, 5.1)."""
        return sum(block.forward_flops for block in self.blocks)

    @property
    def activation_bytes(self) -> int:
        return sum(block.activation_bytes for block in self.blocks)
