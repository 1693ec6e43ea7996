"""What `from_pretrained` makes of checkpoints that do not say what they are, have gaps, or come with an adapter."""

import json
import logging
import os
import re
import shutil

import pytest
import torch
import transformers
from model_fixtures import random_ids, relative_error, tiny_config, tiny_model
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import scratch_gpt2
from scratch_gpt2 import ScratchGPT2ForCausalLM
from scratch_gpt2.checkpoint_files import find_weight_files, hub_answers
from scratch_gpt2.evaluation.models import load_causal_lm
from scratch_gpt2.training.start import model_to_continue

SIZES = {"vocab_size": 61, "n_positions": 32, "n_embd": 24, "n_layer": 3, "n_head": 4, "initializer_range": 0.3}
IDS = random_ids(2, 9)


@pytest.fixture(scope="module")
def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(**SIZES, bos_token_id=1, eos_token_id=2)).eval()


def change_config(folder, remove=(), **fields):
    file = folder / "config.json"
    config = json.loads(file.read_text()) | fields
    file.write_text(json.dumps({name: value for name, value in config.items() if name not in remove}))


def change_weights(folder, change):
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", metadata={"format": "pt"})


def assert_equal(model, gpt2):
    assert relative_error(model(IDS).logits, gpt2(IDS).logits) <= 1e-5


# A GPT-2 is known by the names of its tensors


@pytest.mark.parametrize("pickled", [False, True], ids=["safetensors", "pickle"])
@pytest.mark.parametrize("model_type", [None, "llama", "gpt_neo", "scratch_gpt2"])
def test_gpt2_whose_configuration_says_nothing_or_something_else(model_type, pickled, gpt2, tmp_path):
    """https://github.com/huggingface/transformers/issues/10293; GPT2-Chinese, issue 137."""
    gpt2.save_pretrained(tmp_path)
    change_config(tmp_path, **{"model_type": model_type} if model_type else {"remove": ["model_type"]})
    if pickled:
        (tmp_path / "model.safetensors").unlink()
        torch.save(gpt2.state_dict(), tmp_path / "pytorch_model.bin")
    if pickled and model_type == "scratch_gpt2":  # ours never save a pickle
        with pytest.raises(ValueError, match=r"has no safetensors file, only a pickle, which could run code"):
            ScratchGPT2ForCausalLM.from_pretrained(tmp_path)
        return
    assert_equal(ScratchGPT2ForCausalLM.from_pretrained(tmp_path), gpt2)
    assert scratch_gpt2.ScratchGPT2Model.from_pretrained(tmp_path).config.n_layer == 3


def test_shards_and_base_model_without_a_model_type(gpt2, tmp_path):
    gpt2.save_pretrained(tmp_path, max_shard_size="20KB")
    assert not (tmp_path / "model.safetensors").exists()
    change_config(tmp_path, remove=["model_type"])
    assert_equal(ScratchGPT2ForCausalLM.from_pretrained(tmp_path), gpt2)
    gpt2.transformer.save_pretrained(tmp_path / "base")
    change_config(tmp_path / "base", remove=["model_type"])
    assert_equal(ScratchGPT2ForCausalLM.from_pretrained(tmp_path / "base"), gpt2)


def test_a_folder_without_a_configuration(gpt2, tmp_path):
    gpt2.save_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    assert_equal(ScratchGPT2ForCausalLM.from_pretrained(tmp_path, config=gpt2.config), gpt2)
    with pytest.raises(FileNotFoundError) as error:
        ScratchGPT2ForCausalLM.from_pretrained(tmp_path)
    assert str(error.value) == (f"{tmp_path} has no config.json; copy it too, or give a configuration with config=.")


def test_a_state_dict_with_gpt2s_names_is_converted(gpt2):
    weights = {name: tensor.clone() for name, tensor in gpt2.state_dict().items()}
    model = ScratchGPT2ForCausalLM.from_pretrained(None, config=gpt2.config, state_dict=weights)
    assert_equal(model, gpt2)
    own_config = tiny_config(initializer_range=0.3)
    assert_equal(ScratchGPT2ForCausalLM.from_pretrained(None, config=own_config, state_dict=weights), gpt2)


