"""Standard output kept for results, and libraries kept from talking.

Both work on the file descriptors, because parts of torch and vLLM write from C++.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO


@contextmanager
def reserved_stdout() -> Iterator[TextIO]:
    """Give the real standard output to the caller alone; what anybody else prints goes to standard error."""
    sys.stdout.flush()
    real = os.dup(1)
    os.dup2(2, 1)
    try:
        with os.fdopen(os.dup(real), "w", encoding="utf-8") as stream:
            yield stream
    finally:
        sys.stdout.flush()
        os.dup2(real, 1)
        os.close(real)


@contextmanager
def hidden_output(is_hidden: bool) -> Iterator[None]:
    """Keep both streams quiet; if the block raises, what was said comes out on standard error after all."""
    if not is_hidden:
        yield
        return
    sys.stdout.flush()
    sys.stderr.flush()
    real = os.dup(1), os.dup(2)
    with tempfile.TemporaryFile() as log:
        for descriptor in (1, 2):
            os.dup2(log.fileno(), descriptor)
        try:
            yield
        except Exception:
            _restore(real)
            log.seek(0)
            sys.stderr.write(log.read().decode(errors="replace"))
            raise
        finally:
            _restore(real)
            for descriptor in real:
                os.close(descriptor)


def _restore(real: tuple[int, int]) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(real[0], 1)
    os.dup2(real[1], 2)
