"""Every command and every Python block of the README and of docs/, as written there, at smoke size."""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hellaswag_rows import ROWS, write_rows
from warm_python import run_python

from scratch_gpt2 import ScratchGPT2Config, ScratchGPT2ForCausalLM
from scratch_gpt2.configuration_scratch_gpt2 import PRESETS
from scratch_gpt2.openai_weights import KEYS

pytestmark = pytest.mark.xdist_group("readme")  # one worker: its fixture takes a while
ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
# The pages whose commands build on one another come first, in that order.
PAGES = ("pretraining", "classification", "instructions", "evaluation")
OTHER_PAGES = sorted({path.stem for path in (ROOT / "docs").glob("*.md")} - set(PAGES))
DOCUMENTS = {
    **{
        f"docs/{name}.md": (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
        for name in (*PAGES, *OTHER_PAGES)
    },
    "README.md": README,
}
# What makes a script small. A command of a script that is not named here runs as the README has it.
SMOKE = {
    "examples/quickstart.py": "--smoke",
    "examples/pretrain.py": "--max_steps 2 --eval_steps 2 --tokens_per_step 1024 --n_layer 1 --n_embd 32 --n_head 2 "
    "--n_positions 128 --eval_tokens 128 --sample_steps 0 --per_device_train_batch_size 2 --overwrite",
    # Two documents may write into the same folder.
    "examples/classify.py --data": "--num_train_epochs 1 --overwrite",
    "examples/sft.py": "--max_steps 2 --eval_steps 2 --save_steps 2 --samples 1 --overwrite",
    "examples/dpo.py": "--max_steps 2 --eval_steps 2 --save_steps 2 --validation 0.2 --test 0.2 --overwrite",
    "examples/respond.py": "--max_new_tokens 4 --overwrite",
    "examples/compare_models.py": "--smoke",
}


def blocks(language, *names):
    """The blocks of a language in the documents `names`, by default in all of them, each once."""
    text = "\n".join(DOCUMENTS[name] for name in names or DOCUMENTS)
    return list(dict.fromkeys(re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)))


def commands(language_blocks, need=None):
    """The lines of the bash blocks that begin with `# needs {need}`, or of those that need nothing; no comments."""
    needs = [re.match(r"# needs (.*)\n", block) for block in language_blocks]
    chosen = [block for block, found in zip(language_blocks, needs, strict=True) if (found and found[1]) == need]
    lines = "\n".join(chosen).replace("\\\n", " ").splitlines()
    return list(dict.fromkeys(line for text in lines if (line := re.sub(r"\s*#.*", "", text).strip())))


