"""Checkpoints in other formats against transformers' GPT-2 with random weights, for every head."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

import scratch_gpt2
from scratch_gpt2 import ScratchGPT2Config, ScratchGPT2ForCausalLM, ScratchGPT2ForSequenceClassification
from scratch_gpt2.configuration_scratch_gpt2 import PRESETS
from scratch_gpt2.openai_weights import (
    ARCHITECTURES,
    KEYS,
    check_complete,
    export_gpt2,
    model_shapes,
    to_gpt2_name,
    to_own_names,
    to_own_state_dict,
)

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


# The table


def test_names_in_both_directions():
    assert to_own_names("transformer.h.11.attn.c_attn.weight") == (
        [
            "model.layers.11.attn.q_proj.weight",
            "model.layers.11.attn.k_proj.weight",
            "model.layers.11.attn.v_proj.weight",
        ],
        "q, k and v fused, then transposed",
    )
    assert to_own_names("h.0.attn.c_proj.weight") == (["model.layers.0.attn.out_proj.weight"], "transposed")
    assert to_own_names("h.0.attn.bias") == ([], "ignored")
    assert to_gpt2_name("model.layers.7.attn.k_proj.bias") == "h.7.attn.c_attn.bias"
    assert to_gpt2_name("model.norm.weight") == "ln_f.weight"
    for pattern in KEYS:
        name = pattern.replace("N", "3")
        assert {to_gpt2_name(own_name) for own_name in to_own_names(name)[0]} <= {name}


@pytest.mark.parametrize("preset", ["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"])
def test_every_key_of_every_size_has_its_place(preset):
    with torch.device("meta"):
        gpt2 = GPT2LMHeadModel(GPT2Config(**PRESETS[preset]))
    shapes = model_shapes(ScratchGPT2ForCausalLM, ScratchGPT2Config.from_preset(preset))
    state_dict = to_own_state_dict(gpt2.state_dict().items(), shapes, preset)
    check_complete(state_dict, shapes, preset)
    assert {name: tensor.shape for name, tensor in state_dict.items()} == shapes
    assert len(shapes) == {"gpt2": 197, "gpt2-medium": 389, "gpt2-large": 581, "gpt2-xl": 773}[preset]


# Reading what transformers wrote


@pytest.mark.parametrize(("own", "theirs"), ARCHITECTURES.items())
def test_every_head_there_and_back(own, theirs, tmp_path):
    gpt2 = save_gpt2(tmp_path / "gpt2", random_gpt2(theirs, num_labels=3))
    model, report = getattr(scratch_gpt2, own).from_pretrained(tmp_path / "gpt2", output_loading_info=True)
    assert not any(report.values())
    assert_same_outputs(model, gpt2)

    export_gpt2(model, tmp_path / "back")
    back, report = getattr(transformers, theirs).from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(report.values())
    assert_same_tensors(back.state_dict(), gpt2.state_dict())
    written, original = (load_file(tmp_path / name / "model.safetensors") for name in ("back", "gpt2"))
    assert_same_tensors(written, original)

    again = getattr(scratch_gpt2, own).from_pretrained(tmp_path / "back")
    assert_same_tensors(again.state_dict(), model.state_dict())


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


@pytest.mark.parametrize("prefix", ["transformer.", ""])
@pytest.mark.parametrize("form", ["safetensors", "bin", "old bin", "sharded safetensors", "sharded bin"])
def test_every_file_format(form, prefix, tmp_path):
    gpt2 = random_gpt2()
    gpt2.config.save_pretrained(tmp_path)
    state_dict = {name.replace("transformer.", prefix): t.clone() for name, t in gpt2.state_dict().items()}
    for block in range(2):  # as in OpenAI's repositories on the Hub
        state_dict[f"{prefix}h.{block}.attn.bias"] = torch.ones(16, 16).tril().view(1, 1, 16, 16)
        state_dict[f"{prefix}h.{block}.attn.masked_bias"] = torch.tensor(-1e4)
    if form == "safetensors":
        save_file(state_dict, tmp_path / "model.safetensors")
    elif form.startswith("sharded"):
        save_sharded(tmp_path, state_dict, form.split()[1])
    else:
        file = tmp_path / "pytorch_model.bin"
        torch.save(state_dict, file, _use_new_zipfile_serialization=form == "bin")
    model, report = ScratchGPT2ForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert_same_outputs(model, gpt2)


def test_safetensors_come_before_pickles(tmp_path):
    gpt2 = save_gpt2(tmp_path)
    torch.save({"wte.weight": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    assert_same_outputs(ScratchGPT2ForCausalLM.from_pretrained(tmp_path), gpt2)


def test_hub_id_with_cache_dir_and_revision(tmp_path):
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--somebody--gpt2"
    gpt2 = save_gpt2(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "old").write_text(commit)
    model = ScratchGPT2ForCausalLM.from_pretrained(
        "somebody/gpt2", cache_dir=tmp_path, revision="old", local_files_only=True
    )
    assert_same_outputs(model, gpt2)

    (repository / "snapshots" / commit / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError) as error:
        ScratchGPT2ForCausalLM.from_pretrained("somebody/gpt2", cache_dir=tmp_path, revision="old")
    assert str(error.value) == (
        "No GPT-2 weights for 'somebody/gpt2': neither model.safetensors nor pytorch_model.bin is in the local cache, "
        "nor on the Hub if it can be reached; give a folder that has them."
    )


def test_subfolder(tmp_path):
    gpt2 = save_gpt2(tmp_path / "inside")
    (tmp_path / "config.json").write_text((tmp_path / "inside" / "config.json").read_text())
    assert_same_outputs(ScratchGPT2ForCausalLM.from_pretrained(tmp_path, subfolder="inside"), gpt2)


NEW_TENSORS = {
    "ScratchGPT2Model": set(),
    "ScratchGPT2ForCausalLM": set(),
    "ScratchGPT2DoubleHeadsModel": {"multiple_choice_head.weight", "multiple_choice_head.bias"},
    "ScratchGPT2ForSequenceClassification": {"score.weight"},
    "ScratchGPT2ForTokenClassification": {"classifier.weight", "classifier.bias"},
    "ScratchGPT2ForQuestionAnswering": {"qa_outputs.weight", "qa_outputs.bias"},
}


@pytest.mark.parametrize("source", ["GPT2Model", "GPT2LMHeadModel", "lm_head stored"])
@pytest.mark.parametrize(("own", "new"), NEW_TENSORS.items())
def test_any_checkpoint_into_any_head(own, new, source, tmp_path):
    gpt2 = save_gpt2(tmp_path, random_gpt2("GPT2LMHeadModel" if source == "lm_head stored" else source))
    if source == "lm_head stored":
        rewrite_weights(tmp_path, lambda tensors: tensors | {"lm_head.weight": gpt2.lm_head.weight.detach().clone()})
    model, report = getattr(scratch_gpt2, own).from_pretrained(tmp_path, output_loading_info=True)
    assert report["missing_keys"] == new
    assert not report["unexpected_keys"]
    network = getattr(model, "model", model)
    assert_same_outputs(network, getattr(gpt2, "transformer", gpt2))
    for name in new:
        tensor = model.get_parameter(name)
        assert tensor.abs().max() < 0.2  # initialised, neither 0.4 wide nor left as memory was found
        assert tensor.any() == name.endswith("weight")
    if hasattr(model, "lm_head"):
        assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_head_that_is_dropped_is_reported(tmp_path):
    save_gpt2(tmp_path, random_gpt2("GPT2ForSequenceClassification"))
    _, report = ScratchGPT2ForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert report["unexpected_keys"] == {"score.weight"}


def test_untied_output_layer_there_and_back(tmp_path):
    gpt2 = save_gpt2(tmp_path / "gpt2", random_gpt2(tie_word_embeddings=False))
    model = ScratchGPT2ForCausalLM.from_pretrained(tmp_path / "gpt2")
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    assert_same_outputs(model, gpt2)
    export_gpt2(model, tmp_path / "back")
    assert_same_tensors(GPT2LMHeadModel.from_pretrained(tmp_path / "back").state_dict(), gpt2.state_dict())


def test_tensors_own_their_memory(tmp_path):
    save_gpt2(tmp_path)
    state_dict = ScratchGPT2ForCausalLM.from_pretrained(tmp_path).state_dict()
    assert all(tensor.is_contiguous() for tensor in state_dict.values())
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in state_dict.values())


def test_embeddings_stay_in_the_memory_map_and_matrices_are_copied():
    gpt2 = random_gpt2()
    shapes = model_shapes(ScratchGPT2ForCausalLM, ScratchGPT2Config(**SIZES))
    names = {"wte.weight": "model.embed_tokens.weight", "h.0.mlp.c_fc.weight": "model.layers.0.mlp.up_proj.weight"}
    tensors = {name: gpt2.transformer.get_parameter(name).detach() for name in names}

    def kept(**options):
        own = to_own_state_dict(tensors.items(), shapes, "here", **options)
        return [own[own_name].data_ptr() == tensors[name].data_ptr() for name, own_name in names.items()]

    assert kept(keep=True) == [True, False]
    assert kept(keep=True, dtype=torch.float32) == [True, False]
    assert kept(keep=True, dtype=torch.bfloat16) == kept() == [False, False]


def test_tensors_that_share_memory_in_a_pickle_are_separated(tmp_path):
    gpt2 = random_gpt2()
    gpt2.config.tie_word_embeddings = False
    gpt2.config.save_pretrained(tmp_path)
    torch.save(gpt2.state_dict(), tmp_path / "pytorch_model.bin")  # the tied weight, by two names
    model = ScratchGPT2ForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    assert model.lm_head.weight.data_ptr() != model.model.embed_tokens.weight.data_ptr()


# Configuration, generation configuration, dtype


def test_every_field_of_the_configuration_is_carried_over(tmp_path):
    fields = {
        "vocab_size": 51,
        "n_positions": 17,
        "n_embd": 12,
        "n_layer": 1,
        "n_head": 3,
        "n_inner": 20,
        "activation_function": "relu",
        "resid_pdrop": 0.2,
        "embd_pdrop": 0.3,
        "attn_pdrop": 0.4,
        "layer_norm_epsilon": 1e-4,
        "initializer_range": 0.05,
        "summary_first_dropout": 0.5,
        "scale_attn_weights": False,
        "scale_attn_by_inverse_layer_idx": True,
        "use_cache": False,
        "bos_token_id": 2,
        "eos_token_id": 3,
        "pad_token_id": 4,
        "tie_word_embeddings": False,
        "classifier_dropout": 0.6,
        "problem_type": "regression",
        "id2label": {0: "no", 1: "yes", 2: "perhaps"},
        "label2id": {"no": 0, "yes": 1, "perhaps": 2},
    }
    gpt2 = save_gpt2(tmp_path / "gpt2", random_gpt2("GPT2ForSequenceClassification", **fields))
    model = ScratchGPT2ForSequenceClassification.from_pretrained(tmp_path / "gpt2")
    assert {name: getattr(model.config, name) for name in fields} == fields
    assert model.config.model_type == "scratch_gpt2"
    assert_same_outputs(model, gpt2)
    export_gpt2(model, tmp_path / "back")
    back = json.loads((tmp_path / "back" / "config.json").read_text())
    original = json.loads((tmp_path / "gpt2" / "config.json").read_text())
    assert back == original | {"n_ctx": 17}  # llama.cpp's converter reads n_ctx


def test_unsupported_option_raises(tmp_path):
    save_gpt2(tmp_path, random_gpt2(reorder_and_upcast_attn=True))
    with pytest.raises(ValueError) as error:
        ScratchGPT2ForCausalLM.from_pretrained(tmp_path)
    assert str(error.value) == (
        f"{tmp_path}: reorder_and_upcast_attn=True is not implemented: scratch_gpt2 supports only False "
        "(use transformers' own GPT-2 for the rest)."
    )


def test_overrides(tmp_path):
    save_gpt2(tmp_path)
    names = {0: "a", 1: "b", 2: "c", 3: "d"}
    model = ScratchGPT2ForSequenceClassification.from_pretrained(
        tmp_path, id2label=names, label2id={"a": 0}, attn_pdrop=0.0, attn_implementation="eager", device_map="cpu"
    )
    assert model.score.weight.shape == (4, 8)
    assert (model.config.id2label, model.config.label2id) == (names, {"a": 0})
    assert (model.config.attn_pdrop, model.config.resid_pdrop) == (0.0, 0.1)
    assert model.config._attn_implementation == "eager"
    assert ScratchGPT2ForSequenceClassification.from_pretrained(tmp_path, num_labels=5).config.num_labels == 5
    with pytest.raises(ValueError, match=r"n_embd \(8\) is not divisible by n_head \(3\)"):
        ScratchGPT2ForCausalLM.from_pretrained(tmp_path, n_head=3)
    with pytest.raises(TypeError, match="n_heads"):
        ScratchGPT2ForCausalLM.from_pretrained(tmp_path, n_heads=4)


@pytest.mark.parametrize("kind", [ScratchGPT2Config, GPT2Config, "folder"])
def test_given_configuration(kind, tmp_path):
    gpt2 = save_gpt2(tmp_path / "gpt2")
    config = (GPT2Config if kind == "folder" else kind)(**SIZES, num_labels=3, resid_pdrop=0.0)
    if kind == "folder":
        config.save_pretrained(tmp_path / "config")
        config = tmp_path / "config"
    model = ScratchGPT2ForSequenceClassification.from_pretrained(tmp_path / "gpt2", config=config)
    assert isinstance(model.config, ScratchGPT2Config)
    assert (model.config.num_labels, model.config.resid_pdrop, model.config.attn_pdrop) == (3, 0.0, 0.1)
    assert_same_outputs(model.model, gpt2.transformer)


def test_head_of_another_size_can_be_replaced(tmp_path):
    save_gpt2(tmp_path, random_gpt2("GPT2ForSequenceClassification", num_labels=3))
    with pytest.raises(ValueError) as error:
        ScratchGPT2ForSequenceClassification.from_pretrained(tmp_path, num_labels=5)
    assert str(error.value) == f"{tmp_path}: 'score.weight' has the shape (3, 8), the configuration says (5, 8)."
    model, report = ScratchGPT2ForSequenceClassification.from_pretrained(
        tmp_path, num_labels=5, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert model.score.weight.shape == (5, 8)
    assert [name for name, *_ in report["mismatched_keys"]] == ["score.weight"]


def test_generation_config(tmp_path):
    gpt2 = random_gpt2(pad_token_id=None)
    gpt2.generation_config.top_k = 7
    gpt2.generation_config.do_sample = True
    save_gpt2(tmp_path / "gpt2", gpt2)
    model = ScratchGPT2ForCausalLM.from_pretrained(tmp_path / "gpt2")
    assert (model.config.pad_token_id, model.generation_config.pad_token_id) == (1, 1)  # eos pads
    assert (model.generation_config.top_k, model.generation_config.do_sample) == (7, True)
    export_gpt2(model, tmp_path / "back")
    back = GPT2LMHeadModel.from_pretrained(tmp_path / "back")
    assert (back.generation_config.top_k, back.generation_config.do_sample) == (7, True)

    (tmp_path / "gpt2" / "generation_config.json").unlink()
    model = ScratchGPT2ForCausalLM.from_pretrained(tmp_path / "gpt2")
    assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (1, 1)


def test_greedy_text_is_the_same(tmp_path):
    gpt2 = save_gpt2(tmp_path)
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "attention_mask": torch.ones_like(IDS)}
    assert ScratchGPT2ForCausalLM.from_pretrained(tmp_path).generate(IDS, **options).tolist() == (
        gpt2.generate(IDS, **options).tolist()
    )


@pytest.mark.parametrize(
    ("stored", "asked", "loaded"),
    [
        (torch.float32, {}, torch.float32),
        (torch.bfloat16, {}, torch.bfloat16),
        (torch.bfloat16, {"dtype": "auto"}, torch.bfloat16),
        (torch.float32, {"dtype": torch.bfloat16}, torch.bfloat16),
        (torch.bfloat16, {"dtype": "float32"}, torch.float32),
        (torch.float32, {"torch_dtype": torch.float16}, torch.float16),
    ],
)
def test_dtype(stored, asked, loaded, tmp_path):
    gpt2 = save_gpt2(tmp_path, random_gpt2().to(stored))
    model = ScratchGPT2ForCausalLM.from_pretrained(tmp_path, **asked)
    assert {tensor.dtype for tensor in model.state_dict().values()} == {loaded}
    assert torch.equal(model.model.embed_tokens.weight, gpt2.transformer.wte.weight.to(loaded))
    assert model.config.dtype == loaded


LOAD_AND_MEASURE = """
import sys, torch
from scratch_gpt2 import ScratchGPT2ForCausalLM
from scratch_gpt2 import openai_weights
def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
before = peak()
model = ScratchGPT2ForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
print((peak() - before) * 1024 // sum(p.nbytes for p in model.parameters()))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="peak memory is read from Linux's /proc")
def test_original_is_never_in_memory_as_a_whole(tmp_path):
    sizes = {"n_layer": 10, "n_head": 8, "n_embd": 768, "n_positions": 16, "vocab_size": 1000}
    GPT2LMHeadModel(GPT2Config(**sizes)).save_pretrained(tmp_path)
    command = [sys.executable, "-c", LOAD_AND_MEASURE, str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(run.stdout) < 2  # in units of the loaded model; with the original it would be more than 3


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
        ({"model": {}}, "{} is not a checkpoint of nanoGPT, which holds 'model' and 'model_args'."),
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
        f"{tmp_path} holds a TensorFlow checkpoint, which needs TensorFlow to read: pip install scratch_gpt2[tf]."
    )


# What can be wrong


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda tensors: tensors | {"transformer.h.0.attn.rotary": torch.ones(1)},
            "{}: unknown key 'transformer.h.0.attn.rotary', which is no part of GPT-2.",
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
        f"{tmp_path / name} is damaged, or holds Python objects that could run code when loaded; "
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


def test_failed_export_leaves_nothing(tmp_path, monkeypatch):
    def fail(self, folder):
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
        "'model.layers.0.mlp.up_proj.lora_A.weight' is no part of GPT-2: merge adapters and do not quantize."
    )
    assert list(tmp_path.iterdir()) == []
