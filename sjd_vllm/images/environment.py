"""The one place that sets environment variables, all of them vLLM's; what the user has set already stays."""

from __future__ import annotations

import os

_DEFAULTS = {
    # The engine lives in this process: no second start of Python, and Ctrl-C reaches it.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # vLLM's CPU build pins threads to cores by itself, which loses on machines whose cores are shared.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}
_QUIET_DEFAULTS = {
    "VLLM_LOGGING_LEVEL": "ERROR",
    # Standard output is for results.
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    "TRANSFORMERS_VERBOSITY": "error",
}


_num_spare_threads = 0  # as `max_cpu_threads` says


def prepare_environment(*, is_quiet: bool = False) -> None:
    """Set what is not set; call before vLLM is imported, and best before torch is.

    Args:
        is_quiet: also keep vLLM and Transformers from logging anything below an error.
    """
    global _num_spare_threads
    cores = num_cores()
    if "OMP_NUM_THREADS" not in os.environ:
        _num_spare_threads = cores
    defaults = {
        **_DEFAULTS,
        **(_QUIET_DEFAULTS if is_quiet else {}),
        # Half the cores: all threads wait for the slowest at every operator, so one busy core would stop them all. The
        # engine takes more for a step where that is measured to be faster.
        "OMP_NUM_THREADS": str(max(1, cores // 2)),
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def prepare_server_environment() -> None:
    """The same for a server, which answers in this process and has its engine in another, as vLLM does by itself."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    prepare_environment()


def max_cpu_threads() -> int:
    """What the engine's setting of that name should be: all cores, or 0 where the user has set OMP_NUM_THREADS."""
    return _num_spare_threads


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