def shell(command, cwd):
    """Run it as somebody who has activated this environment would, without a network."""
    for script, option in SMOKE.items():
        command = f"{command} {option}" if script in command else command  # the last of two values counts
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "HF_HUB_OFFLINE": "1"}
    environment = {name: value for name, value in environment.items() if not name.startswith("MAKE")}  # make test
    if command.startswith("python examples/"):
        words = subprocess.run(f"printf '%s\\0' {command}", shell=True, cwd=cwd, capture_output=True, text=True)
        return run_python(*words.stdout.split("\0")[1:-1], cwd=cwd, env=environment)
    return subprocess.run(command, shell=True, cwd=cwd, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder that looks like the repository, in which `make quickstart` has run at smoke size."""
    folder = tmp_path_factory.mktemp("readme")
    for name in ("examples", "space", "README.md", "Makefile", "setup.cfg", "pyproject.toml", "constraints.txt"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "books").mkdir()
    (folder / "books" / "zen.txt").write_text(README, encoding="utf-8")
    messages = [f"spam\tWin {n} prizes, call now!" if n % 2 else f"ham\tSee you at {n}, dear." for n in range(1, 25)]
    (folder / "SMSSpamCollection").write_text("\n".join(messages) + "\n")
    rows = [{"instruction": f"Count to {n}.", "input": "", "output": "1 2 3 4 5 6"[: 2 * n]} for n in range(1, 41)]
    (folder / "instruction-data.json").write_text(json.dumps(rows))
    pairs = [row | {"chosen": row["output"], "rejected": "No."} for row in rows]
    (folder / "instruction-data-with-preference.json").write_text(json.dumps(pairs))
    write_rows(folder / "hellaswag_val.jsonl", ROWS)
    done = shell("python examples/quickstart.py", folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_make_runs_what_the_readme_says(workplace):
    assert commands(blocks("bash", "README.md"))[:2] == ["make demo", "make quickstart"]
    demo = shell("make --dry-run demo", workplace).stdout
    assert demo.splitlines()[-1].endswith(".venv/bin/python space/app.py")
    quickstart = shell("make --dry-run quickstart", workplace).stdout
    assert quickstart.splitlines()[-1].endswith(".venv/bin/python examples/quickstart.py --overwrite")
    test = shell("make --dry-run test", workplace).stdout.splitlines()
    assert test[-3:] == [
        ".venv/bin/ruff check .",
        ".venv/bin/ruff format --check .",
        ".venv/bin/python -m pytest -n 2 --dist loadgroup",
    ]
    assert "pip install" in demo and "-c constraints.txt -e" in demo


def offline_commands():
    return [line for line in commands(blocks("bash")) if not line.startswith(("make ", "source "))]


def test_commands_in_their_order(workplace):
    """One test, because a command may need what the one before it has written, also to miss nothing but a network."""
    for command in offline_commands():
        done = shell(command, workplace)
        assert done.returncode == 0, f"{command}\n{done.stderr}"
        assert done.stdout.strip(), command
    network_commands = [line for line in commands(blocks("bash"), "the network") if line.startswith("python ")]
    assert network_commands
    for command in network_commands:
        done = shell(command, workplace)
        assert done.returncode == 1, command
        lines = [line for line in done.stderr.splitlines() if line and not line.startswith("Loading weights: ")]
        assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
        missing = "Hugging Face Hub|on the Hub is unchanged|tiktoken could not download"
        assert re.search(missing, done.stderr), done.stderr


def test_judge_without_its_server_ends_in_one_line(workplace, tmp_path):
    (command,) = commands(blocks("bash"), "a server")
    (tmp_path / "responses.json").write_text('[{"instruction": "Hi", "output": "Hello", "response": "Hey"}]')
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    done = shell(f"{command} --base_url http://127.0.0.1:9/v1 --retries 0", tmp_path)
    assert (done.returncode, done.stderr.splitlines()[-1][:26]) == (1, "error: No server answers at"[:26])


@pytest.mark.parametrize("name", DOCUMENTS)
def test_commands_within_a_sentence(name):
    """Their script exists; a benchmark knows the options."""
    for script, options in re.findall(r"`python ([\w/]+\.py)([^`]*)`", DOCUMENTS[name]):
        source = (ROOT / script).read_text(encoding="utf-8")
        if script.startswith("tests/benchmarks/"):
            unknown = [option for option in re.findall(r"--[\w-]+", options) if f'"{option}"' not in source]
            assert unknown == [], script


@pytest.mark.parametrize("block", blocks("python"))
def test_python_block(block, workplace):
    done = run_python(block, cwd=workplace, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    if block.startswith("# needs the network"):
        assert done.returncode == 1
        assert "OSError" in done.stderr or "FileNotFoundError" in done.stderr
        name = re.search(r'from_pretrained\("([^"]+)"', block)[1]
        assert name in done.stderr or "https://huggingface.co" in done.stderr
    else:
        assert done.returncode == 0, done.stderr
        if "nats per token" in block:
            assert re.search(r"\d\.\d\d nats per token\nThe statement", done.stdout)


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 200


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name):
    """Files exist, and so do the headings that a link within the documents names."""
    targets = re.findall(r"\]\(([^)\s]+)\)", DOCUMENTS[name])
    targets += re.findall(r'src(?:set)?="([^"]+)"', DOCUMENTS[name])
    assert targets or name == "docs/glossary.md"
    for target in targets:
        path, _, heading = target.partition("#")
        if re.match(r"https?:", target):
            continue
        file = (ROOT / name).parent / path if path else ROOT / name
        assert file.exists(), target
        if heading:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert heading in [re.sub(r"[^\w -]", "", text.lower()).replace(" ", "-") for text in headings], target


def test_every_page_is_linked_from_the_readme():
    linked = set(re.findall(r"\]\((docs/[\w.]+)\)", README))
    assert linked == {name for name in DOCUMENTS if name.startswith("docs/")}


def test_the_layout_exists():
    table = README.split("## Repository layout")[1].split("\n## ")[0]
    paths = re.findall(r"^\| `([\w/.]+)`", table, flags=re.MULTILINE)
    assert len(paths) >= 8
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_results_of_the_embedded_spam_filter():
    """After new training, `space/checkpoints/spam/run.json` has the numbers that the README has to state."""
    run = json.loads((ROOT / "space" / "checkpoints" / "spam" / "run.json").read_text(encoding="utf-8"))
    ours, theirs = run["metrics"], run["compared"]["TF-IDF and logistic regression"]
    accuracy, f1 = "sms_as_sent_accuracy", "sms_as_sent_f1"
    stated = re.search(
        r"accuracy of ([\d.]+) and an F1 score of ([\d.]+) on the 1,035 test messages \(TF-IDF with logistic "
        r"regression: ([\d.]+) and ([\d.]+)\)",
        " ".join(README.split()),
    )
    expected = [f"{value:.3f}" for value in (ours[accuracy], ours[f1], theirs[accuracy], theirs[f1])]
    assert list(stated.groups()) == expected


def test_pictures_have_a_dark_version():
    """Both versions of the diagram are drawn by the same code; see `docs/draw_architecture.py`."""
    for name, folder in (("README.md", "docs/images/"), ("docs/architecture.md", "images/")):
        assert (
            f'<source media="(prefers-color-scheme: dark)" srcset="{folder}architecture-dark.png">' in DOCUMENTS[name]
        )
        assert f'<img src="{folder}architecture.png"' in DOCUMENTS[name]


def test_parameter_counts_of_the_architecture_page():
    page = DOCUMENTS["docs/architecture.md"]
    for name in PRESETS:
        with torch.device("meta"):
            model = ScratchGPT2ForCausalLM(ScratchGPT2Config.from_preset(name))
        (row,) = re.findall(rf"^\| `{name}`.*\| ([\d,]+) \|$", page, flags=re.MULTILINE)
        assert int(row.replace(",", "")) == model.num_parameters()


def test_the_key_mapping_of_the_architecture_page():
    """Each row of the page's table is one of the table that converts."""
    rows = re.findall(r"^\| `([\w.]+)` \| `([\w.{},]+)` \|", DOCUMENTS["docs/architecture.md"], flags=re.MULTILINE)
    assert len(rows) == 10
    for theirs, ours in rows:
        suffix = "" if theirs.endswith(".weight") else ".weight"
        assert KEYS[theirs + suffix][0] == ours + suffix


def test_versions_are_those_of_the_constraints():
    constraints = (ROOT / "constraints.txt").read_text()
    section = README.split("## Versions")[1]
    for name in ("torch", "transformers", "accelerate"):
        version = re.search(rf"{name} (\d+\.\d+)", section)[1]
        assert re.search(rf"^{name}=={re.escape(version)}\.", constraints, flags=re.MULTILINE)


def test_no_script_hides_a_library():
    """Python looks into the script's own folder first: examples/evaluate.py would be what `import evaluate` finds."""
    libraries = importlib.metadata.packages_distributions()
    scripts = [path.stem for path in (ROOT / "examples").glob("*.py")]
    assert len(scripts) > 5 and [name for name in scripts if name in libraries] == []