def test_a_checkpoint_of_which_nothing_fits_is_refused(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    change_weights(tmp_path, lambda tensors: {f"x.{name}": tensor for name, tensor in tensors.items()})
    for head in (ScratchGPT2ForCausalLM, scratch_gpt2.ScratchGPT2Model):
        with pytest.raises(ValueError) as error:
            head.from_pretrained(tmp_path)
        assert str(error.value) == (
            f"{tmp_path} is not a checkpoint of GPT-2: no tensor of the network was found in it."
        )


def test_a_llama_is_refused(tmp_path):
    sizes = {"vocab_size": 61, "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 3}
    LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4)).save_pretrained(tmp_path)
    with pytest.raises(ValueError) as error:
        ScratchGPT2ForCausalLM.from_pretrained(tmp_path)
    assert str(error.value) == (
        f"{tmp_path} is a checkpoint of 'llama', not of GPT-2; load it with transformers' AutoModel."
    )


def test_our_own_tensors_are_known_by_their_names_too(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    for change in ({"model_type": "gpt_neo"}, {"remove": ["model_type"]}):
        change_config(tmp_path, **change)
        assert torch.equal(ScratchGPT2ForCausalLM.from_pretrained(tmp_path)(IDS).logits, model(IDS).logits)


# Gaps


def lacking(*names):
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if name not in names}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lacking("model.norm.weight"), "lacks 'model.norm.weight'; copy it again, or correct the configuration."),
        (
            lacking("model.norm.weight", "model.norm.bias"),
            "lacks 'model.norm.bias', 'model.norm.weight'; copy it again, or correct the configuration.",
        ),
        (
            lambda tensors: {name: tensor for name, tensor in tensors.items() if "layers.1." not in name},
            "lacks 'model.layers.1.attn.k_proj.bias', 'model.layers.1.attn.k_proj.weight', "
            "'model.layers.1.attn.out_proj.bias' and 13 more; copy it again, or correct the configuration.",
        ),
    ],
    ids=["a weight", "a norm", "a block"],
)
def test_a_gap_in_the_network_is_an_error(change, message, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    change_weights(tmp_path, change)
    for auto in (ScratchGPT2ForCausalLM, transformers.AutoModelForCausalLM):
        with pytest.raises(ValueError) as error:
            auto.from_pretrained(tmp_path)
        assert str(error.value) == f"The checkpoint {tmp_path} {message}"
    head = scratch_gpt2.ScratchGPT2ForSequenceClassification
    with pytest.raises(ValueError, match=r"lacks 'model\."):
        head.from_pretrained(tmp_path)
    base = scratch_gpt2.ScratchGPT2Model
    with pytest.raises(ValueError, match=r"lacks '(norm|layers)"):
        base.from_pretrained(tmp_path)


def test_a_configuration_with_another_number_of_blocks_is_an_error(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    change_config(tmp_path, n_layer=4)
    with pytest.raises(ValueError, match=r"^The checkpoint .* lacks 'model\.layers\.3\.attn\.k_proj\.bias', "):
        ScratchGPT2ForCausalLM.from_pretrained(tmp_path)
    change_config(tmp_path, n_layer=2)
    with pytest.raises(ValueError) as error:
        ScratchGPT2ForCausalLM.from_pretrained(tmp_path)
    assert str(error.value) == (
        f"The checkpoint {tmp_path} has unexpected tensors: "
        "'model.layers.2.attn.k_proj.bias', 'model.layers.2.attn.k_proj.weight', 'model.layers.2.attn.out_proj.bias' "
        "and 13 more; correct the configuration, which may describe too few blocks."
    )


def test_half_a_head_is_an_error_and_a_new_head_is_not(tmp_path):
    head = scratch_gpt2.ScratchGPT2ForTokenClassification
    head(tiny_config(num_labels=3)).save_pretrained(tmp_path)
    change_weights(tmp_path, lacking("classifier.bias"))
    with pytest.raises(ValueError, match=r"lacks 'classifier\.bias'; "):
        head.from_pretrained(tmp_path)
    change_weights(tmp_path, lacking("classifier.weight"))
    assert head.from_pretrained(tmp_path).config.num_labels == 3


def test_who_asks_for_a_report_gets_it(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    change_weights(tmp_path, lacking("model.norm.weight"))
    model, report = ScratchGPT2ForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert report["missing_keys"] == {"model.norm.weight"}
    assert type(model) is ScratchGPT2ForCausalLM


def spoil(tensors):
    tensors["model.norm.weight"][3] = float("nan")
    return tensors


def write(name, content):
    return lambda folder: (folder / name).write_text(content)


DAMAGES = {
    "a list": (write("config.json", "[]"), r"config.json cannot be read \(it holds no JSON object\)"),
    "nested": (write("config.json", "[" * 10**5), r"config.json cannot be read \(maximum recursion depth"),
    "a word": (lambda folder: change_config(folder, n_layer="one"), r"Field 'n_layer' expected int, got str"),
    "no configuration": (
        lambda folder: (folder / "config.json").unlink(),
        r"has no config.json; give the folder|do not have the shapes that its configuration describes",
    ),
    "another size": (lambda folder: change_config(folder, n_positions=64), r"do not have the shapes that its config"),
    "generation": (write("generation_config.json", "[]"), r"generation_config.json cannot be read \(it holds no JSON"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), r"has no model.safetensors; give the"),
    "nan": (
        lambda folder: change_weights(folder, spoil),
        r"weights that are not finite \(model.norm.weight\); use an",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_refused_in_one_sentence(name, tmp_path, caplog):
    damage, message = DAMAGES[name]
    tiny_model().save_pretrained(tmp_path)
    damage(tmp_path)
    logging.getLogger("transformers").addHandler(caplog.handler)
    for load in (load_causal_lm, model_to_continue):
        with pytest.raises((ValueError, OSError)) as error:
            load(str(tmp_path))
        assert (
            re.search(message, str(error.value)) and str(tmp_path) in str(error.value) and "\n" not in str(error.value)
        )
    logging.getLogger("transformers").removeHandler(caplog.handler)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent/folder/x", "absent/folder/x does not exist; "),
        ("", " does not exist; "),
        ("a.json", "a.json is a file; "),
    ],
)
def test_what_is_no_folder_is_refused_in_one_sentence(name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.json").write_text("[]")
    for load in (load_causal_lm, model_to_continue):
        with pytest.raises(OSError) as error:
            load(name)
        assert str(error.value).startswith(message)


# Adapters


def save_adapter(model, folder):
    """LoRA whose output is not 0; and the logits it gives."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=False)
    adapted = peft.get_peft_model(model, config).eval()
    adapted.save_pretrained(folder)
    return adapted(IDS).logits.detach()


@pytest.mark.parametrize("base_type", ["gpt2", None, "own"])
def test_an_adapter_is_loaded_on_its_converted_base(base_type, gpt2, tmp_path):
    """https://github.com/UKPLab/sentence-transformers/issues/3865: the base had random weights."""
    base = tmp_path / "base"
    if base_type == "own":
        tiny_model().save_pretrained(base)
    else:
        gpt2.save_pretrained(base)
    if base_type is None:
        change_config(base, remove=["model_type"])
    expected = save_adapter(ScratchGPT2ForCausalLM.from_pretrained(base), tmp_path / "adapter")
    model = ScratchGPT2ForCausalLM.from_pretrained(tmp_path / "adapter")
    assert type(model) is ScratchGPT2ForCausalLM
    assert relative_error(model(IDS).logits, expected) <= 1e-5
    bf16, report = ScratchGPT2ForCausalLM.from_pretrained(
        tmp_path / "adapter", dtype=torch.bfloat16, output_loading_info=True
    )
    assert bf16.model.norm.weight.dtype == torch.bfloat16
    assert not report["missing_keys"]
    inner = tmp_path / "run" / "checkpoint-5"
    shutil.copytree(tmp_path / "adapter", inner)
    model = ScratchGPT2ForCausalLM.from_pretrained(tmp_path / "run", subfolder="checkpoint-5")
    assert relative_error(model(IDS).logits, expected) <= 1e-5


@pytest.mark.parametrize("base_type", ["gpt2", "own"])
def test_an_adapter_beside_its_base(base_type, gpt2, tmp_path):
    if base_type == "own":
        tiny_model().save_pretrained(tmp_path)
    else:
        gpt2.save_pretrained(tmp_path)
    expected = save_adapter(ScratchGPT2ForCausalLM.from_pretrained(tmp_path), tmp_path)
    assert (tmp_path / "adapter_config.json").exists()
    assert relative_error(ScratchGPT2ForCausalLM.from_pretrained(tmp_path)(IDS).logits, expected) <= 1e-5


def test_an_adapter_of_transformers_gpt2_is_refused(gpt2, tmp_path):
    """Its layer c_attn is three here. Merged into its base, it can be loaded."""
    peft = pytest.importorskip("peft")
    gpt2.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False)
    adapted = peft.get_peft_model(GPT2LMHeadModel.from_pretrained(tmp_path / "base"), config).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"does not fit ScratchGPT2ForCausalLM; .* merge it into its base"):
        ScratchGPT2ForCausalLM.from_pretrained(tmp_path / "adapter")
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = ScratchGPT2ForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert relative_error(merged(IDS).logits, adapted.base_model(IDS).logits.detach()) <= 1e-5


def test_the_base_of_an_adapter_is_checked_too(tmp_path):
    base = tmp_path / "base"
    tiny_model().save_pretrained(base)
    save_adapter(ScratchGPT2ForCausalLM.from_pretrained(base), tmp_path / "adapter")
    change_config(base, n_embd=2**20)
    with pytest.raises(ValueError, match=r"describes [\d,]+ weights, but its files have"):
        ScratchGPT2ForCausalLM.from_pretrained(tmp_path / "adapter")


def change_adapter(**fields):
    def change(folder):
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | fields))

    return change


