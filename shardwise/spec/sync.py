"""`Sync`: how the replicas of a plan agree: the word, its method, and the numbers that go with it."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct, structs

from shardwise.errors import SpecError, did_you_mean

Word = Literal["all_reduce", "compressed", "local", "param_server", "auto"]

# The methods of each word, the default first, and the fields that go with each.
METHODS: dict[str, dict[str, tuple[str, ...]]] = {
    "all_reduce": {"": ()},
    "compressed": {
        "int8": ("start", "overlap"),
        "bf16": ("start", "overlap"),
        "topk": ("start", "overlap", "density"),
        "powersgd": ("start", "overlap", "rank"),
    },
    "local": {
        "sgd": ("start", "every", "bits", "overlap"),
        "diloco": ("start", "every", "bits", "overlap", "outer_lr", "outer_momentum"),
        "post_local": ("start", "every", "bits", "overlap"),
        "sparse": ("start", "every", "overlap", "density"),
        "streaming": ("start", "every", "bits", "overlap", "outer_lr", "outer_momentum", "fragments"),
    },
    "param_server": {"sync": ("backup",), "async": (), "stale": ("bound",)},
    "auto": {"": ()},
}
LOCAL_STEPS = 4  # of a replica between two synchronisations, where `every` is not given
LOSSY = ("compressed", "local", "param_server")  # words that change the numbers, but for param_server's method sync


class Sync(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How replicas agree on gradients or parameters; `bucket_bytes` is the size of a gradient bucket (0: chosen).

    `method` is one of `METHODS[word]`, its first one unless given (with a `bound`: stale). `start` counts the steps
    that are exact before the method begins. Of `compressed`: `density` is the share of elements that top-k sends,
    `rank` PowerSGD's; with `overlap=1` sums arrive a step late. Of `local`: `every` counts the steps of a replica
    between two synchronisations, `bits` are sent for an element, `overlap` counts the steps during which that is on its
    way; DiLoCo's outer optimizer (Douillard et al. 2023, algorithm 1) has `outer_lr` and `outer_momentum`; `fragments`
    of the parameters take turns in streaming DiLoCo (Douillard et al. 2025). Of `param_server`: `bound` counts the
    clocks that a worker may be ahead of the slowest, `backup` the workers whose gradients of a clock are not waited
    for. `auto` measures, then picks one.
    """

    word: Word = "all_reduce"
    method: str = ""
    start: int = 0
    density: float = 0.01
    rank: int = 2
    every: int = 0
    bits: Literal[32, 16, 8, 4] = 32
    overlap: int = 0
    outer_lr: float = 0.7
    outer_momentum: float = 0.9
    fragments: int = 4
    bound: int = 0
    backup: int = 0
    bucket_bytes: int = 0

    def __post_init__(self) -> None:
        methods = METHODS[self.word]
        if not self.method:
            structs.force_setattr(self, "method", "stale" if self.bound and "stale" in methods else next(iter(methods)))
        if self.method not in methods:
            known = list(filter(None, methods))
            raise SpecError(
                f"sync.method={self.method} is no method of sync={self.word}{did_you_mean(self.method, known)}"
            )
        self._refuse_unused()
        if self.word == "local" and not self.every:
            structs.force_setattr(self, "every", LOCAL_STEPS)
        self._refuse_misfits()

    @property
    def exact(self) -> bool:
        """Whether every step's gradients are the sum over all ranks, as one rank would compute them."""
        return self.word == "all_reduce" or (self.method == "sync" and not self.backup)

    def _refuse_unused(self) -> None:
        """A number that the method does not use was meant for another one."""
        used = ("word", "method", "bucket_bytes", *METHODS[self.word][self.method])
        for field in structs.fields(self):
            if field.name not in used and getattr(self, field.name) != field.default:
                whose = [f"{w}/{m}" for w, ms in METHODS.items() for m, names in ms.items() if field.name in names]
                chosen = f"sync={self.word}" + (f",sync.method={self.method}" if self.method else "")
                raise SpecError(
                    f"sync.{field.name} says nothing to {chosen}; it belongs to {', '.join(whose)}. Leave it out, or "
                    "change the word or the method."
                )

    def _refuse_misfits(self) -> None:
        for name in ("start", "every", "overlap", "bound", "backup", "bucket_bytes"):
            if getattr(self, name) < 0:
                raise SpecError(f"sync.{name}={getattr(self, name)}: it cannot be negative.")
        for name in ("rank", "fragments"):
            if getattr(self, name) < 1:
                raise SpecError(f"sync.{name}={getattr(self, name)}: it must be at least 1.")
        if not 0 < self.density <= 1:
            raise SpecError(f"sync.density={self.density}: it is the share of elements that are sent, above 0 up to 1.")
        if not self.outer_lr > 0 or not 0 <= self.outer_momentum < 1:
            raise SpecError("sync.outer_lr must be above 0, sync.outer_momentum at least 0 and below 1.")
        self._refuse_overlaps()

    def _refuse_overlaps(self) -> None:
        if self.method == "post_local" and not self.start:
            raise SpecError("sync.method=post_local needs sync.start, the step from which on replicas step locally.")
        if self.word == "compressed" and self.overlap > 1:
            raise SpecError(f"sync.overlap={self.overlap} with sync=compressed: sums can be one step late, or none.")
        if self.word == "local" and self.overlap >= self.every:
            raise SpecError(
                f"sync.overlap={self.overlap} must be below sync.every={self.every}: what is sent must have arrived "
                "before it is sent again."
            )
        if self.method == "streaming" and self.fragments > self.every:
            raise SpecError(
                f"sync.fragments={self.fragments} is more than sync.every={self.every}: each has a step of its own."
            )
