"""examples/serve.py: our own class in transformers' server, asked by OpenAI's client."""

import concurrent.futures
import functools
import importlib.util
import shutil
import socket
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers
from example_scripts import run_in_process
from model_fixtures import tiny_model, write_chain
from transformers.utils.import_utils import is_serve_available

from scratch_gpt2.prediction import respond

if not is_serve_available():
    pytest.skip('transformers serve needs: pip install "transformers[serving]"', allow_module_level=True)
import openai
from transformers.cli.serving import server
from transformers.cli.serving import utils as serving_utils

SERVE = Path(__file__).resolve().parents[1] / "examples" / "serve.py"
PROMPT = "The cat sat on"


@pytest.fixture(scope="module")
def model(tiny_tokenizer):
    special = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), tiny_tokenizer.eos_token_id)
    return tiny_model(vocab_size=len(tiny_tokenizer), n_positions=256, tie_word_embeddings=False, **special)


@pytest.fixture(scope="module")
def folder(model, tiny_tokenizer, tmp_path_factory):
    """A model whose chat answers begin with " The hat is on the mat." and end there."""
    folder = tmp_path_factory.mktemp("model")
    write_chain(model, [tiny_tokenizer.convert_tokens_to_ids("Ċ"), *reply(tiny_tokenizer)])
    model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


def reply(tokenizer):
    return [*dict.fromkeys(tokenizer(" The hat is on the mat.").input_ids), tokenizer.eos_token_id]


@pytest.fixture(scope="module")
def client(folder):
    """A client of the script's own server, which runs in a thread."""
    spec = importlib.util.spec_from_file_location("serve", SERVE)
    script = importlib.util.module_from_spec(spec)
    with socket.socket() as unused, pytest.MonkeyPatch.context() as patch:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        unused.close()
        patch.setitem(sys.modules, "serve", script)
        spec.loader.exec_module(script)
        running = []
        serve = functools.partial(script.Serve, device="cpu", non_blocking=True)
        patch.setattr(script, "Serve", lambda *args, **options: running.append(serve(*args, **options)))
        patch.setattr(transformers, "ScratchGPT2ForCausalLM", None, raising=False)
        patch.setattr(server, "build_server", server.build_server)
        patch.setattr(sys, "argv", [str(SERVE), "--model", str(folder), "--port", str(port)])
        script.main()
        try:
            wait_for(port)
            with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="any", max_retries=0) as client:
                yield client
        finally:
            running[0].kill_server()


def wait_for(port):
    deadline = time.monotonic() + 60
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def written(model, tokenizer, count):
    """What greedy search continues PROMPT with."""
    inputs = tokenizer(PROMPT, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=count, do_sample=False)[0, inputs.input_ids.shape[1] :]
    return tokenizer.decode(ids, skip_special_tokens=True)


