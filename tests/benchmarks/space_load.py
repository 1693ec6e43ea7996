"""The Space under load: visitors who write at the same time, then many texts in a row with an eye on the memory.

    python tests/benchmarks/space_load.py                                   8 visitors for 60 seconds, 200 texts
    python tests/benchmarks/space_load.py --visitors 2 --seconds 10 --texts 10 --checkpoints /tmp/tiny

Starts `space/app.py` in a process of its own and talks to it with Gradio's client. Each visitor asks for a completion,
waits for its end and asks again; `first` and `total` are seconds from the asking to the first piece of text and to the
end, waiting in the queue included. Memory is VmRSS of the server (Linux).
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

ROOT = Path(__file__).resolve().parents[2]
MODEL_AND_SETTINGS = ("base", "The king said", 0.8, 50, 0.95, 1.1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoints", default=str(ROOT / "space" / "checkpoints"))
    parser.add_argument("--visitors", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--texts", type=int, default=200, help="Texts in a row, after the visitors have left.")
    parser.add_argument("--tokens", type=int, default=60, help="Length of each text.")
    arguments = parser.parse_args()

    command = [sys.executable, "-u", str(ROOT / "space" / "app.py"), "--checkpoints", arguments.checkpoints]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"}
    ) as server:
        try:
            address = wait_for_address(server)
            Client(address, verbose=False).predict(*settings(8, 0), api_name="/complete")  # loads the model
            crowd(address, arguments)
            in_a_row(address, server.pid, arguments)
        finally:
            server.terminate()


def wait_for_address(server: subprocess.Popen) -> str:
    for line in server.stdout:
        if found := re.search(r"http://\S+", line):
            return found.group()
    raise RuntimeError("The Space has ended before it printed its address.")


def settings(tokens: int, seed: int) -> tuple:
    return (*MODEL_AND_SETTINGS, tokens, seed, "")


def crowd(address: str, arguments) -> None:
    times: list[tuple[float, float]] = []
    dropped: list[str] = []
    end = time.monotonic() + arguments.seconds
    visitors = [
        threading.Thread(target=visit, args=(address, arguments.tokens, number, end, times, dropped))
        for number in range(arguments.visitors)
    ]
    for visitor in visitors:
        visitor.start()
    for visitor in visitors:
        visitor.join()
    print(f"{arguments.visitors} visitors, {arguments.seconds:.0f} s, {arguments.tokens} tokens a text")
    print(f"texts {len(times)}, dropped {len(dropped)} {' '.join(sorted(set(dropped)))}".rstrip())
    if not times:
        raise RuntimeError("No visitor has got a text.")
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


def in_a_row(address: str, pid: int, arguments) -> None:
    client = Client(address, verbose=False)
    megabytes = []
    for seed in range(arguments.texts):
        client.predict(*settings(arguments.tokens, seed), api_name="/complete")
        megabytes.append(resident_megabytes(pid))
    tenth = max(1, len(megabytes) // 10)
    begin, end = statistics.mean(megabytes[tenth : 2 * tenth]), statistics.mean(megabytes[-tenth:])
    print(f"memory over {len(megabytes)} texts: {begin:.1f} MB in the second tenth, {end:.1f} MB in the last")


def resident_megabytes(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


if __name__ == "__main__":
    main()
