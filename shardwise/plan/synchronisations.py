"""Which synchronisation goes with what: a table whose every cell a test shows; what is not in it is refused."""

from __future__ import annotations

from collections.abc import Sequence

from shardwise.errors import SpecError
from shardwise.spec.plan import Plan

# What a method can be combined with.
FEATURES = {
    "microbatches": "several microbatches a step",
    "pipeline": "stages of the model on several ranks (pipeline=2)",
    "shard": "states, gradients or parameters sharded over ranks (shard=2)",
    "tensor": "layers split over several ranks (tensor=2)",
    "float16": "gradients under a loss scale that changes",
    "batch_norm": "batch norms with statistics over all ranks (batch_norm='sync')",
    "exact": "the same bits on any number of ranks (exact=true)",
    "coupled": "a loss over all ranks' outputs together (coupled='gather')",
    "own_loop": "a script that calls backward and its optimizer itself (run.prepare)",
    "resume": "a checkpoint goes on as if nothing had happened",
    "other_ranks": "a checkpoint goes on with another number of ranks",
}
LOCAL = ("microbatches", "resume", "other_ranks")
SUMMED = ("microbatches", "own_loop", "resume", "other_ranks")
CLOCKED = ("microbatches", "other_ranks")  # what is computed depends on who was first
SYNCHRONISATIONS: dict[tuple[str, str], tuple[str, ...]] = {
    ("all_reduce", ""): tuple(FEATURES),
    ("auto", ""): LOCAL,
    ("compressed", "int8"): SUMMED,
    ("compressed", "bf16"): SUMMED,
    ("compressed", "topk"): SUMMED,
    ("compressed", "powersgd"): SUMMED,
    ("param_server", "sync"): ("microbatches", "float16", "batch_norm", "coupled", "resume", "other_ranks"),
    ("param_server", "backup"): CLOCKED,
    ("param_server", "async"): CLOCKED,
    ("param_server", "stale"): CLOCKED,
    ("local", "sgd"): LOCAL,
    ("local", "post_local"): LOCAL,
    ("local", "diloco"): LOCAL,
    ("local", "sparse"): LOCAL,
    ("local", "streaming"): LOCAL,
}


def refuse_unshown(plan: Plan) -> None:
    """Raise SpecError for a synchronisation, or a combination of it in the plan, that no test has shown to work."""
    if _key(plan) not in SYNCHRONISATIONS:
        raise SpecError(f"the plan asks for {_called(plan)}, which this version cannot run yet; use sync=all_reduce.")
    asked = {
        "exact": ("exact=true", plan.exact),
        "float16": ("precision=float16", plan.precision == "float16"),
        "microbatches": (f"microbatches={plan.microbatches}", plan.microbatches > 1),
    }
    for feature, (said, wanted) in asked.items():
        if wanted:
            refuse_together(plan, feature, said)


def refuse_together(plan: Plan, feature: str, said: str) -> None:
    """Raise SpecError unless the plan's synchronisation is shown with one of FEATURES; `said` is how it was asked."""
    if feature in SYNCHRONISATIONS[_key(plan)]:
        return
    able = [name(*key) for key, cells in SYNCHRONISATIONS.items() if feature in cells]
    raise SpecError(
        f"{said} does not go with {_called(plan)}: nothing has shown that they work together. "
        f"It goes with {', '.join(able)}."
    )


def refuse_unallowed(plan: Plan, allow: Sequence[str]) -> None:
    """Raise SpecError for a synchronisation that changes the numbers and that the job does not allow."""
    if not plan.sync.exact and plan.sync.word not in (*allow, "auto"):
        raise SpecError(
            f"the plan's sync={plan.sync.word} changes the numbers and the job does not allow it. "
            f"Add '{plan.sync.word}' to the job's allow, or use sync=all_reduce."
        )


def name(word: str, method: str) -> str:
    """As one writes it in a plan."""
    if method == "backup":
        return f"sync={word},sync.backup=1"
    return f"sync={word}" + (f",sync.method={method}" if method else "")


def _key(plan: Plan) -> tuple[str, str]:
    """With backup workers nobody goes in step: that is a method of its own here."""
    return plan.sync.word, "backup" if plan.sync.backup else plan.sync.method


def _called(plan: Plan) -> str:
    return name(*_key(plan))
