"""Checkpoints in other formats against transformers' GPT-2 with random weights, for every head."""

import json
import os

import pytest
import torch
import transformers
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
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel
from warm_python import run_python

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
    if own == "ScratchGPT2ForCausalLM":  # written without the prefix, which some readers of GPT-2 do not know
        original = {name.removeprefix("transformer."): tensor for name, tensor in original.items()}
    assert_same_tensors(written, original)

    again = getattr(scratch_gpt2, own).from_pretrained(tmp_path / "back")
    assert_same_tensors(again.state_dict(), model.state_dict())


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
    run = run_python(LOAD_AND_MEASURE, tmp_path)
    assert int(run.stdout) < 2  # in units of the loaded model; with the original it would be more than 3
