"""A module that takes as long to import as torch does."""

from __future__ import annotations

import time

time.sleep(0.5)
