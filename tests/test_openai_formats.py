"""nanoGPT's and OpenAI's own formats, damaged and hostile checkpoints, and the export to transformers' GPT-2."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from gpt2_checkpoints import (
    IDS,
    SIZES,
    assert_same_outputs,
    assert_same_tensors,
    random_gpt2,
    rewrite_weights,
    save_gpt2,
    save_sharded,
)
from safetensors.torch import load_file
from transformers import AutoTokenizer, GPT2LMHeadModel

import scratch_gpt2
from scratch_gpt2 import ScratchGPT2Config, ScratchGPT2ForCausalLM
from scratch_gpt2.openai_weights import export_gpt2

# nanoGPT


def nanogpt_checkpoint(gpt2, bias=True, compiled=False, **more_args):
    """What nanoGPT's train.py saves: https://github.com/karpathy/nanoGPT/blob/master/train.py"""
    state_dict = {}
    for name, tensor in gpt2.state_dict().items():
        if bias or not name.endswith(".bias"):
            is_linear = ".c_" in name and name.endswith(".weight")
            state_dict["_orig_mod." * compiled + name] = (tensor.t() if is_linear else tensor).contiguous()
    config = gpt2.config
    sizes = {name: getattr(config, name) for name in ("n_layer", "n_head", "n_embd", "vocab_size")}
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter], betas=(0.9, 0.95))
    parameter.sum().backward()
    optimizer.step()
    return {
        "model": state_dict,
        "optimizer": optimizer.state_dict(),
        "model_args": sizes | {"block_size": config.n_positions, "bias": bias, "dropout": 0.3} | more_args,
        "iter_num": 2000,
        "best_val_loss": torch.tensor(1.5),
        "config": {"out_dir": "out", "learning_rate": 6e-4, "compile": compiled, "init_from": "scratch"},
    }


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("as_folder", [False, True])
def test_nanogpt(bias, compiled, as_folder, tmp_path):
    gpt2 = random_gpt2(activation_function="gelu")
    if not bias:
        for name, parameter in gpt2.named_parameters():
            if name.endswith(".bias"):
                torch.nn.init.zeros_(parameter)
    torch.save(nanogpt_checkpoint(gpt2, bias, compiled), tmp_path / "ckpt.pt")
    model, report = ScratchGPT2ForCausalLM.from_pretrained(
        tmp_path if as_folder else tmp_path / "ckpt.pt", output_loading_info=True
    )
    assert not any(report.values())
    assert_same_outputs(model, gpt2)
    assert (model.config.activation_function, model.config.attn_pdrop) == ("gelu", 0.3)
    assert (model.config.eos_token_id, model.config.pad_token_id) == (None, None)  # 50 letters, no end-of-text


def test_nanogpt_with_padded_vocabulary(tmp_path):
    gpt2 = random_gpt2(activation_function="gelu", vocab_size=50304)
    torch.save(nanogpt_checkpoint(gpt2), tmp_path / "ckpt.pt")
    model = ScratchGPT2ForCausalLM.from_pretrained(tmp_path)
    assert model.config.vocab_size == 50257
    assert (model.config.eos_token_id, model.config.pad_token_id) == (50256, 50256)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, gpt2(IDS).logits[..., :50257], rtol=1e-5, atol=1e-5)
        whole = ScratchGPT2ForCausalLM.from_pretrained(tmp_path, vocab_size=50304)
        torch.testing.assert_close(whole(IDS).logits, gpt2(IDS).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [
        ({"model": {}}, "{} is not a checkpoint of nanoGPT, which contains 'model' and 'model_args'."),
        (
            nanogpt_checkpoint(random_gpt2(), use_rmsnorm=True),
            "{}: use_rmsnorm in model_args is not an option of nanoGPT's GPT.",
        ),
    ],
)
def test_not_nanogpt(checkpoint, message, tmp_path):
    file = tmp_path / "ckpt.pt"
    torch.save(checkpoint, file)
    with pytest.raises(ValueError) as error:
        ScratchGPT2ForCausalLM.from_pretrained(file)
    assert str(error.value) == message.format(file)


# OpenAI's TensorFlow folders


def tensorflow_name(name):
    """`transformer.h.0.attn.c_attn.weight` -> `model/h0/attn/c_attn/w`, as in OpenAI's src/model.py."""
    name = name.replace("transformer.", "model.").replace(".h.", ".h")
    for embedding in ("wte", "wpe"):
        name = name.replace(f"{embedding}.weight", embedding)
    last = "g" if ".ln_" in name else "w"
    return name.replace(".weight", f".{last}").replace(".bias", ".b").replace(".", "/")


