"""Checkpoints made to harm: no code runs, the memory stays bounded, and one sentence says what is wrong.

They are loaded one after the other by a process that may use half a GB of address space more than before.
"""

import json
import os
import pickle
import re
import struct
import zipfile
from pathlib import Path

import pytest
import torch
import transformers
from model_fixtures import tiny_config
from warm_python import run_python

from scratch_gpt2 import ScratchGPT2Config, ScratchGPT2ForCausalLM

pytestmark = pytest.mark.xdist_group("hostile")  # one load of all of them
BOMB = 2**30  # bytes after unpacking
LOAD = """
import json, resource, sys
from pathlib import Path
import scratch_gpt2, torch, transformers
from transformers import AutoModelForCausalLM

kind, *folders = sys.argv[1:]
auto = AutoModelForCausalLM if kind == "own" else scratch_gpt2.ScratchGPT2ForCausalLM
auto.from_pretrained(folders[0])
pages = int(Path("/proc/self/statm").read_text().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**29,) * 2)
results = {}
for folder in folders:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        auto.from_pretrained(folder)
        said = "loaded"
    except (ValueError, OSError) as error:
        said = str(error)
    except BaseException as error:
        said = f"not handled: {type(error).__name__} {error}"
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
    results[Path(folder).name] = {"said": said, "grown": grown}
print(json.dumps(results))
"""


class RunsCode:
    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return os.system, (f"touch {self.folder / 'ran'}",)


def change_config(folder: Path, **fields) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def pickle_with_code(folder: Path, kind: str) -> None:
    weights(folder).unlink()
    content = {"transformer.wte.weight": torch.zeros(1), "x": RunsCode(folder)}
    if kind == "raw":
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(RunsCode(folder)))
    else:
        torch.save(content, folder / "pytorch_model.bin", _use_new_zipfile_serialization=kind == "zip")


def weights(folder: Path) -> Path:
    return folder / "model.safetensors"


def lying_header(folder: Path, **lie) -> None:
    """`lie` replaces fields of a tensor's entry in the header."""
    content = weights(folder).read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    next(entry for name, entry in header.items() if name != "__metadata__").update(lie)
    changed = json.dumps(header).encode()
    weights(folder).write_bytes(struct.pack("<Q", len(changed)) + changed + content[8 + length :])


def zip_bomb(folder: Path, member: str) -> None:
    """What torch.save wrote, packed again, with gigabytes of zeros in one member."""
    weights(folder).unlink()
    plain, bomb = folder / "plain.zip", folder / "pytorch_model.bin"
    torch.save({"transformer.wte.weight": torch.zeros(8)}, plain)
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as packed:
        for name in source.namelist():
            with packed.open(name, "w", force_zip64=True) as opened:
                opened.write(source.read(name))
                if name.endswith(member):
                    for _ in range(BOMB // 2**24):
                        opened.write(bytes(2**24))
    plain.unlink()
    assert bomb.stat().st_size < 2**25


def index_that_leaves(folder: Path, target: str) -> None:
    weights(folder).rename(folder.parent / "a.safetensors")
    index = {"metadata": {}, "weight_map": {"model.embed_tokens.weight": target, "transformer.wte.weight": target}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


CASES = {
    "pickle": (lambda folder: pickle_with_code(folder, "zip"), "run code"),
    "old pickle": (lambda folder: pickle_with_code(folder, "old"), "run code"),
    "bare pickle": (lambda folder: pickle_with_code(folder, "raw"), "run code"),
    "header of an exabyte": (
        lambda folder: weights(folder).write_bytes(struct.pack("<Q", 2**60) + b"{}"),
        "header too large|but its files have 10 bytes",
    ),
    "offsets beyond the file": (lambda folder: lying_header(folder, data_offsets=[0, 2**40]), "invalid|offset"),
    "shape larger than the data": (lambda folder: lying_header(folder, shape=[10**9, 10**3]), "invalid|shape"),
    "a billion blocks": (
        lambda folder: change_config(folder, n_layer=10**9),
        "n_layer is 1000000000 but must be at most 1000",
    ),
    "a billion labels": (
        lambda folder: change_config(folder, num_labels=10**9),
        "num_labels is 1000000000 but must be at most 100000",
    ),
    "a vocabulary of a billion": (
        lambda folder: change_config(folder, vocab_size=10**9),
        r"describes 24,000,\d+,\d+ weights, but its files have|has the shape",
    ),
    "a width of a million": (
        lambda folder: change_config(folder, n_embd=2**20),
        r"describes [\d,]+ weights, but its files have|has the shape",
    ),
    "zip bomb, weights": (lambda folder: zip_bomb(folder, "data/0"), "run code|never compresses"),
    "zip bomb, pickle": (lambda folder: zip_bomb(folder, "data.pkl"), "run code|never compresses"),
    "index naming a file above": (
        lambda folder: index_that_leaves(folder, "../outside.safetensors"),
        "not a file in the same folder",
    ),
    "index naming a system file": (
        lambda folder: index_that_leaves(folder, "../../etc/passwd"),
        "not a file in the same folder",
    ),
    "index naming an absolute path": (
        lambda folder: index_that_leaves(folder, "/etc/passwd"),
        "not a file in the same folder",
    ),
}


def save(folder: Path, kind: str) -> None:
    """A small model of ours, or of transformers' GPT-2."""
    config = tiny_config()
    if kind == "own":
        ScratchGPT2ForCausalLM(config).save_pretrained(folder)
    else:
        sizes = {name: getattr(config, name) for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")}
        transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).save_pretrained(folder)


@pytest.fixture(scope="module", params=["own", "gpt2"])
def loaded(request, tmp_path_factory) -> tuple[Path, dict]:
    """The folder of all checkpoints, and what was said to each and by how many MB the peak memory grew."""
    parent = tmp_path_factory.mktemp(request.param)
    save(parent / "honest", request.param)
    for case, (harm, _) in CASES.items():
        save(parent / case, request.param)
        harm(parent / case)
    result = run_python(LOAD, request.param, *(parent / case for case in ("honest", *CASES)))
    assert result.returncode == 0, result.stderr[-2000:]
    return parent, json.loads(result.stdout)


@pytest.mark.parametrize("case", CASES)
def test_a_hostile_checkpoint(loaded, case):
    parent, results = loaded
    assert re.search(CASES[case][1], results[case]["said"]), results[case]["said"]
    assert "\n" not in results[case]["said"]
    assert not (parent / case / "ran").exists()
    assert results[case]["grown"] < 100


def test_an_honest_checkpoint_loads_within_the_same_bounds(loaded):
    assert loaded[1]["honest"]["said"] == "loaded"


def test_the_limits_are_those_of_the_message():
    ScratchGPT2Config(n_layer=1000, num_labels=100_000)
    for field, value in {"n_layer": 1001, "num_labels": 100_001}.items():
        with pytest.raises(ValueError, match=f"{field} is {value} but must be at most {value - 1}"):
            ScratchGPT2Config(**{field: value})
