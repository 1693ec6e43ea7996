"""The configuration, fresh weights, the tie between embeddings and output layer, saving and loading."""

import json
import logging
import math

import pytest
import torch
from model_fixtures import NO_DROPOUT, TINY, TOKENS, random_ids, tiny_config, tiny_model
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config

import scratch_gpt2
from scratch_gpt2 import ScratchGPT2Config, ScratchGPT2ForCausalLM

AUTO_MAP = {
    "AutoConfig": "configuration_scratch_gpt2.ScratchGPT2Config",
    "AutoModel": "modeling_scratch_gpt2.ScratchGPT2Model",
    "AutoModelForCausalLM": "modeling_scratch_gpt2.ScratchGPT2ForCausalLM",
    "AutoModelForSequenceClassification": "heads_scratch_gpt2.ScratchGPT2ForSequenceClassification",
    "AutoModelForTokenClassification": "heads_scratch_gpt2.ScratchGPT2ForTokenClassification",
    "AutoModelForQuestionAnswering": "heads_scratch_gpt2.ScratchGPT2ForQuestionAnswering",
}
HEADS = [
    scratch_gpt2.ScratchGPT2Model,
    scratch_gpt2.ScratchGPT2ForCausalLM,
    scratch_gpt2.ScratchGPT2ForSequenceClassification,
    scratch_gpt2.ScratchGPT2ForTokenClassification,
    scratch_gpt2.ScratchGPT2ForQuestionAnswering,
    scratch_gpt2.ScratchGPT2DoubleHeadsModel,
]


@pytest.mark.parametrize(
    ("preset", "parameters"),
    [
        ("tiny", 7_259_008),
        ("gpt2", 124_439_808),
        ("gpt2-medium", 354_823_168),
        ("gpt2-large", 774_030_080),
        ("gpt2-xl", 1_557_611_200),
    ],
)
def test_presets_have_openais_sizes(preset, parameters):
    with torch.device("meta"):
        model = ScratchGPT2ForCausalLM(ScratchGPT2Config.from_preset(preset))
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert model.num_parameters() == parameters
    assert model.config.n_parameters == parameters


def test_derived_sizes():
    config = tiny_config(n_inner=40)
    assert (config.head_dim, config.inner_width, tiny_config().inner_width) == (6, 40, 96)
    assert config.matrix_parameters == 3 * (4 * 24 * 24 + 2 * 24 * 40)
    assert config.n_parameters == ScratchGPT2ForCausalLM(config).num_parameters()
    assert not {"head_dim", "inner_width", "matrix_parameters", "n_parameters"} & config.to_dict().keys()


def test_preset_with_overrides():
    config = ScratchGPT2Config.from_preset("gpt2-medium", n_layer=2, attn_pdrop=0.0)
    assert (config.n_layer, config.n_head, config.n_embd, config.attn_pdrop) == (2, 16, 1024, 0.0)


def test_unknown_preset():
    with pytest.raises(ValueError) as error:
        ScratchGPT2Config.from_preset("gpt3")
    assert str(error.value) == "Unknown preset 'gpt3': choose one of tiny, gpt2, gpt2-medium, gpt2-large, gpt2-xl."


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_embd": 10, "n_head": 3}, "n_embd (10) is not divisible by n_head (3): every head needs the same width."),
        ({"n_layer": 0}, "n_layer is 0 but must be at least 1."),
        ({"vocab_size": -5}, "vocab_size is -5 but must be at least 1."),
        ({"attn_pdrop": 1.5}, "attn_pdrop is 1.5 but a dropout probability lies between 0 and 1."),
        ({"resid_pdrop": -0.1}, "resid_pdrop is -0.1 but a dropout probability lies between 0 and 1."),
        ({"embd_pdrop": 2}, "embd_pdrop is 2 but a dropout probability lies between 0 and 1."),
        (
            {"activation_function": "gelo"},
            "Unknown activation_function 'gelo': GPT-2 uses 'gelu_new'; transformers.activations.ACT2FN lists the "
            "others.",
        ),
        (
            {"reorder_and_upcast_attn": True},
            "reorder_and_upcast_attn=True is not implemented: scratch_gpt2 supports only False (use transformers' own "
            "GPT-2 for the rest).",
        ),
        (
            {"add_cross_attention": True},
            "add_cross_attention=True is not implemented: scratch_gpt2 supports only False (use transformers' own "
            "GPT-2 for the rest).",
        ),
        (
            {"summary_type": "mean"},
            "summary_type='mean' is not implemented: scratch_gpt2 supports only 'cls_index' (use transformers' own "
            "GPT-2 for the rest).",
        ),
    ],
    ids=str,
)
def test_bad_values_are_named(options, message):
    with pytest.raises(ValueError) as error:
        ScratchGPT2Config(**options)
    assert str(error.value) == message


