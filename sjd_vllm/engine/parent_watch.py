"""An engine process that ends with the process that started it.

vLLM's workers notice that their engine has gone; its engine process does not notice that its server was killed, and
would keep the device's memory from the server that is started in its place.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import threading
from multiprocessing.connection import wait

_LOGGER = logging.getLogger("vllm.sjd_vllm")


def end_with_parent() -> None:
    """End this process at once when its parent dies; nothing if it was not started by multiprocessing."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        wait([parent.sentinel])
        _LOGGER.error("process %d that started this engine has gone; the engine ends", parent.pid)
        os._exit(1)

    threading.Thread(target=watch, name="sjd-parent-watch", daemon=True).start()
