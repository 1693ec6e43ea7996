"""Which models the Space loads: embedded ones, adapters, those of one folder, the Hub's; and which it refuses."""

import json
import shutil
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import pytest
import torch

pytest.importorskip("gradio", reason="the Space needs pip install '.[space]'")

from hub_server import LoopbackHub, Repository
from peft import PeftModel
from test_space import CLASSIFIER, LANGUAGE, SENTENCE, handlers, models, save_untrained

from scratch_gpt2 import ScratchGPT2Config, ScratchGPT2ForCausalLM
from scratch_gpt2.training.adapters import add_lora


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_tokenizer) -> Path:
    return save_untrained(tmp_path_factory.mktemp("embedded"), tiny_tokenizer)


def test_local_models_stay_below_their_folder(folder, tmp_path):
    inside, outside = tmp_path / "models", tmp_path / "secret"
    inside.mkdir()
    for target in (inside / "mine", outside):
        target.mkdir()
        for file in (folder / "base").iterdir():
            (target / file.name).write_bytes(file.read_bytes())
    (inside / "link").symlink_to(outside)
    local = models.Checkpoints(folder, inside)
    assert local.choices(LANGUAGE)[:3] == ["base", "assistant", "folder: mine"]
    assert local.choices(CLASSIFIER) == ["spam"]
    (inside / "broken").mkdir()
    (inside / "broken" / "config.json").write_text('{"model_type": "gpt2"}')
    assert local.choices(LANGUAGE) == ["base", "assistant", "folder: mine"]
    local.load("folder: mine", LANGUAGE)
    outsiders = ("../secret", "link", str(outside), "mine/../../secret")
    for name in (*outsiders, ".", "", "a\0b", "x" * 999, "\ud800", "nothing"):
        with pytest.raises(FileNotFoundError, match="is not among the models of this machine"):
            local.load(f"folder: {name}", LANGUAGE)
    for name in ("../secret", str(outside), "a b", "x/y/z", "", "a\nb"):
        with pytest.raises(FileNotFoundError, match="is not the name of a model; choose one from the list"):
            local.load(name, LANGUAGE)
    with pytest.raises(FileNotFoundError, match="is not among the models of this machine"):
        models.Checkpoints(folder).load("folder: mine", LANGUAGE)


@pytest.fixture
def adapters(folder, tmp_path, tiny_tokenizer):
    """The base next to trained adapters whose base_model_name_or_path no longer exists."""
    shutil.copytree(folder / "base", tmp_path / "base")
    for name, task_type in (("assistant", "CAUSAL_LM"), ("spam", "SEQ_CLS")):
        model_class = models.EMBEDDED[name]
        config = ScratchGPT2Config.from_pretrained(folder / name)
        model = add_lora(model_class.from_pretrained(tmp_path / "base", config=config), task_type, rank=2, alpha=4)
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.1)
        model.peft_config["default"].base_model_name_or_path = "/elsewhere/runs/base"
        model.to(torch.bfloat16).save_pretrained(tmp_path / name)
    config.save_pretrained(tmp_path / "spam")
    return tmp_path


def test_adapters_are_merged_into_the_base_beside_them(adapters, monkeypatch):
    def no_network(*arguments):
        raise AssertionError("asked the network")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    checkpoints = models.Checkpoints(adapters)
    base, tokenizer = checkpoints.load("base", LANGUAGE)
    ids = torch.tensor([tokenizer(SENTENCE)["input_ids"]])
    for name, model_class in (("assistant", LANGUAGE), ("spam", CLASSIFIER)):
        model, _ = checkpoints.load(name, model_class)
        assert type(model) is model_class and model.dtype == torch.float32 and not model.training
        config = model.config if model_class is CLASSIFIER else base.config
        plain = model_class.from_pretrained(adapters / "base", config=config)
        unmerged = PeftModel.from_pretrained(plain, adapters / name).eval()
        torch.testing.assert_close(model(ids).logits, unmerged(ids).logits, rtol=1e-4, atol=1e-5)
        states = [part.base_model(ids).last_hidden_state for part in (model, base)]
        assert not torch.allclose(*states, atol=1e-3)
    desk = handlers.Handlers(checkpoints)
    *_, (_, talk, _) = desk.chat("the cat?", [], "assistant", 0.7, 0.9, 5)
    assert talk[-1]["role"] == "assistant" and talk[-1]["content"]
    assert set(desk.classify("spam", SENTENCE)[0]) == {"not spam", "spam"}