@pytest.mark.parametrize("name", ["summary_use_proj", "summary_activation", "summary_proj_to_labels"])
def test_other_summaries_are_refused(name):
    value = {"summary_activation": "tanh"}.get(name, False)
    with pytest.raises(ValueError, match=rf"^{name}={value!r} is not implemented: "):
        ScratchGPT2Config(**{name: value})


def test_values_of_the_wrong_type_are_named():
    with pytest.raises(Exception, match="'n_embd' expected int, got str"):
        ScratchGPT2Config(n_embd="768")


def test_a_change_after_construction_is_checked_on_saving(tmp_path):
    config = ScratchGPT2Config()
    config.n_head = 7
    with pytest.raises(Exception, match=r"n_embd \(768\) is not divisible by n_head \(7\)"):
        config.save_pretrained(tmp_path)


def test_auto_map_is_always_there(tmp_path):
    assert ScratchGPT2Config().auto_map == AUTO_MAP
    assert ScratchGPT2Config.from_preset("tiny").auto_map == AUTO_MAP
    for head in HEADS:
        head(tiny_config()).save_pretrained(tmp_path)
        expected = AUTO_MAP
        if head is scratch_gpt2.ScratchGPT2DoubleHeadsModel:  # has no Auto class of its own
            expected = AUTO_MAP | {"AutoModelForPreTraining": "heads_scratch_gpt2.ScratchGPT2DoubleHeadsModel"}
        assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == expected


def test_construction_is_silent(caplog, capfd):
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        for head in HEADS:
            head(tiny_config())
        ScratchGPT2Config()
    finally:
        logger.removeHandler(caplog.handler)
    assert [record.getMessage() for record in caplog.records] == []
    assert capfd.readouterr() == ("", "")


def test_defaults_and_names_are_gpt2s():
    """Every field of transformers' GPT2Config exists with its default, except for the pad token (the end of text)."""
    ours, theirs = ScratchGPT2Config(), GPT2Config()
    of_the_class = {"model_type", "base_model_tp_plan", "_auto_class"}
    names = GPT2Config.__dataclass_fields__.keys() - of_the_class
    assert {"n_embd", "attn_pdrop", "scale_attn_by_inverse_layer_idx", "summary_first_dropout"} <= names
    different = {name for name in names if getattr(ours, name, "missing") != getattr(theirs, name)}
    assert different == {"pad_token_id"}
    assert (ours.pad_token_id, ours.bos_token_id, ours.eos_token_id) == (50256, 50256, 50256)


def test_aliases_are_fields_under_another_name():
    config = ScratchGPT2Config(hidden_size=36, num_hidden_layers=5, num_attention_heads=6, max_position_embeddings=77)
    assert (config.n_embd, config.n_layer, config.n_head, config.n_positions) == (36, 5, 6, 77)
    config.hidden_size = 48
    assert config.n_embd == 48
    assert config.num_attention_heads == 6
    assert "hidden_size" not in config.to_dict()


def test_every_field_survives_saving(tmp_path):
    options = {
        **TINY,
        **TOKENS,
        **NO_DROPOUT,
        "n_inner": 40,
        "activation_function": "relu",
        "layer_norm_epsilon": 1e-3,
        "initializer_range": 0.05,
        "scale_attn_weights": False,
        "scale_attn_by_inverse_layer_idx": True,
        "use_cache": False,
        "tie_word_embeddings": False,
        "num_labels": 5,
        "problem_type": "regression",
    }
    assert all(getattr(ScratchGPT2Config(), name) != value for name, value in options.items())
    ScratchGPT2Config(**options).save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is ScratchGPT2Config
    assert {name: getattr(loaded, name) for name in options} == options


def test_initial_weights():
    """The table of standard deviations: 0.02, and 0.02 / sqrt(2 n_layer) where a sub-layer joins the residual sum."""
    torch.manual_seed(0)
    config = tiny_config(vocab_size=500, n_positions=200, n_embd=256, n_layer=8)
    parameters = dict(ScratchGPT2ForCausalLM(config).named_parameters())
    residual = 0.005  # 0.02 / sqrt(2 * 8)
    expected = {"model.embed_tokens.weight": 0.02, "model.embed_positions.weight": 0.02}
    for block in (f"model.layers.{index}" for index in range(8)):
        for name in ("attn.q_proj", "attn.k_proj", "attn.v_proj", "mlp.up_proj"):
            expected[f"{block}.{name}.weight"] = 0.02
        expected[f"{block}.attn.out_proj.weight"] = residual
        expected[f"{block}.mlp.down_proj.weight"] = residual
    for name, parameter in parameters.items():
        if name in expected:  # the standard deviation of n numbers is uncertain by 1/sqrt(2n): four times that
            assert parameter.std().item() == pytest.approx(expected[name], rel=4 / math.sqrt(2 * parameter.numel()))
            assert abs(parameter.mean().item()) < 4 * expected[name] / math.sqrt(parameter.numel())
        elif name.endswith("norm.weight"):
            assert parameter.eq(1).all(), name
        else:
            assert name.endswith(".bias")
            assert not parameter.any(), name
    assert expected.keys() < parameters.keys()


