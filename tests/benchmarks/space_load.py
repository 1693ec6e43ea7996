"""Load test of the Space: concurrent visitors, then many texts in sequence to observe the memory.

    python tests/benchmarks/space_load.py                                   # 8 visitors for 60 seconds, 200 texts
    python tests/benchmarks/space_load.py --visitors 2 --seconds 10 --texts 10 --checkpoints /tmp/tiny

Starts `space/app.py` in a process of its own and sends requests with Gradio's client. Each visitor requests a
completion, waits for its end and requests the next; `first` and `total` are the seconds from the request to the first
piece of text and to the end, including the time in the queue. Memory is VmRSS of the server (Linux).
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

from gradio_client import Client
from process_memory import memory_mb

ROOT = Path(__file__).resolve().parents[2]
MODEL_AND_SETTINGS = ("base", "The king said", 0.8, 50, 0.95, 1.1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoints", default=str(ROOT / "space" / "checkpoints"))
    parser.add_argument("--visitors", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--texts", type=int, default=200, help="texts in sequence, after the visitors have left")
    parser.add_argument("--tokens", type=int, default=60, help="tokens per text")
    args = parser.parse_args()

    command = [sys.executable, "-u", str(ROOT / "space" / "app.py"), "--checkpoints", args.checkpoints]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"}
    ) as server:
        try:
            address = wait_for_address(server)
            Client(address, verbose=False).predict(*settings(8, 0), api_name="/complete")  # loads the model
            crowd(address, args)
            in_sequence(address, server.pid, args)
        finally:
            server.terminate()


def wait_for_address(server: subprocess.Popen) -> str:
    for line in server.stdout:
        if found := re.search(r"http://\S+", line):
            return found.group()
    raise RuntimeError("The Space ended before it printed its address.")


def settings(tokens: int, seed: int) -> tuple:
    return (*MODEL_AND_SETTINGS, tokens, seed, "")


def crowd(address: str, args) -> None:
    times: list[tuple[float, float]] = []
    dropped: list[str] = []
    end = time.monotonic() + args.seconds
    visitors = [
        threading.Thread(target=visit, args=(address, args.tokens, number, end, times, dropped))
        for number in range(args.visitors)
    ]
    for visitor in visitors:
        visitor.start()
    for visitor in visitors:
        visitor.join()
    print(f"{args.visitors} visitors, {args.seconds:.0f} s, {args.tokens} tokens per text")
    print(f"texts {len(times)}, dropped {len(dropped)} {' '.join(sorted(set(dropped)))}".rstrip())
    if not times:
        raise RuntimeError("No visitor received a text.")
    for name, values in zip(("first", "total"), zip(*times, strict=True), strict=True):
        values = sorted(values)
        late = values[int(0.95 * (len(values) - 1))]
        print(f"{name}: median {statistics.median(values):.2f} s, 95% within {late:.2f} s, longest {values[-1]:.2f} s")


def visit(address: str, tokens: int, seed: int, end: float, times: list, dropped: list) -> None:
    client = Client(address, verbose=False)
    while time.monotonic() < end:
        start = time.monotonic()
        try:
            job = client.submit(*settings(tokens, seed), api_name="/complete")
            first = None
            for _ in job:
                first = first or time.monotonic() - start
            job.result()
            times.append((first, time.monotonic() - start))
        except Exception as error:
            dropped.append(type(error).__name__)


def in_sequence(address: str, pid: int, args) -> None:
    client = Client(address, verbose=False)
    megabytes = []
    for seed in range(args.texts):
        client.predict(*settings(args.tokens, seed), api_name="/complete")
        megabytes.append(memory_mb("VmRSS", pid))
    tenth = max(1, len(megabytes) // 10)
    begin, end = statistics.mean(megabytes[tenth : 2 * tenth]), statistics.mean(megabytes[-tenth:])
    print(f"memory over {len(megabytes)} texts: {begin:.1f} MB in the second tenth, {end:.1f} MB in the last")


if __name__ == "__main__":
    main()
