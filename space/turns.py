"""Scheduling: long tasks share the cores in turns of a tenth of a second, so that the texts of all visitors grow.

Short tasks and downloads have groups of their own: neither waits for long tasks.
"""

import os
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
SECONDS_A_TURN = 0.1

# Groups of Gradio's events. Each event at work holds one of Gradio's 40 threads, most of them asleep.
LONG = {"concurrency_id": "long", "concurrency_limit": 20}
SHORT = {"concurrency_id": "short", "concurrency_limit": CORES}
LOADING = {"concurrency_id": "loading", "concurrency_limit": 8}

workers = ThreadPoolExecutor(CORES, thread_name_prefix="core")  # first come, first served


def in_turns(values: Iterable) -> Iterator:
    """The first of `values`, then the latest after each turn, and the last: a page that is sent every token spends
    more time on sending than the model on writing. Values are computed only on demand."""
    iterator = iter(values)

    def turn(seconds: float) -> tuple[list, bool]:
        end = time.monotonic() + seconds
        latest = []
        for value in iterator:
            latest = [value]
            if time.monotonic() >= end:
                return latest, True
        return latest, False

    seconds, goes_on = 0, True
    while goes_on:
        latest, goes_on = workers.submit(turn, seconds).result()
        yield from latest
        seconds = SECONDS_A_TURN