def test_a_download_does_not_block_other_visitors(folder, monkeypatch):
    """Calls for the same model wait for the download, and get its result or its error."""
    checkpoints, reading, waiting, may_end = models.Checkpoints(folder), Event(), Event(), Event()
    original, original_wait = checkpoints.find, models.wait

    def watched(*arguments):
        waiting.set()
        return original_wait(*arguments)

    def slow(name):
        if name in ("assistant", "nobody/nothing"):
            reading.set()
            assert may_end.wait(60)
        return original(name)

    monkeypatch.setattr(checkpoints, "find", slow)
    monkeypatch.setattr(models, "wait", watched)
    for name in ("assistant", "nobody/nothing"):
        for event in (reading, waiting, may_end):
            event.clear()
        with ThreadPoolExecutor(2) as pool:
            first = pool.submit(checkpoints.load, name, LANGUAGE)
            assert reading.wait(60)
            second = pool.submit(checkpoints.load, name, LANGUAGE)
            assert waiting.wait(60)
            checkpoints.load("base", LANGUAGE)
            assert not first.done() and not second.done()
            may_end.set()
            if name == "assistant":
                assert first.result() is second.result() is checkpoints.load(name, LANGUAGE)
            else:
                assert first.exception() is second.exception()
                assert "could not be downloaded from the Hugging Face Hub" in str(first.exception())
    assert checkpoints.loading == {}
    with pytest.raises(FileNotFoundError, match="could not be downloaded"):  # looked for again
        checkpoints.load("nobody/nothing", LANGUAGE)


def test_waiting_for_a_load_times_out(folder, monkeypatch):
    checkpoints, reading, may_end = models.Checkpoints(folder), Event(), Event()
    original = checkpoints.find
    monkeypatch.setattr(models, "MAX_WAIT", 0.1)
    monkeypatch.setattr(checkpoints, "find", lambda name: (reading.set(), may_end.wait(60), original(name))[2])
    with ThreadPoolExecutor(1) as pool:
        loading = pool.submit(checkpoints.load, "assistant", LANGUAGE)
        assert reading.wait(60)
        with pytest.raises(ValueError) as error:
            checkpoints.load("assistant", LANGUAGE)
        may_end.set()
        assert str(error.value) == "The model 'assistant' is still being loaded; try again in a moment."
        assert loading.result()


def test_models_that_are_read_at_the_same_time_keep_their_weights(folder):
    """transformers switches the tying of weights off for the whole process while it reads a model."""
    for _ in range(3):
        checkpoints = models.Checkpoints(folder)
        with ThreadPoolExecutor(3) as pool:
            loaded = list(pool.map(checkpoints.load, models.EMBEDDED, models.EMBEDDED.values()))
        for model, _ in loaded[:2]:
            assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_embedded_models_are_preloaded(folder):
    checkpoints = models.Checkpoints(folder)
    checkpoints.preload()
    assert set(checkpoints.loaded) == set(models.EMBEDDED.items())