def save_tensorflow(folder, gpt2):
    tf = pytest.importorskip("tensorflow", reason="OpenAI's original format needs pip install scratch_gpt2[tf]")
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        for name, tensor in gpt2.transformer.state_dict().items():
            tensor = tensor[None] if ".c_" in name and tensor.ndim == 2 else tensor  # a convolution of width 1
            tf.compat.v1.get_variable(tensorflow_name(f"transformer.{name}"), initializer=tensor.numpy())
        session.run(tf.compat.v1.global_variables_initializer())
        tf.compat.v1.train.Saver().save(session, str(folder / "model.ckpt"))
    config = gpt2.config
    hparams = {"n_vocab": config.vocab_size, "n_ctx": config.n_positions, "n_embd": config.n_embd}
    (folder / "hparams.json").write_text(json.dumps(hparams | {"n_head": config.n_head, "n_layer": config.n_layer}))


def test_openai_tensorflow_folder(tmp_path):
    gpt2 = random_gpt2()
    save_tensorflow(tmp_path, gpt2)
    model, report = ScratchGPT2ForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert_same_outputs(model, gpt2)
    save_gpt2(tmp_path / "gpt2", gpt2)
    assert_same_tensors(model.state_dict(), ScratchGPT2ForCausalLM.from_pretrained(tmp_path / "gpt2").state_dict())

    (tmp_path / "checkpoint").unlink()  # a mere pointer to model.ckpt
    assert_same_outputs(ScratchGPT2ForCausalLM.from_pretrained(tmp_path), gpt2)
    data = tmp_path / "model.ckpt.data-00000-of-00001"
    data.write_bytes(data.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"model.ckpt cannot be read \(.*\): it is damaged or incomplete; copy it"):
        ScratchGPT2ForCausalLM.from_pretrained(tmp_path)


def test_tensorflow_is_named_when_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    (tmp_path / "hparams.json").write_text("{}")
    with pytest.raises(ImportError) as error:
        ScratchGPT2ForCausalLM.from_pretrained(tmp_path)
    assert str(error.value) == (
        f"{tmp_path} contains a TensorFlow checkpoint; install TensorFlow to load it: pip install scratch_gpt2[tf]."
    )


# What can be wrong


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda tensors: tensors | {"transformer.h.0.attn.rotary": torch.ones(1)},
            "{}: unknown key 'transformer.h.0.attn.rotary', which is not part of GPT-2.",
        ),
        (
            lambda tensors: tensors | {"transformer.h.2.ln_1.bias": torch.ones(8)},
            "{}: unknown key 'transformer.h.2.ln_1.bias', as the configuration has fewer blocks.",
        ),
        (
            lambda tensors: tensors | {"wte.weight": torch.ones(50, 8)},
            "{}: key 'wte.weight' occurs twice, with and without 'transformer.'.",
        ),
        (
            lambda tensors: {n: t for n, t in tensors.items() if "h.1.attn.c_attn.weight" not in n},
            "{}: missing key 'h.1.attn.c_attn.weight'.",
        ),
        (
            lambda tensors: {n: t for n, t in tensors.items() if "h.1." not in n},
            "{}: missing key 'h.1.ln_1.weight', 'h.1.ln_1.bias', 'h.1.attn.c_attn.weight' and 9 more.",
        ),
        (
            lambda tensors: tensors | {"transformer.h.0.attn.c_attn.weight": torch.ones(24, 8)},
            "{}: 'transformer.h.0.attn.c_attn.weight' has the shape (24, 8), the configuration says (8, 24).",
        ),
        (
            lambda tensors: tensors | {"transformer.wpe.weight": torch.ones(32, 8)},
            "{}: 'transformer.wpe.weight' has the shape (32, 8), the configuration says (16, 8).",
        ),
    ],
)
def test_wrong_keys_and_shapes(change, message, tmp_path):
    save_gpt2(tmp_path)
    rewrite_weights(tmp_path, change)
    with pytest.raises(ValueError) as error:
        ScratchGPT2ForCausalLM.from_pretrained(tmp_path)
    assert str(error.value) == message.replace("{}", str(tmp_path))


def test_half_a_head_is_an_error(tmp_path):
    save_gpt2(tmp_path, random_gpt2("GPT2ForTokenClassification"))
    rewrite_weights(tmp_path, lambda tensors: {n: t for n, t in tensors.items() if n != "classifier.bias"})
    with pytest.raises(ValueError) as error:
        scratch_gpt2.ScratchGPT2ForTokenClassification.from_pretrained(tmp_path)
    assert str(error.value) == f"{tmp_path}: missing key 'classifier.bias'."


