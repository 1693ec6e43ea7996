"""A judge on loopback for the tests of the judge, and its script run in their process."""

import json
import runpy
import sys
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from scratch_gpt2.evaluation.chat_client import Endpoint
from scratch_gpt2.evaluation.judge import (
    JudgedRow,
    judge,
)

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "judge.py"
KEY = "sk-secret-0123456789"


def completion(content, finish_reason="stop"):
    message = {"role": "assistant", "content": content}
    return {"choices": [{"index": 0, "finish_reason": finish_reason, "message": message}], "id": "1", "created": 1}


class Reply:
    """What the server does with one request."""

    def __init__(self, body="", status=200, headers=None, wait=0.0, cut=0, drip=0.0):
        body = body if isinstance(body, str) else json.dumps(body)
        self.body, self.status, self.headers = body.encode(), status, headers or {}
        self.wait, self.cut, self.drip = wait, cut, drip


@contextmanager
def serving(answer):
    """A server on loopback; `answer(request body, number of the request)` is a Reply or a text that the judge says.
    Yields the address and the list of requests: (path, headers, body, time)."""
    requests, stopped = [], threading.Event()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append((self.path, dict(self.headers), body, time.monotonic()))
            reply = answer(body, len(requests))
            if isinstance(reply, str):
                reply = Reply(completion(reply))
            stopped.wait(reply.wait)
            try:
                self.send_response(reply.status)
                for name, value in {"Content-Length": str(len(reply.body)), **reply.headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                for byte in reply.body if reply.drip else ():
                    self.wfile.write(bytes([byte]))
                    stopped.wait(reply.drip)
                if not reply.drip:
                    self.wfile.write(reply.body[: len(reply.body) - reply.cut])
                self.close_connection = bool(reply.cut)
            except OSError:
                self.close_connection = True  # the client has gone

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", requests
    finally:
        stopped.set()
        server.shutdown()
        server.server_close()


def rows_of(responses):
    return [JudgedRow("Name a colour.", "", "Red.", response) for response in responses]


def response_in(body):
    """What the judge is asked to score, read back from a request."""
    return json.loads(body["messages"][1]["content"].split("\n")[1])["response"]


def run_judge(address, folder, responses=("Blue.",), concurrency=1, **options):
    endpoint = Endpoint(model="a-judge", base_url=address, **options)
    return judge(rows_of(responses), endpoint, folder / "scores.jsonl", concurrency)


def run_script(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["judge.py", *map(str, arguments)])
    try:
        runpy.run_path(str(EXAMPLE), run_name="__main__")
    except SystemExit as error:
        assert error.code == 1
    output = capsys.readouterr()
    return output.out, [line for line in output.err.splitlines() if line.startswith("error:")]


def write_responses(folder, responses=("Blue.",), **fields):
    file = folder / "responses.json"
    row = {"instruction": "Name a colour.", "input": "", "output": "Red."}
    file.write_text(json.dumps([row | {"response": response} | fields for response in responses]))
    return file
