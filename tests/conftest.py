"""What every test needs of the process that runs them."""

from __future__ import annotations

import signal

import pytest
from hypothesis import settings

# A shell starts background jobs with Ctrl-C ignored, and children inherit that: tests that send it would wait in vain
# and leave what they started running.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("quick", max_examples=20, deadline=None)
settings.register_profile("thorough", max_examples=100, deadline=None)


def pytest_configure(config: pytest.Config) -> None:
    """Hypothesis tries a fifth of its examples where slow tests are left out, as `make test` does."""
    settings.load_profile("quick" if "not slow" in config.option.markexpr else "thorough")
