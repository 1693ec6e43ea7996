"""Small checkpoints of transformers' GPT-2 with random weights, and how they are compared with ours."""

import json
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import GPT2Config

SIZES = {"n_layer": 2, "n_head": 2, "n_embd": 8, "n_positions": 16, "vocab_size": 50}
IDS = torch.tensor([[3, 14, 15, 9, 26, 5], [35, 8, 9, 7, 9, 32]])


def random_gpt2(architecture="GPT2LMHeadModel", **overrides):
    """transformers' GPT-2 with every tensor random, biases and norms too."""
    torch.manual_seed(0)
    config = GPT2Config(**{**SIZES, "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0, **overrides})
    model = getattr(transformers, architecture)(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return model


def save_gpt2(folder, model=None, **save_options):
    model = model or random_gpt2()
    model.save_pretrained(folder, **save_options)
    return model


def rewrite_weights(folder, change):
    """Change the state dict in a folder's safetensors file."""
    file = Path(folder) / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def assert_same_outputs(own, theirs):
    with torch.no_grad():
        own_outputs, their_outputs = own(IDS), theirs(IDS)
    names = {"last_hidden_state", "logits", "mc_logits", "start_logits", "end_logits"} & their_outputs.keys()
    assert names
    for name in names:
        torch.testing.assert_close(own_outputs[name], their_outputs[name], rtol=1e-5, atol=1e-5)


def assert_same_tensors(left, right):
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


def save_sharded(folder, state_dict, suffix):
    """Two shards and their index, as transformers writes and wrote them."""
    names = sorted(state_dict)
    stem = {"safetensors": "model", "bin": "pytorch_model"}[suffix]
    files = [f"{stem}-0000{i}-of-00002.{suffix}" for i in (1, 2)]
    for file, part in zip(files, (names[::2], names[1::2]), strict=True):
        shard = {name: state_dict[name] for name in part}
        (save_file if suffix == "safetensors" else torch.save)(shard, folder / file)
    index = {"metadata": {}, "weight_map": {name: files[i % 2] for i, name in enumerate(names)}}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