@pytest.mark.parametrize("head", HEADS, ids=lambda head: head.__name__)
def test_initial_weights_of_heads(head):
    torch.manual_seed(0)
    model = head(tiny_config(n_embd=128, num_labels=32, initializer_range=0.1))
    heads = {"lm_head", "score", "classifier", "qa_outputs", "multiple_choice_head"}
    for name, module in model.named_children():
        if name in heads:
            deviation = module.weight.std().item()
            assert deviation == pytest.approx(0.1, rel=4 / math.sqrt(2 * module.weight.numel()))
            assert module.bias is None or not module.bias.any()


def is_tied(model):
    return model.lm_head.weight is model.get_input_embeddings().weight


def test_the_tie_survives(tmp_path):
    assert is_tied(ScratchGPT2ForCausalLM(tiny_config()))
    model = tiny_model()
    model.save_pretrained(tmp_path)
    assert is_tied(AutoModelForCausalLM.from_pretrained(tmp_path))
    assert is_tied(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16))
    assert is_tied(AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu"))
    assert is_tied(model.bfloat16())
    model.resize_token_embeddings(70, mean_resizing=False)
    assert is_tied(model)
    assert model.lm_head.weight.shape == (70, 24)
    assert model.config.vocab_size == 70
    assert model(torch.tensor([[69]])).logits.shape == (1, 1, 70)
    with torch.device("meta"):
        assert is_tied(ScratchGPT2ForCausalLM(tiny_config()))


def stored_keys(folder):
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return set(file.keys())


def test_the_file_holds_one_copy_of_a_tied_weight(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    assert stored_keys(tmp_path) == {name for name, _ in model.named_parameters()}
    assert "lm_head.weight" not in stored_keys(tmp_path)
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


def test_untied_weights_round_trip(tmp_path):
    model = tiny_model(tie_word_embeddings=False)
    assert not is_tied(model)
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    model.save_pretrained(tmp_path)
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= stored_keys(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not is_tied(loaded)
    ids = random_ids(2, 9)
    assert torch.equal(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize("head", HEADS, ids=lambda head: head.__name__)
def test_what_is_loaded_is_what_was_saved(head, tmp_path):
    """Every parameter its own constant, so that none can be fresh, swapped or forgotten."""
    model = head(tiny_config(num_labels=3))
    for number, parameter in enumerate(model.parameters()):
        torch.nn.init.constant_(parameter, 1 + number)
    model.save_pretrained(tmp_path)
    loaded, report = head.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert [name for name, _ in loaded.named_parameters()] == [name for name, _ in model.named_parameters()]
    for number, (name, parameter) in enumerate(loaded.named_parameters()):
        assert parameter.eq(1 + number).all(), name


@pytest.mark.parametrize("head", HEADS[2:5], ids=lambda head: head.__name__)
def test_a_language_model_becomes_any_head(head, tmp_path):
    """The network is loaded, the head alone is fresh and reported."""
    source = tiny_model()
    source.save_pretrained(tmp_path)
    loaded, report = head.from_pretrained(tmp_path, num_labels=3, output_loading_info=True)
    assert all(name.split(".")[0] in {"score", "classifier", "qa_outputs"} for name in report["missing_keys"])
    assert report["missing_keys"]
    for name, parameter in source.model.named_parameters():
        assert torch.equal(loaded.model.get_parameter(name), parameter), name


def test_bfloat16_checkpoint(tmp_path):
    model = tiny_model().bfloat16()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    masters = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert {parameter.dtype for parameter in masters.parameters()} == {torch.float32}


@pytest.mark.parametrize("auto_class", [ScratchGPT2ForCausalLM, AutoModelForCausalLM])
def test_damaged_checkpoint(auto_class, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(
        ValueError, match=rf"^The checkpoint {tmp_path} is damaged \(.*\); copy or download it again\.$"
    ):
        auto_class.from_pretrained(tmp_path)


def test_multiple_choice_honours_the_trainers_count_of_labels():
    model = scratch_gpt2.ScratchGPT2DoubleHeadsModel(tiny_config(**NO_DROPOUT)).eval()
    ids = random_ids(2, 3 * 9).view(2, 3, 9)
    mean = model(ids, labels=ids).loss  # over 2 * 3 * 8 predictions
    assert model(ids, labels=ids, num_items_in_batch=96).loss.item() == pytest.approx(mean.item() / 2, rel=1e-6)