def lose_a_tensor(folder):
    tensors = load_file(folder / "adapter_model.safetensors")
    del tensors[min(tensors)]
    save_file(tensors, folder / "adapter_model.safetensors")


ADAPTER_DAMAGES = {
    "a list": (write("adapter_config.json", "[]"), r"adapter_config.json cannot be read \(it holds no JSON object\)"),
    "no base": (change_adapter(base_model_name_or_path=None), r"names no base_model_name_or_path; add the model"),
    "unknown": (change_adapter(peft_type="FOO"), r"is damaged or was trained on another model \('FOO'\)"),
    "another rank": (change_adapter(r=3), r"is damaged or was trained on another model \("),
    "cut": (lambda folder: os.truncate(folder / "adapter_model.safetensors", 99), r"deserializing header"),
    "incomplete": (lose_a_tensor, r"is damaged or was trained on another model \(Found missing adapter keys"),
}


@pytest.mark.parametrize("name", ADAPTER_DAMAGES)
def test_a_damaged_adapter_is_refused_in_one_sentence(name, tmp_path):
    damage, message = ADAPTER_DAMAGES[name]
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    tiny_model().save_pretrained(base)
    save_adapter(ScratchGPT2ForCausalLM.from_pretrained(base), adapter)
    load_causal_lm(str(adapter))
    damage(adapter)
    for load in (load_causal_lm, model_to_continue):
        if (load, name) == (model_to_continue, "incomplete"):
            continue  # the library reports it
        with pytest.raises(ValueError) as error:
            load(str(adapter))
        assert (
            re.search(message, str(error.value)) and str(adapter) in str(error.value) and "\n" not in str(error.value)
        )