def test_completions(client, folder, model, tiny_tokenizer):
    ask = functools.partial(client.completions.create, model=str(folder), prompt=PROMPT, temperature=0)
    [choice] = ask(max_tokens=3).choices
    assert (choice.text, choice.finish_reason) == (written(model, tiny_tokenizer, 3), "length")
    chunks = [chunk.choices[0] for chunk in ask(max_tokens=3, stream=True)]
    assert "".join(chunk.text for chunk in chunks) == choice.text
    assert [chunk.finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    stop = choice.text[2:4]
    [stopped] = ask(max_tokens=3, stop=[stop]).choices
    assert stopped.finish_reason == "stop" and stop in stopped.text and choice.text.startswith(stopped.text)
    assert len(stopped.text) < len(choice.text)


def test_an_answer_ends_with_the_context(client, folder):
    """The server asks for 1,024 tokens unless the client says how many; here six find room."""
    completion = client.completions.create(model=str(folder), prompt="\n" * 250, temperature=0)
    [choice] = completion.choices
    assert (choice.finish_reason, completion.usage.total_tokens) == ("length", 256), completion


def test_chat(client, folder, model, tiny_tokenizer):
    messages = [{"role": "user", "content": "Where is the hat?"}]
    ask = functools.partial(client.chat.completions.create, model=str(folder), messages=messages, temperature=0)
    prompt = tiny_tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    [expected] = respond(model, tiny_tokenizer, [prompt], max_new_tokens=40, do_sample=False)
    [choice] = ask(max_tokens=40).choices
    assert expected.stopped and choice.finish_reason == "stop"
    assert choice.message.content.strip() == expected.text != ""
    chunks = [chunk.choices[0] for chunk in ask(max_tokens=40, stream=True)]
    assert "".join(chunk.delta.content or "" for chunk in chunks) == choice.message.content
    assert chunks[-1].finish_reason == "stop"
    assert ask(max_tokens=2).choices[0].finish_reason == "length"


def test_a_temperature_samples(client, folder):
    torch.manual_seed(0)
    ask = functools.partial(client.completions.create, model=str(folder), prompt=PROMPT, max_tokens=12)
    assert len({ask(temperature=5.0).choices[0].text for _ in range(4)}) > 1
    assert len({ask(temperature=0).choices[0].text for _ in range(4)}) == 1


def test_many_clients(client, folder):
    """Each gets the answer to its own prompt."""
    prompts = [f"The {word} sat" for word in ("cat", "rat", "hat", "mat")] * 2

    def ask(prompt):
        options = {"model": str(folder), "prompt": prompt, "max_tokens": 6, "temperature": 0}
        return client.completions.create(**options).choices[0].text

    alone = {prompt: ask(prompt) for prompt in prompts}
    with concurrent.futures.ThreadPoolExecutor(len(prompts)) as pool:
        assert list(pool.map(ask, prompts)) == [alone[prompt] for prompt in prompts]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": "a" * 256}, "The prompt has 256 tokens, but the model's context is 256."),
        ({"prompt": ""}, "The input is empty: 1 rows of 0 tokens; give at least one of each."),
        ({"max_tokens": 0}, "`max_new_tokens` must be greater than 0, but is 0."),
        ({"messages": [{"role": "dog", "content": "a"}]}, "Chat role dog is not known here: use user and"),
        (
            {"messages": [{"role": "user", "content": "<|endoftext|>"}]},
            "A chat message must not contain <|endoftext|>",
        ),
    ],
)
def test_errors_are_json(options, message, client, folder):
    endpoint = client.chat.completions if "messages" in options else client.completions
    defaults = {"max_tokens": 4} | ({} if "messages" in options else {"prompt": PROMPT})
    for _ in range(2):  # the connection stays open
        with pytest.raises(openai.BadRequestError) as error:
            endpoint.create(model=str(folder), **defaults | options)
        assert error.value.body["message"].startswith(message)


def test_errors_of_streams_are_json(client, folder, model, tiny_tokenizer, monkeypatch):
    """Both before the first token and after it, whatever is in the message."""
    ask = functools.partial(client.completions.create, model=str(folder), prompt=PROMPT, stream=True, temperature=0)
    for options, message in (
        ({"prompt": "a" * 256}, "The prompt has 256 tokens, but the model's context is 256."),
        ({"max_tokens": 0}, "`max_new_tokens` must be greater than 0, but is 0."),
        ({"frequency_penalty": -3}, "`penalty` has to be a strictly positive float, but is -2.0"),
    ):
        with pytest.raises(openai.APIError) as error:
            list(ask(**{"max_tokens": 4} | options))
        assert error.value.message == message

    served, message = sys.modules["serve"].ServedGPT2, 'No "hat" \\ in\nZürich'
    generate = served.generate

    def generate_and_fail(self, **kwargs):
        generate(self, **kwargs)
        raise ValueError(message)

    monkeypatch.setattr(served, "generate", generate_and_fail)
    monkeypatch.setattr(serving_utils.DirectStreamer, "end", lambda self: None)
    text = ""
    with pytest.raises(openai.APIError) as error:
        for chunk in ask(max_tokens=3):
            text += chunk.choices[0].text
    assert (error.value.message, text) == (message, written(model, tiny_tokenizer, 3))


def test_other_requests(client, folder):
    assert [model.id for model in client.models.list()] == [str(folder)]
    with pytest.raises(openai.BadRequestError) as error:
        client.completions.create(model="other", prompt=PROMPT)
    assert error.value.response.json() == {"detail": f"Server is pinned to '{folder}'; requested 'other'."}


def test_what_cannot_be_served(folder, monkeypatch, capsys, tmp_path):
    adapter, damaged = tmp_path / "adapter", tmp_path / "damaged"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    shutil.copytree(folder, damaged)
    (damaged / "tokenizer.json").write_text("{")
    for name, message in (
        (adapter, "is an adapter; merge it by examples/export.py, and serve the folder that it writes."),
        (tmp_path / "none", f"{tmp_path / 'none'} does not exist; give an existing folder or a Hub id."),
        (SERVE.parents[1] / "space/checkpoints/spam", "spam is a classifier; give a language model."),
        (damaged, "double quotes: line 1 column 2 (char 1)); copy them again."),
    ):
        code, _, stderr = run_in_process(SERVE, monkeypatch, capsys, "--model", name)
        assert code == 1 and stderr.strip().splitlines()[-1].endswith(message)
