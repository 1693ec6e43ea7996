"""Push from one process and pull in another without the package, with the real client and a Hub on loopback."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from hub_server import LoopbackHub
from huggingface_hub import ModelCard, ModelCardData, constants, hf_api
from model_fixtures import fill
from safetensors.torch import load_file, save_file
from test_registration import HEADS, make_config, output_of
from transformers import TrainingArguments
from warm_python import run_python

import scratch_gpt2
from scratch_gpt2.data.rows import describe_hub
from scratch_gpt2.data.text_classification import prepare, save_prepared
from scratch_gpt2.hub.card import model_card, read_kind, render_card
from scratch_gpt2.hub.push import files_to_push, push
from scratch_gpt2.hub.run_record import public_options, record_run, without_folder
from scratch_gpt2.training.pretraining import PretrainingTrainer
from scratch_gpt2.training.start import check_push

ROOT = Path(__file__).resolve().parents[1]
TOKEN, STRANGER = "hf_alicesSecret", "hf_bob"
CODE = [
    "checkpoint_files.py",
    "configuration_scratch_gpt2.py",
    "heads_scratch_gpt2.py",
    "linear_cross_entropy.py",
    "modeling_scratch_gpt2.py",
]


@dataclass
class RunArguments:
    learning_rate: float = field(default=1e-3, metadata={"public": True})
    data: str = field(default="", metadata={"public": True})
    hub_token: str | None = None
    output_dir: str = ""


@pytest.fixture
def hub():
    with LoopbackHub({TOKEN: "alice", STRANGER: "bob"}) as running:
        yield running


@pytest.fixture
def client(hub, tmp_path, monkeypatch):
    """huggingface_hub in this process, logged in as alice."""
    for name, value in hub.environment(TOKEN, tmp_path / "home").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(hf_api.api, "endpoint", hub.url)  # created at import time, perhaps earlier
    monkeypatch.setattr("transformers.utils.hub._hf_api", None)  # cached since the first test that needed it
    return hub


def save(folder: Path, tokenizer, head: str = "ScratchGPT2ForCausalLM") -> Path:
    """The output folder of a training script, with files that must stay on this machine."""
    model = fill(getattr(scratch_gpt2, head)(make_config(tokenizer)))
    model.config.use_cache = False
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "shards").mkdir()
    for private in ("shards/shard_00000.npy", "training_args.bin", "optimizer.pt", "test.json", "log.jsonl"):
        (folder / private).write_bytes(b"private")
    (folder / "curves.png").write_bytes(b"\x89PNG")
    record_run(
        folder,
        arguments=[
            RunArguments(learning_rate=0.5, data="/home/alice/book.txt", hub_token=TOKEN, output_dir="/home/x")
        ],
        base="openai-community/gpt2",
        data=["/home/alice/book.txt", "roneneldan/TinyStories"],
        metrics={"loss": 2.5, "perplexity": 12.1825, "nothing": float("nan")},
        samples=[("The cat", "sat on\n```the mat")],
    )
    return folder


def test_the_card_describes_the_run(tiny_tokenizer, tmp_path):
    card = model_card(save(tmp_path, tiny_tokenizer), "alice/cat", license="mit")
    assert card.data.to_dict() == {
        "base_model": "openai-community/gpt2",
        "datasets": ["roneneldan/TinyStories"],
        "library_name": "transformers",
        "license": "mit",
        "pipeline_tag": "text-generation",
        "tags": ["scratch_gpt2", "gpt2"],
        "model-index": [
            {
                "name": "cat",
                "results": [
                    {
                        "task": {"type": "text-generation"},
                        "dataset": {
                            "type": "roneneldan/TinyStories",
                            "name": "book.txt, roneneldan/TinyStories",
                            "split": "validation",
                        },
                        "metrics": [
                            {"type": "loss", "value": 2.5},
                            {"type": "perplexity", "value": 12.1825},
                        ],
                    }
                ],
            }
        ],
    }
    expected = [
        "A GPT-2 with 2 layers of width 16, 2 heads, a vocabulary of 290 tokens and a context of 32 tokens, "
        "fine-tuned from `openai-community/gpt2`, built with scratch_gpt2.",
        "- Data: `book.txt`, `roneneldan/TinyStories`",
        ' "learning_rate": 0.5,',
        "| loss | 2.5000 |",
        "    sat on\n    ```the mat",
        "![curves](curves.png)",
        "The results above are its only evaluation",
    ]
    assert [part for part in expected if part not in card.text] == []
    assert [word for word in ("/home", TOKEN, "hub_token", "output_dir") if word in str(card)] == []


@pytest.mark.parametrize("with_code", [True, False])
def test_the_card_says_how_to_use_the_model(tiny_tokenizer, tmp_path, with_code):
    """A model of the Space has no copy of the code in its folder."""
    config, task, auto_class = read_kind(save(tmp_path, tiny_tokenizer))
    about = ModelCardData(pipeline_tag=task)
    options = {"repo_id": "space/checkpoints/base", "auto_class": auto_class, "with_code": with_code}
    card = render_card(about, name="base", config=config, run=None, **options)
    blocks = re.findall(r"```python\n(.*?)```\n", card.text, re.DOTALL)
    assert blocks[0] == (
        "import scratch_gpt2\nfrom transformers import pipeline\n\n"
        'pipe = pipeline("text-generation", "space/checkpoints/base")\n'
    )
    assert len(blocks) == 1 + with_code
    assert ("trust_remote_code" in card.text) == ("which needs transformers 5.10 or newer" in card.text) == with_code
    assert card.text.count("```") == 2 * len(blocks)


def test_only_public_options_are_recorded(tmp_path):
    class Recipe(TrainingArguments):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **{"weight_decay": 0.1} | kwargs)

    private = {"hub_token": TOKEN, "run_name": "alice-1", "logging_steps": 7, "dataloader_num_workers": 2}
    private |= {"resume_from_checkpoint": "/home/alice/run", "label_names": ["secret"], "seed": 42}  # its default
    recipe = Recipe(str(tmp_path), learning_rate=0.5, lr_scheduler_type="cosine", use_cpu=True, **private)
    script = RunArguments(data=str(tmp_path), hub_token=TOKEN, output_dir="/home/alice")
    assert public_options([script, recipe]) == {
        "data": tmp_path.name,
        "learning_rate": 0.5,
        "lr_scheduler_type": "cosine",
        "weight_decay": 0.1,
        "use_cpu": True,
    }


def test_of_a_path_only_the_last_part_is_recorded(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here" / "a.txt").touch()
    given = ["here/a.txt", "here/*.txt", "/no/such/file.txt", "~/book.txt", "alice/animals", "sat and/or stood?", 0.5]
    expected = ["a.txt", "*.txt", "file.txt", "book.txt", "alice/animals", "sat and/or stood?", 0.5]
    assert without_folder(given) == expected


def test_the_card_of_a_folder_without_a_record(tiny_tokenizer, tmp_path):
    folder = save(tmp_path, tiny_tokenizer)
    (folder / "run.json").unlink()
    card = model_card(folder, "alice/cat")
    assert "The training run was not recorded." in card.text
    assert "eval_results" not in card.data.to_dict() and "model-index" not in card.data.to_dict()


def test_only_the_model_is_pushed_and_its_code_is_its_own(tiny_tokenizer, tmp_path):
    folder = save(tmp_path, tiny_tokenizer)
    config = json.loads((folder / "config.json").read_text())
    assert config["use_cache"] is False
    config["auto_map"]["AutoConfig"] = "alice/base--configuration_scratch_gpt2.ScratchGPT2Config"
    (folder / "config.json").write_text(json.dumps(config))
    (folder / CODE[0]).unlink()
    files = files_to_push(folder)
    names = ["config.json", "model.safetensors", "generation_config.json", "run.json", "curves.png"]
    assert sorted(files) == sorted([*CODE, *names, "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
    pushed = json.loads(files["config.json"])
    assert pushed["use_cache"] is True
    assert pushed["auto_map"]["AutoConfig"] == "configuration_scratch_gpt2.ScratchGPT2Config"


def test_a_checkpoint_of_an_earlier_layout_keeps_its_code(tiny_tokenizer, tmp_path):
    folder = save(tmp_path, tiny_tokenizer)
    for name in CODE:
        (folder / name).unlink()
    (folder / "configuration_scratch_gpt2.py").write_text("import torch\n")
    (folder / "modeling_scratch_gpt2.py").write_text("from .configuration_scratch_gpt2 import x\n")
    config = json.loads((folder / "config.json").read_text())
    own = {"AutoConfig": "configuration_scratch_gpt2.X", "AutoModel": "modeling_scratch_gpt2.Y"}
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": own}))
    files = files_to_push(folder)
    assert [name for name in files if name.endswith(".py")] == [
        "configuration_scratch_gpt2.py",
        "modeling_scratch_gpt2.py",
    ]
    assert json.loads(files["config.json"])["auto_map"] == own
    (folder / "configuration_scratch_gpt2.py").unlink()
    files = files_to_push(folder)
    assert sorted(name for name in files if name.endswith(".py")) == CODE
    heads = json.loads(files["config.json"])["auto_map"]
    assert heads["AutoModelForTokenClassification"] == "heads_scratch_gpt2.ScratchGPT2ForTokenClassification"


def test_what_cannot_be_pushed(tiny_tokenizer, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"contains neither config\.json nor adapter_config\.json"):
        files_to_push(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ValueError, match="a model of type 'gpt2': load it with scratch_gpt2 and save it first"):
        files_to_push(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "scratch_gpt2"}')
    with pytest.raises(FileNotFoundError, match="contains no safetensors file with weights"):
        files_to_push(tmp_path)


def test_a_push_replaces_other_weights(client, tiny_tokenizer, tmp_path):
    folder = save(tmp_path / "model", tiny_tokenizer)
    first = push(folder, "cat", private=True)
    repository = client.repositories["alice/cat"]
    assert repository.private and len(repository.commits) == 2 and repository.commits[-1].oid == first.oid
    stale = {"model-00001-of-00002.safetensors": b"", "adapter_config.json": b"{}", "notes.txt": b"mine"}
    repository.commits[-1].files.update(stale)
    push(folder, "alice/cat")
    files = repository.commits[-1].files
    assert [name for name in stale if name in files] == ["notes.txt"]
    assert files["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    assert not any(TOKEN.encode() in content for content in files.values())


def test_an_upload_cut_off_changes_nothing(client, tiny_tokenizer, tmp_path, monkeypatch):
    folder = save(tmp_path / "model", tiny_tokenizer)
    push(folder, "alice/cat")
    before = client.repositories["alice/cat"].commits[-1]
    save_again = fill(scratch_gpt2.ScratchGPT2ForCausalLM(make_config(tiny_tokenizer)), seed=1)
    save_again.save_pretrained(folder)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)  # before it tries again
    client.cut_after = 1000
    with pytest.raises(
        OSError, match=r"alice/cat could not be pushed \(.*\), and the repository on the Hub is unchanged; try"
    ):
        push(folder, "alice/cat")
    assert client.repositories["alice/cat"].commits[-1] is before
    client.cut_after = None
    push(folder, "alice/cat")
    after = client.repositories["alice/cat"].commits[-1].files["model.safetensors"]
    assert after == (folder / "model.safetensors").read_bytes() != before.files["model.safetensors"]


def test_other_users_cannot_push_and_get_one_sentence(client, tiny_tokenizer, tmp_path, monkeypatch):
    folder = save(tmp_path / "model", tiny_tokenizer)
    faults = {
        STRANGER: "the logged-in account has no write access",
        "hf_wrong": "the token is invalid",
        "": "not logged in",
    }
    for token, fault in faults.items():
        monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(OSError, match=rf"alice/cat could not be pushed \({fault}\), .*`hf auth login`") as caught:
            push(folder, "alice/cat")
        assert "\n" not in str(caught.value) and (not token or token not in str(caught.value))
    assert client.repositories == {}


NOT_INSTALLED = "import sys\nsys.modules['scratch_gpt2'] = None\n"
PULL = """
import torch, transformers

