"""Ends an engine's process whose server is gone: vLLM's own would stay, and keep the model and its memory."""

from __future__ import annotations

import os
import signal
import threading
import time
from multiprocessing import parent_process

_GRACE_S = 10.0


def end_with_parent() -> None:
    """Watches the process that started this one by `multiprocessing`; does nothing in any other process."""
    parent = parent_process()
    if parent is None:
        return

    def watch() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)  # vLLM's way, in which it ends its workers
        time.sleep(_GRACE_S)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="candor-orphan", daemon=True).start()
