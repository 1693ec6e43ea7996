"""The range of transformers versions: the oldest, the one that vLLM 0.32 brings, and the newest, each in a process of
its own. The code that travels with a checkpoint computes there what this process computes, and so does the package."""

import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import transformers
from filelock import FileLock
from model_fixtures import fill, random_ids, tiny_config
from warm_python import run_python

import scratch_gpt2
from scratch_gpt2 import configuration_scratch_gpt2

CACHE = Path(__file__).resolve().parents[1] / ".cache" / "transformers-versions"
# With the dependencies that differ from those of the installed version.
VERSIONS = {"5.10.1": ["tokenizers==0.22.2", "huggingface_hub==1.33.0"], "5.19.0": [], "5.24.0": []}
HEADS = {
    "ScratchGPT2Model": "AutoModel",
    "ScratchGPT2ForCausalLM": "AutoModelForCausalLM",
    "ScratchGPT2ForSequenceClassification": "AutoModelForSequenceClassification",
    "ScratchGPT2ForTokenClassification": "AutoModelForTokenClassification",
    "ScratchGPT2ForQuestionAnswering": "AutoModelForQuestionAnswering",
    "ScratchGPT2DoubleHeadsModel": "AutoModelForPreTraining",
}
IDS = random_ids(2, 9)
MASK = torch.ones_like(IDS)
MASK[0, :3] = 0


@pytest.fixture(params=VERSIONS)
def library(request):
    """Version and folder of a transformers: downloaded once, shared by parallel test processes."""
    version, folder = request.param, CACHE / request.param
    if version == transformers.__version__:
        pytest.skip("this is the installed version, which all other tests run on")
    CACHE.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
                target = Path(scratch, "packages")
                command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile"]
                command += ["--retries", "1", "--timeout", "20", "--target", target, f"transformers=={version}"]
                done = subprocess.run([*command, *VERSIONS[version]], capture_output=True, text=True)
                if done.returncode != 0:
                    reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
                    pytest.skip(f"pip cannot download transformers {version}: {reason}")
                target.rename(folder)
    return version, folder


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Folder of a checkpoint of every head, and what each computes."""
    folder, expected = tmp_path_factory.mktemp("checkpoints"), {}
    for head in HEADS:
        model = fill(getattr(scratch_gpt2, head)(tiny_config(num_labels=3))).eval()
        model.save_pretrained(folder / head)
        expected[head] = model(IDS, attention_mask=MASK)[0]
        if hasattr(model, "lm_head"):
            expected[f"{head} wrote"] = model.generate(IDS, attention_mask=MASK, max_new_tokens=12, do_sample=False)
    return folder, expected


OTHER_VERSION = """
import importlib
import pkgutil
import sys
import torch
import transformers

folder, results = sys.argv[1:]
heads, ids, mask = torch.load(f"{results}/inputs.pt")
assert "scratch_gpt2" not in sys.modules


def compute(model, name, outputs):
    outputs[name] = model.eval()(ids, attention_mask=mask)[0]
    if hasattr(model, "lm_head"):
        written = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False)
        outputs[f"{name} wrote"] = written


remote, again, package = {}, {}, {}
for head, auto_class in heads.items():
    auto = getattr(transformers, auto_class)
    model = auto.from_pretrained(f"{folder}/{head}", trust_remote_code=True)
    compute(model, head, remote)
    model.save_pretrained(f"{results}/{head}")
    compute(auto.from_pretrained(f"{results}/{head}", trust_remote_code=True), head, again)

import scratch_gpt2
for module in pkgutil.walk_packages(scratch_gpt2.__path__, "scratch_gpt2."):
    if module.name != "scratch_gpt2.vllm_plugin":
        importlib.import_module(module.name)
for head, auto_class in heads.items():
    auto = getattr(transformers, auto_class)
    model = getattr(scratch_gpt2, head).from_pretrained(f"{results}/{head}")
    assert type(model).__module__.startswith("scratch_gpt2.")
    compute(model, head, package)
    if head == "ScratchGPT2ForCausalLM":
        scratch_gpt2.export_gpt2(model, f"{results}/gpt2")
gpt2 = transformers.GPT2LMHeadModel.from_pretrained(f"{results}/gpt2")
exported = gpt2.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False)
torch.save((transformers.__version__, remote, again, package, exported), f"{results}/outputs.pt")
"""


@torch.no_grad()
def test_other_versions_compute_the_same(library, checkpoints, tmp_path):
    version, packages = library
    folder, expected = checkpoints
    torch.save((HEADS, IDS, MASK), tmp_path / "inputs.pt")
    root = Path(scratch_gpt2.__file__).parents[1]
    environment = {"PYTHONPATH": os.pathsep.join([str(packages), str(root)])}
    environment |= {"HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"}
    done = run_python(OTHER_VERSION, folder, tmp_path, env=os.environ | environment)
    assert done.returncode == 0, done.stderr
    assert "deprecated. Use `cache`" not in done.stderr
    found, *results, exported = torch.load(tmp_path / "outputs.pt")
    assert found == version
    for outputs in results:
        torch.testing.assert_close(outputs, expected, rtol=0, atol=1e-4)
    assert torch.equal(exported, expected["ScratchGPT2ForCausalLM wrote"])


@pytest.mark.parametrize("version", ["4.57.6", "5.9.0", "5.0.0.dev0"])
def test_an_older_version_is_refused_in_a_sentence(version, monkeypatch):
    monkeypatch.setattr(transformers, "__version__", version)
    with pytest.raises(ImportError) as error:
        runpy.run_path(configuration_scratch_gpt2.__file__)
    assert str(error.value) == (
        f"scratch_gpt2 needs transformers 5.10 or newer, but {version} is installed: pip install -U transformers"
    )


def test_the_declared_range(monkeypatch):
    for version in ("5.10.0.dev0", "5.10.1", "5.100.0", "6.0.0"):
        monkeypatch.setattr(transformers, "__version__", version)
        runpy.run_path(configuration_scratch_gpt2.__file__)
    setup = (Path(scratch_gpt2.__file__).parents[1] / "setup.cfg").read_text()
    assert f"transformers>={configuration_scratch_gpt2.OLDEST_TRANSFORMERS},<6\n" in setup