class Intruder:
    """Pickled, it makes a folder when loaded without care."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "ckpt.pt"])
def test_code_in_a_pickle_is_not_run(name, tmp_path):
    random_gpt2().config.save_pretrained(tmp_path)
    torch.save({"wte.weight": Intruder(str(tmp_path / "intruded"))}, tmp_path / name)
    with pytest.raises(ValueError) as error:
        ScratchGPT2ForCausalLM.from_pretrained(tmp_path)
    assert str(error.value) == (
        f"{tmp_path / name} is damaged, or contains Python objects that could run code when loaded; "
        "ask for a safetensors file."
    )
    assert not (tmp_path / "intruded").exists()


@pytest.mark.parametrize("kept", [0, 5, 1000])
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "ckpt.pt"])
def test_truncated_file(name, kept, tmp_path):
    gpt2 = save_gpt2(tmp_path)
    torch.save(gpt2.state_dict(), tmp_path / "pytorch_model.bin")
    if name == "ckpt.pt":
        torch.save(nanogpt_checkpoint(gpt2), tmp_path / name)
    if name == "pytorch_model.bin":
        (tmp_path / "model.safetensors").unlink()
    file = tmp_path / name
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(ValueError) as error:
        ScratchGPT2ForCausalLM.from_pretrained(tmp_path)
    message = str(error.value)
    assert message.startswith(f"{file} ")
    assert "damaged" in message
    assert "\n" not in message


def test_damaged_index_and_missing_shard(tmp_path):
    gpt2 = random_gpt2()
    gpt2.config.save_pretrained(tmp_path)
    save_sharded(tmp_path, {name: tensor.clone() for name, tensor in gpt2.state_dict().items()}, "safetensors")
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"model-00002-of-00002.safetensors.* is missing; the checkpoint is not"
    ):
        ScratchGPT2ForCausalLM.from_pretrained(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text("{")
    with pytest.raises(
        ValueError, match=r"index.json cannot be read \(.*\): it is damaged or incomplete; copy it again"
    ):
        ScratchGPT2ForCausalLM.from_pretrained(tmp_path)


def test_folder_without_weights(tmp_path):
    random_gpt2().config.save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError) as error:
        ScratchGPT2ForCausalLM.from_pretrained(tmp_path)
    assert str(error.value) == (
        f"No GPT-2 weights for '{tmp_path}': neither model.safetensors nor pytorch_model.bin is in that folder; "
        "give a folder that has them."
    )


# Export


def test_export_replaces_files_and_leaves_others(tmp_path):
    model = ScratchGPT2ForCausalLM(ScratchGPT2Config(**SIZES))
    (tmp_path / "model.safetensors").write_text("old")
    (tmp_path / "tokenizer.json").write_text("stays")
    export_gpt2(model, tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert_same_outputs(model.eval(), GPT2LMHeadModel.from_pretrained(tmp_path))


def test_export_keeps_dtype_and_leaves_the_model_alone(tmp_path):
    model = ScratchGPT2ForCausalLM(ScratchGPT2Config(**SIZES)).to(torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    export_gpt2(model, tmp_path)
    assert GPT2LMHeadModel.from_pretrained(tmp_path).dtype == torch.bfloat16
    assert_same_tensors(model.state_dict(), before)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_export_takes_the_tokenizer_along(tiny_tokenizer, tmp_path):
    export_gpt2(ScratchGPT2ForCausalLM(ScratchGPT2Config(**SIZES)), tmp_path, tokenizer=tiny_tokenizer)
    exported = AutoTokenizer.from_pretrained(tmp_path)
    assert exported("The rat sat.").input_ids == tiny_tokenizer("The rat sat.").input_ids
    assert exported.chat_template == tiny_tokenizer.chat_template and exported.eos_token == "<|endoftext|>"


@pytest.mark.parametrize("tied", [True, False])
def test_names_are_those_of_openais_repositories(tied, tmp_path):
    """mlx-lm refuses "transformer."; transformers would not find an untied head without it in version 4."""
    model = ScratchGPT2ForCausalLM(ScratchGPT2Config(**SIZES, tie_word_embeddings=tied)).eval()
    export_gpt2(model, tmp_path)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert ("wte.weight" in names, "lm_head.weight" in names) == (tied, not tied)
    assert any(name.startswith("transformer.") for name in names) == (not tied)
    assert_same_outputs(model, GPT2LMHeadModel.from_pretrained(tmp_path))
    assert_same_outputs(model, ScratchGPT2ForCausalLM.from_pretrained(tmp_path))


def test_failed_export_leaves_nothing(tmp_path, monkeypatch):
    def fail(self, folder, **options):
        (Path(folder) / "config.json").write_text("{}")
        raise OSError("disk full")

    monkeypatch.setattr(GPT2LMHeadModel, "save_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        export_gpt2(ScratchGPT2ForCausalLM(ScratchGPT2Config(**SIZES)), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_export_refuses_what_is_not_gpt2(tmp_path):
    with pytest.raises(ValueError) as error:
        export_gpt2(torch.nn.Linear(1, 1), tmp_path)
    assert str(error.value).startswith("Linear has no counterpart in GPT-2: export one of ScratchGPT2Model, ")
    model = ScratchGPT2ForCausalLM(ScratchGPT2Config(**SIZES))
    model.model.layers[0].mlp.up_proj.lora_A = torch.nn.Linear(8, 1, bias=False)
    with pytest.raises(ValueError) as error:
        export_gpt2(model, tmp_path)
    assert str(error.value) == (
        "'model.layers.0.mlp.up_proj.lora_A.weight' is not part of GPT-2: merge adapters and do not quantize."
    )
    assert list(tmp_path.iterdir()) == []
