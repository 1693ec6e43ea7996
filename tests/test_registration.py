"""The library knows our classes: in this process, in others, and in those without this package."""

import concurrent.futures
import importlib
import json
import multiprocessing
import os
import subprocess
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, pipeline
from warm_python import run_python

import scratch_gpt2
from scratch_gpt2.checkpoint_files import TRAVELLING_FILES

HEADS = {
    "AutoModel": "ScratchGPT2Model",
    "AutoModelForCausalLM": "ScratchGPT2ForCausalLM",
    "AutoModelForSequenceClassification": "ScratchGPT2ForSequenceClassification",
    "AutoModelForTokenClassification": "ScratchGPT2ForTokenClassification",
    "AutoModelForQuestionAnswering": "ScratchGPT2ForQuestionAnswering",
}
PLACES = {
    "AutoModel": "modeling_scratch_gpt2.ScratchGPT2Model",
    "AutoModelForCausalLM": "modeling_scratch_gpt2.ScratchGPT2ForCausalLM",
    "AutoModelForSequenceClassification": "heads_scratch_gpt2.ScratchGPT2ForSequenceClassification",
    "AutoModelForTokenClassification": "heads_scratch_gpt2.ScratchGPT2ForTokenClassification",
    "AutoModelForQuestionAnswering": "heads_scratch_gpt2.ScratchGPT2ForQuestionAnswering",
}
ROOT = Path(__file__).resolve().parents[1]


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


def output_of(code, *arguments, **environment):
    """Standard output of another process."""
    result = run_python(code, *arguments, env=os.environ | environment)
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
    """From its own checkpoint and a language model's, with our code instead of the copy saved with the weights."""
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
    assert output_of(FRESH_IMPORT, checkpoints / "AutoModelForCausalLM").strip() == "True"


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
    expected = [*TRAVELLING_FILES, "config.json", "model.safetensors", *generation]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(expected)
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert {name: auto_map[name] for name in HEADS} == PLACES
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
    printed = output_of(WITHOUT_THE_PACKAGE, checkpoints, results, foreign, HF_MODULES_CACHE=str(cache))
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
    for name in TRAVELLING_FILES:
        assert (results / auto_class / name).read_text() == (checkpoints / auto_class / name).read_text()


def test_conversion_asks_for_the_package(without_the_package):
    _, printed, foreign = without_the_package
    assert printed.strip() == f"Install scratch_gpt2 to convert the checkpoint {foreign}."


# Checkpoints of version 0.1, when all heads were in one file

BEFORE = "5e788cd"
SAVE_BEFORE = """
import sys

sys.path.insert(0, sys.argv[2])
import torch
import scratch_gpt2
torch.manual_seed(0)
config = scratch_gpt2.ScratchGPT2Config(
    vocab_size=290, n_positions=32, n_embd=16, n_layer=2, n_head=2, num_labels=3, initializer_range=0.3
)
for head in ("ForCausalLM", "ForSequenceClassification"):
    getattr(scratch_gpt2, f"ScratchGPT2{head}")(config).save_pretrained(f"{sys.argv[1]}/{head}")
"""
LOAD_BEFORE = """
import sys
import torch
import transformers

folder, results = sys.argv[1:]
ids = torch.arange(18).view(2, 9)
outputs = {}
for saved in ("ForCausalLM", "ForSequenceClassification"):
    for name in ("ForCausalLM", "ForSequenceClassification") if saved == "ForCausalLM" else (saved,):
        auto = getattr(transformers, f"AutoModel{name}")
        model = auto.from_pretrained(f"{folder}/{saved}", trust_remote_code=True).eval()
        outputs[f"{saved} as {name}"] = model(ids).logits if saved == name else model.model(ids)[0]
        model.save_pretrained(f"{results}/{saved}-{name}")
        again = auto.from_pretrained(f"{results}/{saved}-{name}", trust_remote_code=True).eval()
        outputs[f"{saved} as {name}, saved again"] = again(ids).logits if saved == name else again.model(ids)[0]
torch.save(outputs, f"{results}/outputs.pt")
"""


@pytest.fixture(scope="module")
def checkpoints_before(tmp_path_factory):
    """Folder of checkpoints that the code of the last commit before the split has saved."""
    code, folder = tmp_path_factory.mktemp("code"), tmp_path_factory.mktemp("before")
    archive = subprocess.run(["git", "archive", BEFORE, "scratch_gpt2"], cwd=ROOT, capture_output=True)
    if archive.returncode != 0:
        pytest.skip(f"the history of this checkout does not reach back to {BEFORE}")
    subprocess.run(["tar", "-x", "-C", code], input=archive.stdout, check=True)
    output_of(SAVE_BEFORE, folder, code)
    config = json.loads((folder / "ForCausalLM" / "config.json").read_text())
    old_place = "modeling_scratch_gpt2.ScratchGPT2ForSequenceClassification"
    assert config["auto_map"]["AutoModelForSequenceClassification"] == old_place
    assert not (folder / "ForCausalLM" / "heads_scratch_gpt2.py").exists()
    return folder


def load_before(folder, results, with_package, modules):
    """Outputs of all checkpoints in `folder`, also after saving them again to `results`."""
    results.mkdir()
    code = LOAD_BEFORE if with_package else WITHOUT_THE_PACKAGE.split("import torch")[0] + LOAD_BEFORE
    code = "import scratch_gpt2\n" + code if with_package else code
    output_of(code, folder, results, HF_MODULES_CACHE=str(modules))
    return torch.load(results / "outputs.pt", weights_only=True)


def test_checkpoints_of_before_load_and_are_saved_again(checkpoints_before, tmp_path):
    without = load_before(checkpoints_before, tmp_path / "without", with_package=False, modules=tmp_path / "a")
    present = load_before(checkpoints_before, tmp_path / "with", with_package=True, modules=tmp_path / "b")
    assert len(present) == 6
    torch.testing.assert_close(present, without, rtol=0, atol=1e-6)

    saved = tmp_path / "with" / "ForCausalLM-ForCausalLM"
    auto_map = json.loads((saved / "config.json").read_text())["auto_map"]
    assert {name: auto_map[name] for name in HEADS} == PLACES
    assert {file.name for file in saved.glob("*.py")} == set(TRAVELLING_FILES)
    again = tmp_path / "again"
    for folder in ("ForCausalLM", "ForSequenceClassification"):
        (tmp_path / "resaved").mkdir(exist_ok=True)
        (tmp_path / "with" / f"{folder}-{folder}").rename(tmp_path / "resaved" / folder)
    later = load_before(tmp_path / "resaved", again, with_package=False, modules=tmp_path / "c")
    torch.testing.assert_close(later, without, rtol=0, atol=1e-6)


def test_an_entry_that_names_a_repository_stays():
    kept = {"AutoModelForCausalLM": "somebody/gpt2--modeling_scratch_gpt2.ScratchGPT2ForCausalLM"}
    other = {"AutoTokenizer": ["tokenization.Slow", None]}
    old = {"AutoModelForTokenClassification": "modeling_scratch_gpt2.ScratchGPT2ForTokenClassification"}
    auto_map = scratch_gpt2.ScratchGPT2Config(auto_map=kept | other | old).auto_map
    assert {name: auto_map[name] for name in HEADS} == PLACES | kept
    assert auto_map["AutoTokenizer"] == other["AutoTokenizer"]


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