def test_a_classifier_is_not_continued_as_a_language_model(tmp_path):
    scratch_gpt2.ScratchGPT2ForSequenceClassification(tiny_config()).save_pretrained(tmp_path)
    for load in (load_causal_lm, model_to_continue):
        with pytest.raises(ValueError, match=r"is a classifier; give a language model\.$"):
            load(str(tmp_path))


# Variants


@pytest.mark.parametrize("family", ["own", "gpt2"])
@pytest.mark.parametrize("sharded", [False, True])
def test_variants_have_the_librarys_names(sharded, family, gpt2, tmp_path):
    model = tiny_model() if family == "own" else gpt2
    model.save_pretrained(tmp_path, variant="fp16", **{"max_shard_size": "20KB"} if sharded else {})
    names = [file.name for file in tmp_path.iterdir() if file.suffix == ".json" and "index" in file.name]
    assert names == (["model.safetensors.index.fp16.json"] if sharded else [])
    assert relative_error(ScratchGPT2ForCausalLM.from_pretrained(tmp_path, variant="fp16")(IDS).logits,
                          model(IDS).logits) <= 1e-5  # fmt: skip
    files = find_weight_files(str(tmp_path), {"variant": "fp16"}, {})
    assert all("fp16" in file and file.endswith(".safetensors") for file in files)
    assert len(files) > 1 if sharded else len(files) == 1