def test_an_adapter_that_does_not_fit_is_refused(adapters):
    def message(name, model_class) -> str:
        with pytest.raises((ValueError, FileNotFoundError)) as error:
            models.Checkpoints(adapters).load(name, model_class)
        return str(error.value)

    expected = "The adapter 'spam' is for another task; choose a model that writes texts, such as base."
    assert message("spam", LANGUAGE) == expected
    expected = "The adapter 'assistant' is for another task; choose a model that classifies texts, such as spam."
    assert message("assistant", CLASSIFIER) == expected
    (adapters / "spam" / "config.json").unlink()
    assert message("spam", CLASSIFIER) == "The adapter 'spam' has no config.json that names its labels; add one."
    config = ScratchGPT2Config.from_pretrained(adapters / "base")
    config.n_embd = 16
    ScratchGPT2ForCausalLM(config).save_pretrained(adapters / "base")
    assert message("assistant", LANGUAGE) == "The adapter 'assistant' does not fit its base 'base'; choose another."
    shutil.rmtree(adapters / "base")
    expected = "The adapter 'assistant' needs the file adapter_model.safetensors and its base 'base' in the folder "
    expected += "next to it."
    assert message("assistant", LANGUAGE) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "bert"}, "'mine' is not a GPT-2; its model_type is 'bert'."),
        ({"n_layer": 10**6}, "'mine' has 12,288,025,664 parameters; at most 400,000,000 are loaded here."),
    ],
)
def test_what_is_too_large_or_no_gpt2_is_not_loaded(folder, tmp_path, change, message):
    target = tmp_path / "mine"
    target.mkdir()
    for file in (folder / "base").iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    config = json.loads((target / "config.json").read_text()) | change
    (target / "config.json").write_text(json.dumps(config))
    local = models.Checkpoints(folder, tmp_path)
    with pytest.raises(ValueError) as error:
        local.load("folder: mine", LANGUAGE)
    assert str(error.value) == message
    with pytest.raises(ValueError, match="'base' does not classify texts; choose a model"):
        local.load("base", CLASSIFIER)
    (target / "model.safetensors").rename(target / "pytorch_model.bin")
    with pytest.raises(ValueError, match="'mine' holds no "):
        local.load("folder: mine", LANGUAGE)


def test_gpt2_has_as_many_parameters_as_published():
    assert models.count_parameters({}) == 124_318_464  # 124,439,808 with biases and norms


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub on loopback, which the Space takes for the real one."""
    with LoopbackHub(tokens={}) as hub:
        settings = {"HF_HUB_OFFLINE": False, "ENDPOINT": hub.url, "HF_HUB_CACHE": str(tmp_path / "cache")}
        settings["HUGGINGFACE_CO_URL_TEMPLATE"] = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        for name, value in settings.items():
            monkeypatch.setattr(models.constants, name, value)
        yield hub


def publish(hub, name: str, folder: Path, **more: bytes) -> None:
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    hub.repositories[name] = Repository(private=False)
    hub.repositories[name].add_commit("a model", files | more)


def downloads(hub) -> list[str]:
    return [request for request in hub.requests if "/resolve/" in request]


def test_a_model_of_the_hub_is_downloaded_without_its_code(hub, folder):
    publish(hub, "alice/tiny", folder / "base", **{"evil.py": b"1 / 0", "pytorch_model.bin": b"x", "a/b.bin": b"x"})
    checkpoints = models.Checkpoints(folder)
    (model, _), (base, _) = (checkpoints.load(name, LANGUAGE) for name in ("alice/tiny", "base"))
    assert torch.equal(model.lm_head.weight, base.lm_head.weight)
    fetched = {request.rsplit("/")[-1] for request in downloads(hub)}
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= fetched
    assert not [name for name in fetched if name.endswith((".py", ".bin"))]


def test_downloads_are_bounded(hub, folder, monkeypatch):
    for name in ("alice/one", "alice/two"):
        publish(hub, name, folder / "base")
    size = (folder / "base" / "model.safetensors").stat().st_size
    publish(hub, "alice/split", folder / "base", **{"more/model.safetensors": b"x" * (3 * size)})
    publish(hub, "alice/none", folder / "base", **{"model.safetensors": b""})
    checkpoints = models.Checkpoints(folder)

    def message(name) -> str:
        with pytest.raises((ValueError, FileNotFoundError)) as error:
            checkpoints.load(name, LANGUAGE)
        return str(error.value)

    monkeypatch.setattr(models, "MAX_CHECKPOINT_BYTES", 2 * size)
    monkeypatch.setattr(models, "MAX_DOWNLOADS", 1)
    bounds = f"between 1 and {2 * size:,} are loaded here."
    assert message("alice/split") == f"'alice/split' has {4 * size:,} bytes of safetensors; {bounds}"
    assert message("alice/none") == f"'alice/none' has 0 bytes of safetensors; {bounds}"
    assert "could not be downloaded from the Hugging Face Hub" in message("alice/nothing")
    assert downloads(hub) == []
    checkpoints.load("alice/one", LANGUAGE)
    assert (
        message("alice/two")
        == "1 models have been downloaded, and no more are until the next start; choose one from the list."
    )
    checkpoints.load("alice/one", LANGUAGE)
