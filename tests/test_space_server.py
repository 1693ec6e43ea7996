"""The server of the Space through Gradio's own client, and how it shares the cores."""

# ruff: noqa: F811  (pytest passes imported fixtures by their names)

import csv
import html
import inspect
import itertools
import json
import logging
import re
import sys
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("gradio", reason="the Space needs pip install '.[space]'")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "space"))

import app
import generation
import httpx
import limits
import page
import turns
from gradio_client import Client, handle_file
from test_space import HOSTILE, SENTENCE, SETTINGS, checkpoints, folder  # noqa: F401  (the last two are fixtures)


@pytest.fixture(scope="module")
def demo(checkpoints):
    return page.build(checkpoints)


@pytest.fixture(scope="module")
def address(demo):
    _, address, _ = demo.launch(prevent_thread_lock=True, quiet=True, **app.launch_options())
    yield address
    demo.close()


@pytest.fixture(scope="module")
def client(address):
    return Client(address, verbose=False)


@pytest.fixture
def endless(monkeypatch):
    """Texts that end only when their generator is closed, at 20 tokens per second; logs tokens, starts and ends."""
    original, log = generation.write, SimpleNamespace(begun=[], steps=[], ended=[])

    def write(model, ids, sampling, begun=()):
        some = itertools.islice(original(model, ids, generation.Sampling(max_new_tokens=20)), 20)
        log.begun.append(1)
        try:
            for step in itertools.cycle([step for step in some if step.token != model.config.eos_token_id]):
                time.sleep(0.05)
                log.steps.append(1)
                yield step
        finally:
            log.ended.append(1)

    monkeypatch.setattr(generation, "write", write)
    return log


def wait_until(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.05)


def test_the_server_streams(client):
    job = client.submit(*SETTINGS[:6], 60, *SETTINGS[7:], api_name="/complete")
    text, tokens, note = job.result(timeout=120)
    assert text.startswith(SENTENCE) and tokens.count("data-pick") > 20 and note == ""
    assert len(job.outputs()) > 1
    box, talk, note = client.predict("the cat?", [], "assistant", 0.7, 0.9, 8, api_name="/chat")
    assert box == note == "" and [message["role"] for message in talk] == ["user", "assistant"]


def test_the_server_sorts_a_file(client, tmp_path):
    (tmp_path / "in.csv").write_text('text\n"=1+1"\nhello there\n')
    note, _, results = client.predict("spam", handle_file(tmp_path / "in.csv"), None, True, api_name="/classify_file")
    assert "2 rows: " in note
    rows = list(csv.reader(Path(results).read_text(encoding="utf-8").splitlines()))
    assert [row[0] for row in rows] == ["text", "'=1+1", "hello there"]


def test_the_server_answers_hostile_inputs_with_one_sentence(client, capfd):
    for name in ("50,000 characters", "empty"):
        with pytest.raises(Exception) as error:
            client.predict("spam", HOSTILE[name], api_name="/classify")
        assert str(error.value).startswith(("The text has 50,000 characters", "There is no text"))
    for text in ("secret <script>alert(1)</script>", "secret a\0b"):
        words = client.predict("spam", text, api_name="/words")
        assert html.unescape("".join(re.findall(r'title="[^"]*">([^<]*)</span>', words))) == text
    with pytest.raises(Exception, match="cannot be read; choose another"):
        client.predict("base", SENTENCE, 1234567, 1, 0, 1, api_name="/look")
    for settings in ((*SETTINGS[:2], "secret", *SETTINGS[3:]), (*SETTINGS[:7], "secret", "")):
        with pytest.raises(Exception, match=r"cannot be read|must be a number"):
            client.predict(*settings, api_name="/complete")
    written = capfd.readouterr()
    assert "secret" not in written.out + written.err and "1234567" not in written.out + written.err
    assert "Traceback" not in written.err


def forge(address: str, event: int, data: list) -> dict:
    """The answer to a request that no page sends, without what a client library would check or change."""
    session = {"session_hash": uuid.uuid4().hex}
    body = {"fn_index": event, "data": data, **session}
    with httpx.Client(base_url=f"{address}gradio_api/queue", timeout=60) as client:
        client.post("/join", content=json.dumps(body), headers={"content-type": "application/json"})
        with client.stream("GET", "/data", params=session) as lines:
            messages = (json.loads(line[5:]) for line in lines.iter_lines() if line.startswith("data:"))
            return next(message["output"] for message in messages if message["msg"] == "process_completed")


def stored(path: str) -> dict:
    return {"path": path, "meta": {"_type": "gradio.FileData"}}


def message(part: object) -> list:
    return [{"role": "user", "content": [part]}]


FORGED = {
    "too few values": ("classify", []),
    "wrong history": ("chat", ["hi", "secret", "assistant", 0.7, 0.9, 3]),
    "wrong message": ("chat", ["hi", message("secret"), "assistant", 0.7, 0.9, 3]),
    "any file": ("classify_file", ["spam", stored("/etc/passwd"), None, True]),
    "any address": ("classify_file", ["spam", stored("http://127.0.0.1:1/secret"), None, True]),
    "any file in a text": ("classify", ["spam", stored("/etc/passwd")]),
    "long path": ("classify_file", ["spam", stored("secret" * 1000), None, True]),
    "null byte": ("classify_file", ["spam", stored("secret\0"), None, True]),
    "edit without data": ("edit", [[], "assistant", 0.7, 0.9, 3]),
    "example that is not there": ("load_example", [None]),
    "button without a function": ("unnamed", []),
}


