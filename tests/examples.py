"""`examples`: how often hypothesis tries a test, fewer times where slow tests are left out."""

from __future__ import annotations

from typing import Any

from hypothesis import settings

FEWEST = 4


def examples(count: int, **more: Any) -> settings:
    """A decorator: `count` examples under `make test-all`, a fifth of them (4 or more) under `make test`."""
    share = settings.default.max_examples / 100  # of the profile that tests/conftest.py loads
    return settings(max_examples=max(min(count, FEWEST), round(count * share)), deadline=None, **more)