@pytest.mark.parametrize("family", ["own", "gpt2"])
def test_the_index_of_a_variant_is_checked(family, gpt2, tmp_path):
    folder = tmp_path / "checkpoint"
    (tiny_model() if family == "own" else gpt2).save_pretrained(folder)
    (folder / "model.safetensors").rename(tmp_path / "outside.safetensors")
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "../outside.safetensors"}}
    (folder / "model.safetensors.index.fp16.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"names '\.\./outside\.safetensors' as a weight file, which is not"):
        ScratchGPT2ForCausalLM.from_pretrained(folder, variant="fp16")


@pytest.mark.parametrize("place", ["variant", "index of a variant", "named by the configuration", "distributed"])
def test_the_size_is_checked_wherever_the_weights_are(place, tmp_path):
    """A configuration that announces 0.9e9 weights for a file of 108 bytes had 3.8 GB allocated."""
    tiny_model().save_pretrained(tmp_path)
    options = {"variant": "fp16"} if "variant" in place else {}
    name = {
        "variant": "model.fp16.safetensors",
        "index of a variant": "part.safetensors",
        "named by the configuration": "part.safetensors",
        "distributed": "shard-00001-model-00001-of-00001.safetensors",
    }[place]
    (tmp_path / "model.safetensors").unlink()
    save_file({"model.norm.weight": torch.zeros(4)}, tmp_path / name)
    if place == "index of a variant":
        index = {"metadata": {}, "weight_map": {"model.norm.weight": name}}
        (tmp_path / "model.safetensors.index.fp16.json").write_text(json.dumps(index))
    named = {"transformers_weights": name} if place == "named by the configuration" else {}
    change_config(tmp_path, n_embd=2**13, n_layer=1, **named)
    with pytest.raises(ValueError, match=r"describes [\d,]{11,} weights, but its files have \d+ bytes"):
        ScratchGPT2ForCausalLM.from_pretrained(tmp_path, **options)


def test_a_file_named_by_the_configuration_lies_beside_it(tmp_path):
    tiny_model().save_pretrained(tmp_path / "checkpoint")
    change_config(tmp_path / "checkpoint", transformers_weights="../outside.safetensors")
    with pytest.raises(ValueError, match=r"names '\.\./outside\.safetensors' as a weight file, which is not"):
        ScratchGPT2ForCausalLM.from_pretrained(tmp_path / "checkpoint")


@pytest.mark.parametrize("name", ["pytorch_model.fp16.bin", "pytorch_model.bin.index.fp16.json"])
def test_a_pickle_is_refused_in_a_variant_too(name, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "part.bin"}}
    torch.save({"model.norm.weight": torch.zeros(24)}, tmp_path / "part.bin")
    if name.endswith(".json"):
        (tmp_path / name).write_text(json.dumps(index))
    else:
        (tmp_path / "part.bin").rename(tmp_path / name)
    with pytest.raises(ValueError, match=r"has no safetensors file, only a pickle, which could run code"):
        ScratchGPT2ForCausalLM.from_pretrained(tmp_path, variant="fp16")


# The Hub


def test_the_hub_is_asked_once(monkeypatch):
    from scratch_gpt2 import checkpoint_files

    asked = []

    class Session:
        def head(self, address, timeout):
            asked.append((address, timeout))
            if "closed" in address:
                raise ConnectionError

    monkeypatch.setattr(checkpoint_files, "get_session", Session)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "https://open.example")
    assert not hub_answers()
    assert asked == []
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    assert hub_answers() and hub_answers()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "https://closed.example")
    assert not hub_answers() and not hub_answers()
    assert asked == [("https://open.example", 5), ("https://closed.example", 5)]
