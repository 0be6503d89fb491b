"""The process's random generators: seeded before each sample of the user's code, and given back as they were."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def untouched_generators(active: bool = True) -> Iterator[None]:
    """Whatever happens inside, `random`, numpy's legacy generator and torch's CPU one come out as they went in."""
    if not active:
        yield
        return
    plain = random.getstate()
    numpy, torch = sys.modules.get("numpy"), sys.modules.get("torch")
    legacy = numpy.random.get_state() if numpy else None
    default = torch.default_generator.get_state() if torch else None
    try:
        yield
    finally:
        random.setstate(plain)
        if numpy:
            numpy.random.set_state(legacy)
        if torch:
            torch.default_generator.set_state(default)


def seed_generators(seed: int) -> None:
    """Seed `random`, and numpy's legacy generator and torch's CPU generator where those are imported."""
    random.seed(seed)
    numpy, torch = sys.modules.get("numpy"), sys.modules.get("torch")
    if numpy:
        numpy.random.seed(seed & 0xFFFFFFFF)
    if torch:
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would also touch every accelerator
