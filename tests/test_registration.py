"""The library knows our classes: in this process, in others, and in those without this package."""

import concurrent.futures
import importlib
import json
import multiprocessing
import os
import subprocess
import sys

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, pipeline

import scratch_gpt2

HEADS = {
    "AutoModel": "ScratchGPT2Model",
    "AutoModelForCausalLM": "ScratchGPT2ForCausalLM",
    "AutoModelForSequenceClassification": "ScratchGPT2ForSequenceClassification",
    "AutoModelForTokenClassification": "ScratchGPT2ForTokenClassification",
    "AutoModelForQuestionAnswering": "ScratchGPT2ForQuestionAnswering",
}
CODE = [
    "checkpoint_files.py",
    "configuration_scratch_gpt2.py",
    "heads_scratch_gpt2.py",
    "linear_cross_entropy.py",
    "modeling_scratch_gpt2.py",
]


def make_config(tokenizer):
    return scratch_gpt2.ScratchGPT2Config(
        vocab_size=len(tokenizer),
        n_positions=32,
        n_embd=16,
        n_layer=2,
        n_head=2,
        num_labels=3,
        initializer_range=0.3,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


@pytest.fixture(scope="module")
def checkpoints(tiny_tokenizer, tmp_path_factory):
    """A folder for every Auto class, holding a checkpoint of its own head and the tokenizer."""
    folder = tmp_path_factory.mktemp("checkpoints")
    torch.manual_seed(0)
    for auto_class, head in HEADS.items():
        getattr(scratch_gpt2, head)(make_config(tiny_tokenizer)).save_pretrained(folder / auto_class)
        tiny_tokenizer.save_pretrained(folder / auto_class)
    return folder


def run_python(code, *arguments, **environment):
    """Standard output of a fresh process."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    result = subprocess.run(
        command, capture_output=True, text=True, stdin=subprocess.DEVNULL, env=os.environ | environment
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_public_names():
    assert scratch_gpt2.__all__ == [
        "ScratchGPT2Config",
        "ScratchGPT2DoubleHeadsModel",
        "ScratchGPT2ForCausalLM",
        "ScratchGPT2ForQuestionAnswering",
        "ScratchGPT2ForSequenceClassification",
        "ScratchGPT2ForTokenClassification",
        "ScratchGPT2Model",
        "ScratchGPT2PreTrainedModel",
        "classify_text",
        "export_gpt2",
        "load_tokenizer",
        "train_tokenizer",
    ]
    assert all(hasattr(scratch_gpt2, name) for name in scratch_gpt2.__all__)


def test_the_config_is_known(checkpoints):
    assert type(AutoConfig.for_model("scratch_gpt2")) is scratch_gpt2.ScratchGPT2Config
    assert type(AutoConfig.from_pretrained(checkpoints / "AutoModel")) is scratch_gpt2.ScratchGPT2Config


@pytest.mark.parametrize("auto_class", HEADS)
def test_every_auto_class_builds_and_loads_its_head(auto_class, checkpoints, tiny_tokenizer):
    """From the own checkpoint and from a language model's, and our code rather than the copy beside the weights."""
    auto, head = getattr(transformers, auto_class), getattr(scratch_gpt2, HEADS[auto_class])
    assert type(auto.from_config(make_config(tiny_tokenizer))) is head
    assert type(auto.from_pretrained(checkpoints / auto_class)) is head
    assert type(auto.from_pretrained(checkpoints / auto_class, trust_remote_code=True)) is head
    assert type(auto.from_pretrained(checkpoints / "AutoModelForCausalLM")) is head


def test_a_reload_is_harmless(checkpoints):
    importlib.reload(scratch_gpt2)
    model = AutoModelForCausalLM.from_pretrained(checkpoints / "AutoModelForCausalLM")
    assert type(model) is scratch_gpt2.ScratchGPT2ForCausalLM


FRESH_IMPORT = """
import sys
import scratch_gpt2
for name in [name for name in sys.modules if name.split(".")[0] == "scratch_gpt2"]:
    del sys.modules[name]
import scratch_gpt2
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(type(model) is scratch_gpt2.ScratchGPT2ForCausalLM)
"""


def test_the_import_can_be_repeated(checkpoints):
    assert run_python(FRESH_IMPORT, checkpoints / "AutoModelForCausalLM").strip() == "True"


def load_in_worker(config, folder):
    """Runs in a process that learns of scratch_gpt2 by unpickling `config`."""
    return type(AutoModelForCausalLM.from_pretrained(folder, config=config)).__qualname__


def test_a_spawned_worker_knows_the_classes(checkpoints, tiny_tokenizer):
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
        arguments = make_config(tiny_tokenizer), checkpoints / "AutoModelForCausalLM"
        assert pool.submit(load_in_worker, *arguments).result() == "ScratchGPT2ForCausalLM"


# Processes without the package


@pytest.mark.parametrize("head", [*HEADS.values(), "ScratchGPT2DoubleHeadsModel"])
def test_a_checkpoint_takes_its_code_along(head, tiny_tokenizer, tmp_path):
    getattr(scratch_gpt2, head)(make_config(tiny_tokenizer)).save_pretrained(tmp_path)
    generation = ["generation_config.json"] if head.endswith(("CausalLM", "DoubleHeadsModel")) else []
    expected = [*CODE, "config.json", "model.safetensors", *generation]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(expected)
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    in_modeling = ("ScratchGPT2Model", "ScratchGPT2ForCausalLM")
    of_the_heads = {
        name: f"{'modeling' if head in in_modeling else 'heads'}_scratch_gpt2.{head}" for name, head in HEADS.items()
    }
    assert {name: auto_map[name] for name in HEADS} == of_the_heads
    assert auto_map["AutoConfig"] == "configuration_scratch_gpt2.ScratchGPT2Config"


WITHOUT_THE_PACKAGE = """
import sys
from pathlib import Path


class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "scratch_gpt2":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, NotInstalled())
import torch
import transformers

checkpoints, results, foreign = map(Path, sys.argv[1:])
language_model = checkpoints / "AutoModelForCausalLM"
tokenizer = transformers.AutoTokenizer.from_pretrained(language_model, trust_remote_code=True)
batch = tokenizer(["The cat sat", "The rat is under the hat"], padding=True, return_tensors="pt")
outputs = {}
for folder in sorted(checkpoints.iterdir()):
    auto = getattr(transformers, folder.name)
    model = auto.from_pretrained(folder, trust_remote_code=True).eval()
    outputs[folder.name] = model(**batch)[0]
    model.save_pretrained(results / folder.name)
    again = auto.from_pretrained(results / folder.name, trust_remote_code=True).eval()
    outputs[f"{folder.name} saved again"] = again(**batch)[0]
    new_head = auto.from_pretrained(language_model, trust_remote_code=True).eval()
    outputs[f"{folder.name} from the language model"] = new_head.base_model(**batch)[0]
    if folder.name == "AutoModelForCausalLM":
        outputs["generated"] = model.generate(**batch, max_new_tokens=5, do_sample=False)
        try:
            type(model).from_pretrained(foreign)
        except ImportError as error:
            print(error)
torch.save(outputs, results / "outputs.pt")
"""


@pytest.fixture(scope="module")
def without_the_package(checkpoints, tmp_path_factory):
    """Folder of the results, what was printed, and the folder of a checkpoint of transformers' GPT-2."""
    results, foreign = tmp_path_factory.mktemp("results"), tmp_path_factory.mktemp("gpt2")
    config = transformers.GPT2Config(vocab_size=290, n_positions=32, n_embd=16, n_layer=1, n_head=2)
    transformers.GPT2LMHeadModel(config).save_pretrained(foreign)
    cache = tmp_path_factory.mktemp("modules")
    printed = run_python(WITHOUT_THE_PACKAGE, checkpoints, results, foreign, HF_MODULES_CACHE=str(cache))
    return results, printed, foreign


def test_every_head_loads_without_the_package(without_the_package, checkpoints, tiny_tokenizer):
    results, _, _ = without_the_package
    outputs = torch.load(results / "outputs.pt", weights_only=True)
    batch = tiny_tokenizer(["The cat sat", "The rat is under the hat"], padding=True, return_tensors="pt")
    language_model = AutoModelForCausalLM.from_pretrained(checkpoints / "AutoModelForCausalLM")
    hidden_states = language_model.model(**batch)[0]
    expected = {"generated": language_model.generate(**batch, max_new_tokens=5, do_sample=False)}
    for auto_class in HEADS:
        model = getattr(transformers, auto_class).from_pretrained(checkpoints / auto_class)
        expected[auto_class] = expected[f"{auto_class} saved again"] = model(**batch)[0]
        expected[f"{auto_class} from the language model"] = hidden_states
    torch.testing.assert_close(outputs, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("auto_class", HEADS)
def test_a_second_save_without_the_package_is_as_complete_as_the_first(auto_class, without_the_package, checkpoints):
    results, _, _ = without_the_package
    for name in CODE:
        assert (results / auto_class / name).read_text() == (checkpoints / auto_class / name).read_text()


def test_conversion_asks_for_the_package(without_the_package):
    _, printed, foreign = without_the_package
    assert printed.strip() == f"Install scratch_gpt2 to convert the checkpoint {foreign}."


# Pipelines and tokenizers


def test_auto_tokenizer_reads_the_saved_folder(checkpoints, tiny_tokenizer):
    tokenizer = AutoTokenizer.from_pretrained(checkpoints / "AutoModelForCausalLM")
    text = "The cat's hat is on the mat."
    assert tokenizer(text).input_ids == tiny_tokenizer(text).input_ids
    assert (tokenizer.eos_token, tokenizer.pad_token) == (tiny_tokenizer.eos_token, tiny_tokenizer.pad_token)
    assert tokenizer.chat_template == tiny_tokenizer.chat_template


PIPELINES = {
    "text-generation": "AutoModelForCausalLM",
    "text-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "feature-extraction": "AutoModel",
}


@pytest.mark.parametrize("task", PIPELINES)
def test_pipelines_run_without_complaint(task, checkpoints, caplog):
    pipe = pipeline(task, model=str(checkpoints / PIPELINES[task]), device="cpu")
    options = {"max_new_tokens": 3, "do_sample": False} if task == "text-generation" else {}
    texts = ["The cat sat on the mat", "The rat"]
    single, batched = pipe(texts, **options), pipe(texts, batch_size=2, **options)
    assert len(single) == 2
    if task == "text-generation":
        assert all(result[0]["generated_text"].startswith(text) for result, text in zip(single, texts, strict=True))
        assert single == batched
    elif task == "text-classification":
        for one, other in zip(single, batched, strict=True):
            assert one["label"] == other["label"] and one["score"] == pytest.approx(other["score"], abs=1e-5)
    assert [record.getMessage() for record in caplog.records if "not supported" in record.getMessage()] == []