results, heads = sys.argv[1], sys.argv[2:]
outputs = {}
for auto_class in heads:
    repo = f"alice/{auto_class}"
    assert transformers.AutoConfig.from_pretrained(repo, trust_remote_code=True).use_cache is True
    tokenizer = transformers.AutoTokenizer.from_pretrained(repo)
    assert tokenizer.chat_template is not None and tokenizer.pad_token == tokenizer.eos_token
    model = getattr(transformers, auto_class).from_pretrained(repo, trust_remote_code=True).eval()
    outputs[auto_class] = model(**tokenizer("The cat sat", return_tensors="pt"))[0]
pipe = transformers.pipeline("text-generation", "alice/AutoModelForCausalLM", trust_remote_code=True)
text = pipe("The cat", do_sample=False, max_new_tokens=4)[0]["generated_text"]
assert text.startswith("The cat") and len(text) > len("The cat"), text
torch.save(outputs, results)
"""


def test_every_head_is_pulled_without_the_package(client, tiny_tokenizer, tmp_path):
    expected = {}
    for auto_class, head in HEADS.items():
        folder = save(tmp_path / auto_class, tiny_tokenizer, head)
        push(folder, f"alice/{auto_class}", private=True)
        model = getattr(scratch_gpt2, head).from_pretrained(folder).eval()
        expected[auto_class] = model(**tiny_tokenizer("The cat sat", return_tensors="pt"))[0]
    elsewhere = client.environment(TOKEN, tmp_path / "elsewhere")
    output_of(NOT_INSTALLED + PULL, tmp_path / "outputs.pt", *HEADS, **elsewhere)
    outputs = torch.load(tmp_path / "outputs.pt", weights_only=True)
    torch.testing.assert_close(outputs, expected, rtol=0, atol=1e-6)


def test_a_private_model_does_not_exist_for_other_accounts(client, tiny_tokenizer, tmp_path):
    push(save(tmp_path / "model", tiny_tokenizer), "alice/secret", private=True)
    code = (
        "import transformers\ntry:\n    transformers.AutoConfig.from_pretrained('alice/secret')"
        "\nexcept OSError as error:\n    print(error)"
    )
    printed = output_of(code, **client.environment(None, tmp_path / "elsewhere"))
    assert "alice/secret is not a local folder and is not a valid model identifier" in printed


def run_script(hub, tmp_path, script: str, *arguments, token=TOKEN) -> subprocess.CompletedProcess:
    environment = os.environ | hub.environment(token, tmp_path / "home")
    return run_python(ROOT / "examples" / script, *arguments, cwd=tmp_path, env=environment)


def test_the_script_checks_the_pushed_model(hub, tiny_tokenizer, tmp_path):
    folder = save(tmp_path / "model", tiny_tokenizer)
    result = run_script(hub, tmp_path, "push_to_hub.py", "--folder", folder, "--repo_id", "cat", "--license", "mit")
    assert result.returncode == 0, result.stderr
    assert re.search(r"loaded from there: outputs differ by 0$", result.stdout.strip())
    card = ModelCard(hub.repositories["alice/cat"].commits[-1].files["README.md"].decode())
    assert card.data.license == "mit"
    assert TOKEN not in result.stdout + result.stderr


def test_a_model_that_computes_no_numbers_is_not_pushed(hub, tiny_tokenizer, tmp_path):
    folder = save(tmp_path / "model", tiny_tokenizer)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    result = run_script(hub, tmp_path, "push_to_hub.py", "--folder", folder, "--repo_id", "cat", "--license", "mit")
    assert result.returncode == 1 and hub.repositories == {}
    assert result.stderr.endswith(f"error: {folder} has weights that are not finite; push an earlier checkpoint.\n")


def test_an_adapter_is_pushed_as_an_adapter(client, tiny_tokenizer, tmp_path, monkeypatch):
    peft = pytest.importorskip("peft")
    base = save(tmp_path / "base", tiny_tokenizer)
    push(base, "alice/base")
    model = scratch_gpt2.ScratchGPT2ForCausalLM.from_pretrained(base)
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"]))
    fill(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    tiny_tokenizer.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"base model .*base is not on the Hub: push it first"):
        push(tmp_path / "adapter", "alice/adapter")
    arguments = ["--folder", tmp_path / "adapter", "--repo_id", "alice/adapter", "--base", "alice/base"]
    result = run_script(client, tmp_path, "push_to_hub.py", *arguments)
    assert result.returncode == 0, result.stderr
    files = client.repositories["alice/adapter"].commits[-1].files
    assert "adapter_model.safetensors" in files and "model.safetensors" not in files and "config.json" not in files
    card = ModelCard(files["README.md"].decode())
    assert (card.data.library_name, card.data.base_model) == ("peft", "alice/base")
    assert "A LoRA adapter of rank 2 for `alice/base`, on q_proj, built with scratch_gpt2." in card.text
    ids = torch.arange(1, 9).unsqueeze(0)
    model = scratch_gpt2.ScratchGPT2ForCausalLM.from_pretrained(base)
    expected = peft.PeftModel.from_pretrained(model, tmp_path / "adapter").eval()(ids).logits
    for use, hidden in zip(re.findall("```python\n(.*?)```", card.text, re.DOTALL), ("", NOT_INSTALLED), strict=True):
        code = f"{hidden}{use}import sys, torch\ntorch.save(model(torch.arange(1, 9)[None]).logits, sys.argv[1])"
        result = tmp_path / f"logits{len(hidden)}.pt"
        output_of(code, result, **client.environment(TOKEN, tmp_path / "elsewhere"))
        torch.testing.assert_close(torch.load(result, weights_only=True), expected, rtol=0, atol=1e-6)
    shown = run_script(client, tmp_path, "push_to_hub.py", *arguments, "--show")
    assert shown.returncode == 0, shown.stderr
    shown = shown.stdout
    assert card.content.strip() in shown and str(tmp_path) not in shown


def make_trainer(folder, tokenizer, **options) -> PretrainingTrainer:
    model = scratch_gpt2.ScratchGPT2ForCausalLM(make_config(tokenizer))
    data = [{"input_ids": torch.arange(8), "labels": torch.arange(8)}] * 4
    quiet = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "max_steps": 2, "save_steps": 1}
    args = TrainingArguments(folder, push_to_hub=True, hub_model_id="alice/run", **quiet | options)
    sizes = {"tokens_per_step": 64, "block_length": 8}
    return PretrainingTrainer(model, args, "adamw", **sizes, train_dataset=data, processing_class=tokenizer)


def test_trainer_pushes_the_model_and_nothing_else(client, tiny_tokenizer, tmp_path, capsys, monkeypatch):
    trainer = make_trainer(tmp_path / "run", tiny_tokenizer)
    (tmp_path / "run").mkdir(exist_ok=True)
    (tmp_path / "run" / "smoke.txt").write_text("private")
    trainer.train()
    client.cut_after = 10
    messages = [commit.message for commit in client.repositories["alice/run"].commits]
    assert messages == ["initial commit", "Training in progress, step 1", "Training in progress, step 2"]
    trainer.save_model()
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    client.large_files.clear()
    with pytest.raises(OSError, match=r"login`: python examples/push_to_hub\.py --folder .* --repo_id alice/run$"):
        trainer.push_to_hub()
    assert len(client.repositories["alice/run"].commits) == 3
    client.cut_after = None
    trainer.push_to_hub()
    assert "loaded from there: outputs differ by 0" in capsys.readouterr().out
    files = client.repositories["alice/run"].commits[-1].files
    assert not {"training_args.bin", "smoke.txt", "optimizer.pt"} & set(files)
    assert {"config.json", "model.safetensors", "README.md", *CODE} <= set(files)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hub_token": TOKEN}, "log in with `hf auth login`"),
        ({"hub_strategy": "checkpoint"}, "choose every_save or end"),
    ],
)
def test_what_trainer_must_not_push(client, tiny_tokenizer, tmp_path, options, message):
    with pytest.raises(ValueError, match=message) as caught:
        make_trainer(tmp_path, tiny_tokenizer, **options)
    assert TOKEN not in str(caught.value)


def train(monkeypatch, script: str, *arguments) -> None:
    """A training script in this process."""
    specification = importlib.util.spec_from_file_location(script, ROOT / "examples" / f"{script}.py")
    module = importlib.util.module_from_spec(specification)
    monkeypatch.setitem(sys.modules, script, module)  # dataclasses look their module up by its name
    specification.loader.exec_module(module)
    monkeypatch.setattr(sys, "argv", [script, *map(str, arguments), *QUIET])
    module.main()


QUIET = ["--use_cpu", "--disable_tqdm", "true", "--report_to", "none", "--push_to_hub"]


@pytest.fixture
def without_check(monkeypatch):
    """Skip loading the pushed model in another process, which other tests cover."""
    monkeypatch.setattr("scratch_gpt2.training.trainer.check_pushed", lambda *arguments: 0.0)


def test_pretraining_pushes_cards_of_its_checkpoints(client, without_check, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    options = ["--output_dir", folder, "--hub_model_id", "alice/gpt2", "--max_steps", 4, "--logging_steps", 1]
    options += ["--save_strategy", "steps", "--save_steps", 2, "--eval_steps", 2, "--sample_steps", 4]
    train(monkeypatch, "pretrain", "--smoke", *options, "--prompt", "The")
    commits = client.repositories["alice/gpt2"].commits
    steps = ["Training in progress, step 2", "Training in progress, step 4", "End of training"]
    assert [commit.message for commit in commits] == ["initial commit", *steps]
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    measured = {entry["step"]: entry for entry in log if "eval_loss" in entry}
    card = ModelCard(commits[1].files["README.md"].decode())
    results = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert results == {name: measured[2][f"eval_{name}"] for name in ("loss", "bits_per_byte")}
    expected = [
        "- Initial weights: random",
        "- Data: `smoke.txt`",
        ' "tokens_per_step": 1024,',
        ' "learning_rate": 0.003,',
        ' "max_steps": 4,',
        f"| loss | {measured[2]['eval_loss']:.4f} |",
    ]
    assert [line for line in expected if line not in card.text] == []
    last = ModelCard(commits[3].files["README.md"].decode())
    assert f"| loss | {measured[4]['eval_loss']:.4f} |" in last.text and "| perplexity | " in last.text
    assert "## Samples" in last.text and "curves.png" in commits[3].files
    assert not [word for word in (str(tmp_path), TOKEN, "alice") if word in last.text.replace("alice/gpt2", "")]
    assert not {"smoke.txt", "training_args.bin", "log.jsonl"} & set(commits[3].files)


def test_classification_pushes_the_whole_classifier(client, without_check, tiny_tokenizer, tmp_path, monkeypatch):
    base = save(tmp_path / "base", tiny_tokenizer)
    animals = [("rat", "spam") if number % 2 else ("cat", "ham") for number in range(40)]
    rows = [{"text": f"The {animal} {number}.", "label": label} for number, (animal, label) in enumerate(animals)]
    save_prepared(prepare(rows, describe_hub("alice/animals", None, "train")), tmp_path / "data")
    options = ["--data", tmp_path / "data", "--model", base, "--output_dir", tmp_path / "spam"]
    train(monkeypatch, "classify", *options, "--hub_model_id", "spam", "--num_train_epochs", 1)
    commits = client.repositories["alice/spam"].commits
    assert [commit.message for commit in commits] == ["initial commit", "End of training"]
    files, card = commits[1].files, ModelCard(commits[1].files["README.md"].decode())
    assert {"model.safetensors", "epochs.png", "confusion_matrix.png", "metrics.json", *CODE} <= set(files)
    assert (card.data.datasets, card.data.pipeline_tag) == (["alice/animals"], "text-classification")
    metrics = json.loads((tmp_path / "spam" / "metrics.json").read_text())["test"]
    results = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert results["accuracy"] == metrics["accuracy"] and results["f1"] == metrics["f1"]
    assert {result.dataset_split for result in card.data.eval_results} == {"test"}
    expected = [
        "a classification head for the labels ham, spam",
        "- Initial weights: `base`",
        ' "num_train_epochs": 1.0,',
    ]
    assert [line for line in expected if line not in card.text] == []
    assert not [word for word in ("label_names", "save_", "dataloader", "gradient_checkpointing") if word in card.text]


def test_instruction_tuning_pushes_its_adapter(client, tiny_tokenizer, tmp_path):
    pytest.importorskip("peft")
    config = make_config(tiny_tokenizer)
    config.n_positions = 512
    base = fill(scratch_gpt2.ScratchGPT2ForCausalLM(config))
    push(base, "alice/base", tokenizer=tiny_tokenizer)
    rows = [{"instruction": "Where is the cat?", "input": str(number), "output": "The mat."} for number in range(8)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    options = ["--data", "rows.json", "--model", "alice/base", "--lora", "--hub_model_id", "alice/lora"]
    options += ["--validation", 0.25, "--test", 0.25, "--max_steps", 2, "--save_steps", 1, "--eval_steps", 1]
    options += ["--samples", 0]
    result = run_script(client, tmp_path, "sft.py", *options, "--output_dir", "lora", *QUIET)
    assert result.returncode == 0, result.stderr
    assert "loaded from there: outputs differ by 0" in result.stdout
    commits = client.repositories["alice/lora"].commits
    messages = ["initial commit", "Training in progress, step 1", "Training in progress, step 2", "End of training"]
    assert [commit.message for commit in commits] == messages
    for commit in commits[1:]:
        assert "adapter_model.safetensors" in commit.files and "model.safetensors" not in commit.files
        card = ModelCard(commit.files["README.md"].decode())
        assert (card.data.base_model, card.data.library_name) == ("alice/base", "peft")
        assert "- Data: `rows.json`" in card.text and "| loss | " in card.text
        assert "On the validation split. The loss is in nats per token of the answers:" in card.text


@pytest.mark.parametrize("script", ["pretrain", "classify", "sft"])
def test_scripts_refuse_a_push_without_destination_before_training(client, tmp_path, monkeypatch, script):
    options = ["--data", tmp_path / "data", "--model", tmp_path / "base", "--output_dir", tmp_path / "run"]
    with pytest.raises(ValueError, match=r"--push_to_hub has no destination: add --hub_model_id alice/NAME\."):
        train(monkeypatch, script, *options)
    assert client.repositories == {} and not (tmp_path / "run").exists()


def test_an_adapter_on_a_local_base_is_refused_before_training(client, tiny_tokenizer, tmp_path, monkeypatch):
    base = save(tmp_path / "base", tiny_tokenizer)
    options = ["--data", tmp_path / "rows.json", "--model", base, "--output_dir", tmp_path / "run", "--lora"]
    with pytest.raises(ValueError, match=r"The adapter's base model .*base is not on the Hub: push it first"):
        train(monkeypatch, "sft", *options, "--hub_model_id", "alice/lora")
    assert client.repositories == {} and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("token", "destination", "message"),
    [
        ("", "alice/run", r"cannot be pushed to \(not logged in\); log in with `hf auth login`"),
        ("hf_wrong", "alice/run", r"cannot be pushed to \(the token is invalid\); log in again"),
        (TOKEN, "bob/run", r"hub_model_id is bob/run, but alice is logged in and can push to alice/NAME only"),
    ],
)
def test_access_is_checked_before_training(client, tmp_path, monkeypatch, token, destination, message):
    monkeypatch.setenv("HF_TOKEN", token)
    args = TrainingArguments(str(tmp_path / "run"), push_to_hub=True, hub_model_id=destination, use_cpu=True)
    with pytest.raises((ValueError, ConnectionError), match=message):
        check_push(args)
    assert client.repositories == {}
