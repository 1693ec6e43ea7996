"""examples/generate.py in a process of its own: consoles that lack a character, several processes, other models."""

import os
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import transformers
from model_fixtures import fill, tiny_model
from warm_python import run_python

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "generate.py"


@pytest.fixture(scope="module")
def folder(tiny_tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_model(vocab_size=290, n_positions=64).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


def generate(*arguments):
    return run_python(EXAMPLE, "--max_new_tokens", "2", *arguments)


def generate_in_a_new_interpreter(*arguments, launcher=(), text=None, **environment):
    """The finished process, whose output is bytes."""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} | environment
    command = [sys.executable, *launcher, EXAMPLE, "--max_new_tokens", "2", *arguments]
    return subprocess.run(list(map(str, command)), env=environment, input=text, capture_output=True, timeout=300)


def test_characters_that_the_console_lacks_do_not_end_the_run(folder):
    done = generate_in_a_new_interpreter("--model", folder, "--prompt", "cat → mat", PYTHONIOENCODING="cp1252")
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode("cp1252").startswith("cat ? mat")


def test_the_byte_order_mark_of_standard_input_is_not_text(folder):
    text = "\ufeffcat → mat\n".encode()
    done = generate_in_a_new_interpreter("--model", folder, "--prompt", "-", text=text, PYTHONIOENCODING="utf-8")
    assert done.returncode == 0, done.stderr
    printed = done.stdout.decode("utf-8")
    assert printed.startswith("cat → mat") and not printed.startswith("cat → mat\n")


def test_kernels_are_named_once_and_can_be_left_as_loaded(folder):
    first, second = (generate("--model", folder, "--prompt", "cat", "--greedy", *no) for no in ([], ["--no_optimize"]))
    assert first.stdout == second.stdout and first.stdout.startswith("cat")
    assert first.stderr.count("Kernels: ") == 1 and "Kernels" not in second.stderr


def test_several_processes_write_once(folder):
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    done = generate_in_a_new_interpreter("--model", folder, "--prompt", "The hat", launcher=launcher)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(b"The hat") == 1


def test_adapters_and_other_architectures(folder, tiny_tokenizer, tmp_path):
    base = transformers.AutoModelForCausalLM.from_pretrained(folder)
    adapted = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", r=2))
    fill(adapted).save_pretrained(tmp_path / "adapter")
    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=290, **sizes))
    llama.save_pretrained(tmp_path / "llama")
    tiny_tokenizer.save_pretrained(tmp_path / "llama")
    for name in ("adapter", "llama"):
        done = generate("--model", tmp_path / name, "--prompt", "cat", "--greedy")
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("cat")
