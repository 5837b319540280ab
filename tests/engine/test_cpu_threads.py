"""The number of threads follows what was measured, by size of step, and is looked at again ever more seldom."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable

from sjd_vllm.engine.cpu_threads import FreeCores, ThreadControl


def play(control: ThreadControl, num_steps: int, seconds: Callable[[int, int], float], num_tokens: int) -> list[int]:
    """The threads of so many steps on a machine on which a step takes seconds(tokens, threads)."""
    chosen = []
    for _ in range(num_steps):
        threads = control.choose(num_tokens)
        control.observe(num_tokens, threads, seconds(num_tokens, threads))
        chosen.append(threads)
    return chosen


def idle(num_tokens: int, threads: int) -> float:
    return 1 + num_tokens / 10 / threads + 2 * threads


def busy(num_tokens: int, threads: int) -> float:
    return 1 + num_tokens / 10 * threads


def test_large_steps_take_many_threads_and_small_ones_few() -> None:
    control = ThreadControl(1, 2, lambda: 2.0)
    assert play(control, 400, idle, 130)[-100:].count(2) >= 98
    assert play(control, 400, idle, 20)[-100:].count(1) >= 98
    assert set(play(control, 50, idle, 2)) == {1}


def test_on_busy_cores_few_threads_and_seldom_another_look() -> None:
    control = ThreadControl(1, 2, lambda: 2.0)
    chosen = play(control, 4000, busy, 130)
    assert chosen[-2000:].count(2) <= 4
    assert 2 in chosen[-2000:]


def test_a_change_is_noticed() -> None:
    control = ThreadControl(1, 2, lambda: 2.0)
    play(control, 200, busy, 130)
    assert play(control, 3000, idle, 130)[-200:].count(2) > 180
    assert play(control, 300, busy, 130)[-100:].count(1) > 90


def test_many_threads_are_not_tried_on_busy_cores() -> None:
    cores = 1.1
    control = ThreadControl(1, 2, lambda: cores)
    assert set(play(control, 300, idle, 130)) == {1}
    cores = 1.9
    assert play(control, 300, idle, 130)[-100:].count(2) >= 98


def test_cores_that_others_leave_are_counted() -> None:
    """Others keep all cores busy; what this process gets beside them is its own."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count() or 1)]
    try:
        time.sleep(0.3)  # until all of them run
        counted = FreeCores()
        assert counted() == 0
        began, own = time.perf_counter(), time.process_time()
        while time.perf_counter() < began + 1:
            pass
        own_cores = (time.process_time() - own) / (time.perf_counter() - began)
        assert 0.8 * own_cores - 0.05 <= counted() <= own_cores + 0.3
    finally:
        for other in others:
            other.kill()
            other.wait()


def test_no_choice_is_no_trial() -> None:
    assert set(play(ThreadControl(2, 2), 100, idle, 130)) == {2}
