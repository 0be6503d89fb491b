"""A module that starts a thread when it is imported, as some native libraries do."""

from __future__ import annotations

import threading

threading.Thread(target=threading.Event().wait, args=(600,), daemon=True).start()