@pytest.mark.parametrize(("name", "data"), FORGED.values(), ids=FORGED.keys())
def test_forged_requests_are_refused_and_leave_nothing_in_the_log(demo, address, capfd, caplog, name, data):
    answer = forge(address, min(n for n, f in demo.fns.items() if f.api_name == name), data)
    assert answer["error"] == "This request cannot be processed; reload the page."
    written = capfd.readouterr().err + caplog.text
    assert "secret" not in written and "Traceback" not in written and "Request rejected: " in written


def test_a_conversation_holds_nothing_but_text(demo, address, capfd):
    """Gradio would create the component, and read the file that its value names."""
    part = {"type": "component", "component": "image", "value": "/etc/passwd", "constructor_args": {}, "props": {}}
    chat = min(n for n, f in demo.fns.items() if f.api_name == "chat")
    answer = forge(address, chat, ["hi", message(part), "assistant", 0.7, 0.9, 3])
    assert answer["error"] == "The value for 'Conversation' cannot be read; choose another."
    half = message({"type": "text", "text": "a\ud800"})
    _, talk, _ = forge(address, chat, ["hi", half, "assistant", 0.7, 0.9, 3])["data"]
    assert talk[0]["content"][0]["text"] == "a?" and "Traceback" not in capfd.readouterr().err


def test_no_request_skips_the_queue_or_is_recorded(demo, address):
    answer = httpx.post(f"{address}gradio_api/run/classify", json={"data": ["spam", SENTENCE]})
    assert (answer.status_code, answer.json()["detail"][:34]) == (404, "This API endpoint does not accept ")
    session = {"session_hash": "\ud800", "fn_index": 0, "data": []}
    httpx.post(f"{address}gradio_api/queue/join", content=json.dumps(session))
    assert demo._queue.cached_event_analytics_summary == {"functions": {}}


def test_the_log_names_the_kind_of_an_error_only():
    try:
        raise KeyError("secret")
    except KeyError:
        record = logging.LogRecord("uvicorn.error", 40, "", 0, "Exception in %s\n", ("ASGI",), sys.exc_info())
    assert limits.without_traceback(record)
    assert logging.Formatter().format(record) == "Exception in ASGI: KeyError"


def test_stopping_a_job_ends_its_work(client, endless):
    job = client.submit(*SETTINGS, api_name="/complete")
    wait_until(lambda: len(endless.steps) >= 5)
    job.cancel()
    wait_until(lambda: endless.ended)


def test_long_work_shares_the_cores_and_short_work_never_waits_behind_it(checkpoints):
    functions = [f for f in page.build(checkpoints).fns.values() if f.fn and f.queue]
    generating = [f for f in functions if inspect.isgeneratorfunction(f.fn)]
    assert {f.concurrency_id for f in generating} == {"long"}
    assert {f.concurrency_limit for f in generating} == {20}
    assert {"chat", "complete", "words", "classify_file", "grow_cache", "retry", "edit"} <= {
        f.name for f in generating
    }
    short = [f for f in functions if f not in generating]
    assert {f.concurrency_id for f in short} == {"short", "loading"}
    assert {"classify", "look", "look_at_head", "look_at_next", "columns"} <= {f.name for f in short}


def test_all_texts_grow_and_short_work_is_answered_while_they_are_written(address, endless):
    clients = [Client(address, verbose=False) for _ in range(turns.CORES + 3)]
    jobs = [client.submit(*SETTINGS, api_name="/complete") for client in clients[:-1]]
    wait_until(lambda: all(len(job.outputs()) > 1 for job in jobs))
    clients[-1].predict("spam", SENTENCE, api_name="/classify")
    clients[-1].predict("base", SENTENCE, 1, 1, 0, 1, api_name="/look")
    assert not endless.ended
    for job in jobs:
        job.cancel()
    wait_until(lambda: len(endless.ended) == len(jobs))


def test_long_work_comes_in_turns_and_takes_no_more_than_the_cores(monkeypatch):
    monkeypatch.setattr(turns, "SECONDS_A_TURN", 0)
    lock, working, most, closed = threading.Lock(), [], [], []

    def work():
        try:
            for value in range(5):
                with lock:
                    working.append(value)
                    most.append(len(working))
                time.sleep(0.01)
                working.pop()
                yield value
        finally:
            closed.append(1)

    with ThreadPoolExecutor(3 * turns.CORES) as pool:
        found = list(pool.map(lambda _: list(turns.in_turns(work())), range(3 * turns.CORES)))
    assert found == [[0, 1, 2, 3, 4]] * 3 * turns.CORES and max(most) <= turns.CORES
    stream = turns.in_turns(work())
    assert next(stream) == 0
    closed.clear()
    stream.close()
    assert closed == [1] and working == []
    monkeypatch.setattr(turns, "SECONDS_A_TURN", 1000)
    assert list(turns.in_turns([1, 2, 3, 4])) == [1, 4] and list(turns.in_turns([])) == []
    with pytest.raises(ZeroDivisionError):
        list(turns.in_turns(1 / n for n in (1, 0)))
