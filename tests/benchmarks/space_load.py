"""The Space under load: mixed visitors at the same time, then many texts in a row with an eye on the memory.

    python tests/benchmarks/space_load.py                                   20 visitors for 60 seconds, 200 texts
    python tests/benchmarks/space_load.py --visitors 4 --seconds 10 --texts 10 --checkpoints /tmp/tiny

Starts `space/app.py` in a process of its own and talks to it with Gradio's client. Of four visitors one chats, one
completes texts, one classifies messages and has their words weighed, and one looks inside; each waits for the end of
its request and asks again. `first` and `total` are seconds from the request to the first piece of the answer and to
its end, waiting in the queue included. The Space also answers one request of each kind while it is idle. A closed tab
is a connection that ends in the middle of a text of 300 tokens; the time is until the server's processor time stands
still. Memory is VmRSS of the server (Linux).
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import threading
import time
from collections import defaultdict
from pathlib import Path
from uuid import uuid4

import httpx
from gradio_client import Client

ROOT = Path(__file__).resolve().parents[2]
SENTENCE = "The king said to the queen that the"
MESSAGE = "Congratulations! You have won a free holiday. Call 09061701461 now to claim your prize."


def requests(tokens: int) -> dict[str, list[tuple]]:
    """By kind of visitor: the arguments of each call, its API name last."""
    return {
        "chat": [("Tell me a story about a dog.", [], "assistant", 0.7, 0.9, tokens, "/chat")],
        "complete": [("base", "The king said", 0.8, 50, 0.95, 1.1, tokens, 0, "", "/complete")],
        "classify": [("spam", MESSAGE, "/classify"), ("spam", MESSAGE, "/words")],
        "look": [("base", SENTENCE, 1, 1, 0, 1, "/look")],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoints", default=str(ROOT / "space" / "checkpoints"), help="Folder of the models.")
    parser.add_argument("--visitors", type=int, default=20, help="Visitors at the same time.")
    parser.add_argument("--seconds", type=float, default=60, help="How long they ask.")
    parser.add_argument("--texts", type=int, default=200, help="Texts in a row, after the visitors have left.")
    parser.add_argument("--tokens", type=int, default=60, help="Length of each text.")
    options = parser.parse_args()

    command = [sys.executable, "-u", str(ROOT / "space" / "app.py"), "--checkpoints", options.checkpoints]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"}
    ) as server:
        try:
            address = wait_for_address(server)
            idle(address, options.tokens)
            closed_tab(address, server.pid)
            crowd(address, options)
            in_a_row(address, server.pid, options)
        finally:
            server.terminate()


def wait_for_address(server: subprocess.Popen) -> str:
    for line in server.stdout:
        if found := re.search(r"http://\S+", line):
            return found.group()
    raise RuntimeError("The Space has ended before it printed its address.")


def idle(address: str, tokens: int) -> None:
    client = Client(address, verbose=False)
    for calls in requests(tokens).values():
        for call in calls:
            first, total = ask(client, call)
            print(f"idle, {call[-1]}: first answer after {first:.2f} s, end after {total:.2f} s")


def ask(client: Client, call: tuple) -> tuple[float, float]:
    """Seconds to the first piece of the answer and to its end."""
    start = time.monotonic()
    *values, api_name = call
    job = client.submit(*values, api_name=api_name)
    first = None
    for _ in job:
        first = first or time.monotonic() - start
    job.result()
    total = time.monotonic() - start
    return first or total, total


def closed_tab(address: str, pid: int) -> None:
    """As a browser does: join the queue, read the stream of events, and drop the connection."""
    client = Client(address, verbose=False)
    index = next(i for i, endpoint in client.endpoints.items() if endpoint.api_name == "/complete")
    *values, _ = requests(300)["complete"][0]
    queue = f"{address.rstrip('/')}/gradio_api/queue"
    for _ in range(3):
        session = uuid4().hex
        body = {"data": values, "fn_index": index, "session_hash": session}
        httpx.post(f"{queue}/join", json=body).raise_for_status()
        with httpx.stream("GET", f"{queue}/data", params={"session_hash": session}) as stream:
            pieces = (line for line in stream.iter_lines() if "process_generating" in line)
            next(pieces), next(pieces)
        print(f"a closed tab frees its core after {seconds_until_idle(pid):.1f} s")


def seconds_until_idle(pid: int) -> float:
    """Until the start of the first half second in which the process uses less than a tenth of a core."""
    start, used = time.monotonic(), []
    while len(used) < 6 or used[-1][1] - used[-6][1] > 0.05:
        used.append((time.monotonic() - start, processor_seconds(pid)))
        time.sleep(0.1)
    return used[-6][0]


def processor_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def crowd(address: str, options) -> None:
    times: dict[str, list[tuple[float, float]]] = defaultdict(list)
    dropped: list[str] = []
    end = time.monotonic() + options.seconds
    kinds = list(requests(options.tokens).values())
    visitors = [
        threading.Thread(target=visit, args=(address, kinds[number % len(kinds)], end, times, dropped))
        for number in range(options.visitors)
    ]
    for visitor in visitors:
        visitor.start()
    for visitor in visitors:
        visitor.join()
    print(f"{options.visitors} visitors, {options.seconds:.0f} s, {options.tokens} tokens a text")
    print(f"answers {sum(map(len, times.values()))}, dropped {len(dropped)} {' '.join(sorted(set(dropped)))}".rstrip())
    for api_name, pairs in sorted(times.items()):
        for name, values in zip(("first", "total"), zip(*pairs, strict=True), strict=True):
            values = sorted(values)
            late = values[int(0.95 * (len(values) - 1))]
            median = statistics.median(values)
            print(f"{api_name} ({len(values)}), {name}: median {median:.2f} s, 95% within {late:.2f} s")


def visit(address: str, calls: list[tuple], end: float, times: dict, dropped: list) -> None:
    client = Client(address, verbose=False)
    while time.monotonic() < end:
        for call in calls:
            try:
                times[call[-1]].append(ask(client, call))
            except Exception as error:
                dropped.append(type(error).__name__)


def in_a_row(address: str, pid: int, options) -> None:
    client = Client(address, verbose=False)
    (call,) = requests(options.tokens)["complete"]
    megabytes = []
    for _ in range(options.texts):
        ask(client, call)
        megabytes.append(resident_megabytes(pid))
    tenth = max(1, len(megabytes) // 10)
    begin, end = statistics.mean(megabytes[tenth : 2 * tenth]), statistics.mean(megabytes[-tenth:])
    print(f"memory over {len(megabytes)} texts: {begin:.1f} MB in the second tenth, {end:.1f} MB in the last")


def resident_megabytes(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


if __name__ == "__main__":
    main()
