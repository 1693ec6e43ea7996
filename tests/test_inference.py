"""A model optimized for inference: the same logits and text, whatever is changed afterwards, and back again."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.utils.prune
from model_fixtures import fill, random_ids, relative_error, tiny_config, tiny_model, twins
from test_cpu_kernels import ONE_ROW, SEVERAL_ROWS, choose_always
from transformers import AutoModelForCausalLM, pipeline

from scratch_gpt2 import (
    ScratchGPT2ForCausalLM,
    ScratchGPT2ForSequenceClassification,
    cpu_inference,
    export_gpt2,
    hardware,
)
from scratch_gpt2.cpu_inference import lay_out

OPTIONS = [None, "int8", "int4"]


def linears(model):
    return [module for module in model.modules() if isinstance(module, torch.nn.Linear)]


@pytest.mark.parametrize("rows, length", [(1, 1), (1, 7), (4, 1), (4, 7)])
@torch.no_grad()
def test_float32_logits_match_transformers(rows, length):
    reference, model = twins(attention="sdpa")
    ids = random_ids(rows, length)
    assert model.optimize_for_inference() is model
    assert all(block.packed.complete for block in model.model.layers)
    assert relative_error(model(ids).logits, reference(ids).logits) < 5e-6
    assert relative_error(model(ids, logits_to_keep=1).logits, reference(ids).logits[:, -1:]) < 5e-6


@pytest.mark.parametrize("by_columns, strides", [(True, (1, 3)), (False, (2, 1))])
def test_weights_are_joined_and_stored(by_columns, strides):
    first, second = torch.nn.Linear(2, 2, bias=False), torch.nn.Linear(2, 1, bias=False)
    first.weight.data = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    second.weight.data = torch.tensor([[5.0, 6.0]])
    joined = lay_out([first, second], by_columns=by_columns)
    assert joined.tolist() == [[1, 2], [3, 4], [5, 6]]
    assert joined.stride() == strides
    assert first.weight.tolist() == [[1, 2], [3, 4]] and second.weight.tolist() == [[5, 6]]
    assert second.weight.untyped_storage().data_ptr() == joined.untyped_storage().data_ptr()
    assert lay_out([second], by_columns=False).stride() == (2, 1)


@pytest.mark.parametrize("one", ONE_ROW)
@pytest.mark.parametrize("few", SEVERAL_ROWS)
@torch.no_grad()
def test_every_kernel_gives_the_logits_of_transformers(monkeypatch, one, few):
    choose_always(monkeypatch, one, few)
    reference, model = twins(attention="sdpa")
    model.optimize_for_inference()
    for ids in (random_ids(1, 1), random_ids(1, 7), random_ids(3, 4)):
        assert relative_error(model(ids).logits, reference(ids).logits) < 5e-6


def test_report_names_a_kernel_for_each_shape(monkeypatch):
    choose_always(monkeypatch, "by columns", "oneDNN")
    model = tiny_model()
    with pytest.raises(ValueError, match=r"^The model is not optimized for inference: call .* first\.$"):
        model.inference_report()
    lines = model.optimize_for_inference().inference_report().splitlines()
    assert lines[0] == "(72, 24): by columns at 20.0 GB/s; several rows: oneDNN at 10.0 GB/s"
    assert [line.split(":")[0] for line in lines] == ["(72, 24)", "(24, 24)", "(96, 24)", "(24, 96)", "(61, 24)"]
    model.restore_from_inference().optimize_for_inference("int8")
    assert "(61, 24): FBGEMM int8, inputs in " in model.inference_report()
    report = model.restore_from_inference().optimize_for_inference("int4").inference_report()
    assert "(72, 24): int4, inputs in bfloat16" in report and "(61, 24): FBGEMM int8" in report


@pytest.mark.parametrize("weights, most", [("int8", 0.05), ("int4", 0.4)])
@torch.no_grad()
def test_quantized_logits_are_close(weights, most):
    reference, model = twins(attention="sdpa")
    ids = random_ids(4, 20)
    error = relative_error(model.optimize_for_inference(weights)(ids).logits, reference(ids).logits)
    assert 1e-4 < error < most


def test_an_operator_that_torch_lacks_is_refused(monkeypatch):
    monkeypatch.setattr(cpu_inference, "missing_operator", lambda weights: f"aten.{weights}")
    with pytest.raises(ValueError, match=r"^torch \S+ has no operator aten.int4; install another .*\.$"):
        tiny_model().optimize_for_inference("int4")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_padded_rows_continued_from_a_cache_match_transformers(attention):
    reference, model = twins(attention="sdpa")
    model.set_attn_implementation(attention)
    model.optimize_for_inference()
    ids, mask = random_ids(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 0
    expected = reference(ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)).logits
    begin = model(ids[:, :5], attention_mask=mask[:, :5], use_cache=True)
    rest = model(ids[:, 5:], attention_mask=mask, past_key_values=begin.past_key_values)
    assert relative_error(rest.logits, expected[:, 5:]) < 5e-6


@torch.no_grad()
def test_one_row_step_by_step_matches_transformers():
    reference, model = twins(attention="sdpa")
    ids, cache = random_ids(1, 6), None
    model.optimize_for_inference()
    for position, expected in enumerate(reference(ids).logits[0]):
        outputs = model(ids[:, position : position + 1], past_key_values=cache, use_cache=True)
        cache = outputs.past_key_values
        assert relative_error(outputs.logits[0, 0], expected) < 5e-6


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_hidden_states_and_attentions_are_returned_as_before(attention):
    model, ids = tiny_model(), random_ids(2, 5)
    model.set_attn_implementation(attention)
    ask = {"output_hidden_states": True, "output_attentions": attention == "eager"}
    before, after = model(ids, **ask), model.optimize_for_inference()(ids, **ask)
    assert len(before.hidden_states) == len(after.hidden_states)
    for expected, state in zip(before.hidden_states, after.hidden_states, strict=True):
        assert relative_error(state, expected) < 5e-6
    if attention == "eager":
        for expected, weights in zip(before.attentions, after.attentions, strict=True):
            assert relative_error(weights, expected) < 5e-6


@pytest.mark.parametrize("weights", OPTIONS)
@torch.no_grad()
def test_a_copy_is_optimized_too_and_independent(weights):
    model, ids = tiny_model(), random_ids(2, 5)
    numbers = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    twin = copy.deepcopy(model.optimize_for_inference(weights))
    expected = model(ids).logits
    assert torch.equal(twin(ids).logits, expected)
    with pytest.raises(ValueError, match=r"^Call model\.restore_from_inference\(\) first"):
        twin.load_state_dict(numbers)
    twin.restore_from_inference().load_state_dict({name: torch.zeros_like(tensor) for name, tensor in numbers.items()})
    assert all(parameter.requires_grad for parameter in twin.parameters())
    assert torch.equal(model(ids).logits, expected)
    assert all(torch.equal(tensor, numbers[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("strategy", [{}, {"num_beams": 3}, {"use_cache": False}])
def test_generates_the_same_tokens(strategy):
    model, ids = tiny_model(), random_ids(3, 6)
    options = {"max_new_tokens": 15, "min_new_tokens": 15, "do_sample": False, **strategy}
    expected = model.generate(ids, **options)
    assert torch.equal(model.optimize_for_inference().generate(ids, **options), expected)
    assert torch.equal(model.restore_from_inference().generate(ids, **options), expected)


def test_pipeline_writes_the_same_text(tiny_tokenizer):
    model = tiny_model(vocab_size=len(tiny_tokenizer))
    options = {"max_new_tokens": 10, "do_sample": False}
    tokenizer = copy.deepcopy(tiny_tokenizer)  # the pipeline makes it pad on the left
    expected = pipeline("text-generation", model, tokenizer=tokenizer, device="cpu")("The cat", **options)
    optimized = pipeline("text-generation", model.optimize_for_inference(), tokenizer=tokenizer, device="cpu")
    assert optimized("The cat", **options) == expected


@pytest.mark.parametrize("weights", OPTIONS)
def test_restoring_gives_back_the_same_parameters(weights):
    model = tiny_model()
    model.model.embed_positions.weight.requires_grad_(False)
    parameters = dict(model.named_parameters())
    numbers = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    model.optimize_for_inference(weights)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.restore_from_inference() is model
    assert all(type(linear) is torch.nn.Linear for linear in linears(model))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    for name, parameter in model.named_parameters():
        assert parameter is parameters[name]
        assert torch.equal(parameter, numbers[name])
        assert parameter.requires_grad == (name != "model.embed_positions.weight")
    model.train()(random_ids(1, 5), labels=random_ids(1, 5)).loss.backward()
    assert model.model.layers[0].attn.q_proj.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("weights", OPTIONS)
def test_saves_the_weights_of_the_model(weights, tmp_path):
    model = tiny_model()
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path / "before")
    model.optimize_for_inference(weights).save_pretrained(tmp_path / "after")
    files = [tmp_path / part / "model.safetensors" for part in ("before", "after")]
    assert files[0].read_bytes() == files[1].read_bytes()
    export_gpt2(model, tmp_path / "gpt2")
    for folder in ("after", "gpt2"):
        loaded = ScratchGPT2ForCausalLM.from_pretrained(tmp_path / folder).state_dict()
        assert loaded.keys() == expected.keys()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())


@torch.no_grad()
def test_other_heads():
    model = fill(ScratchGPT2ForSequenceClassification(tiny_config(num_labels=3))).eval()
    ids, mask = random_ids(2, 8), torch.ones(2, 8, dtype=torch.long)
    expected = model(ids, attention_mask=mask).logits
    assert relative_error(model.optimize_for_inference()(ids, attention_mask=mask).logits, expected) < 1e-5


def test_bfloat16_where_the_cpu_computes_it(monkeypatch):
    model, ids = tiny_model().to(torch.bfloat16), random_ids(2, 5)
    monkeypatch.setattr(cpu_inference, "cpu_computes_bfloat16", lambda: False)
    with pytest.raises(ValueError, match=r"^This CPU does not compute bfloat16: load .* dtype=torch.float32\.$"):
        model.optimize_for_inference()
    monkeypatch.undo()
    if not hardware.cpu_computes_bfloat16():
        pytest.skip("this CPU does not compute bfloat16")
    with torch.no_grad():
        expected = model(ids).logits
        assert relative_error(model.optimize_for_inference()(ids).logits, expected) < 0.02


@torch.no_grad()
def test_bfloat16_weights_of_a_float32_model(monkeypatch):
    model, ids = tiny_model(), random_ids(2, 5)
    monkeypatch.setattr(cpu_inference, "cpu_computes_bfloat16", lambda: False)
    with pytest.raises(ValueError, match="This CPU does not compute bfloat16"):
        model.optimize_for_inference("bf16")
    monkeypatch.undo()
    if not hardware.cpu_computes_bfloat16():
        pytest.skip("this CPU does not compute bfloat16")
    expected = model(ids).logits
    logits = model.optimize_for_inference("bf16")(ids).logits
    assert logits.dtype == torch.float32 and 1e-4 < relative_error(logits, expected) < 0.02


def with_adapter():
    from peft import LoraConfig, get_peft_model

    return get_peft_model(tiny_model(), LoraConfig(target_modules="all-linear")).eval()


@pytest.mark.parametrize(
    "make, weights, message",
    [
        (lambda: tiny_model().train(), None, "Call model.eval() first"),
        (lambda: tiny_model().optimize_for_inference(), None, "is optimized for inference already"),
        (tiny_model, "int3", "weights='int3' is unknown: leave it out or give 'bf16', 'int8' or 'int4'."),
        (lambda: tiny_model().bfloat16(), "int4", "The weights are torch.bfloat16: load"),
        (with_adapter, None, "Merge the adapter first (merge_and_unload)"),
        (lambda: tiny_model().half(), None, "The weights are torch.float16: load the model with dtype=torch.float32."),
        (lambda: tiny_model().bfloat16(), "int8", "The weights are torch.bfloat16: load"),
        (lambda: tiny_model().to("meta"), None, "The model is on meta"),
    ],
)
def test_refuses_in_one_sentence(make, weights, message):
    model = make()
    with pytest.raises(ValueError) as caught:
        model.optimize_for_inference(weights)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_merged_adapters_are_optimized():
    model = with_adapter().merge_and_unload()
    ids = random_ids(1, 5)
    with torch.no_grad():
        expected = model(ids).logits
        assert relative_error(model.optimize_for_inference()(ids).logits, expected) < 1e-5


@pytest.mark.parametrize("seconds, faster", [([2.0, 1.0], True), ([1.0, 1.0], False)])
@torch.no_grad()
def test_optimizes_where_a_token_takes_less_time(monkeypatch, seconds, faster):
    choose_always(monkeypatch, "by columns", "plain")
    measured = iter(seconds)
    monkeypatch.setattr(cpu_inference, "seconds_per_token", lambda model: next(measured))
    model, ids = tiny_model(), random_ids(2, 5)
    expected = model(ids).logits
    line = cpu_inference.optimize_if_faster(model)
    assert relative_error(model(ids).logits, expected) < 5e-6
    assert hasattr(model.lm_head, "packed") == faster
    if faster:
        assert line.startswith("Kernels: (72, 24) by columns at 20.0 GB/s, (24, 24) by columns") and "\n" not in line
    else:
        assert line == "Kernels: torch's (ScratchGPT2ForCausalLM, torch.float32, cpu), the fastest for this model"


@pytest.mark.parametrize(
    "make", [with_adapter, lambda: tiny_model().bfloat16(), lambda: tiny_model().to("meta"), lambda: twins()[0]]
)
def test_leaves_other_models_as_they_are(make):
    model = make()
    line = cpu_inference.optimize_if_faster(model)
    assert line == f"Kernels: torch's ({type(model).__name__}, {model.dtype}, {model.device})"
    assert all("packed" not in vars(module) for module in model.modules())


def test_times_a_token_that_continues_a_text():
    assert 0 < cpu_inference.seconds_per_token(tiny_model()) < 10


@pytest.mark.parametrize("weights", OPTIONS)
def test_an_optimized_model_does_not_learn_or_change(weights):
    model, ids = tiny_model().optimize_for_inference(weights), random_ids(1, 5)
    embeds = torch.zeros(1, 5, 24, requires_grad=True)
    state_dict = {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}
    expected = model(ids).logits
    for misuse in (
        lambda: model.train()(ids),
        lambda: model.eval()(inputs_embeds=embeds),
        lambda: model.load_state_dict(state_dict),
        lambda: model.double()(ids),
    ):
        with pytest.raises(ValueError, match=r"^Call model\.restore_from_inference\(\) first: .*\.$"):
            misuse()
        model.eval().float()
        assert torch.equal(model(ids).logits, expected)
    with pytest.raises(ValueError, match="not optimized for inference; there is nothing to restore"):
        model.restore_from_inference().restore_from_inference()
    model.load_state_dict(state_dict)
    assert model(ids).logits.abs().max() == 0


def block(model):
    return model.model.layers[1]


def scale_queries(model):
    block(model).attn.q_proj.weight.mul_(2)


def scale_keys_through_data(model):
    block(model).attn.k_proj.weight.data.mul_(2)


def change_one_row_through_data(model):
    model.lm_head.weight.data[5] = 0


def change_one_column_through_data(model):
    block(model).mlp.up_proj.weight.data[:, 3] = 0


def shift_values(model):
    block(model).attn.v_proj.bias.add_(1)


def assign_data(model):
    block(model).mlp.down_proj.weight.data = torch.linspace(-1, 1, 24 * 96).view(24, 96)


def assign_parameter(model):
    block(model).mlp.down_proj.weight = torch.nn.Parameter(torch.linspace(-1, 1, 24 * 96).view(24, 96))


def round_to_half(model):
    model.half().float()


def load_into_the_trunk(model):
    model.model.load_state_dict({name: 0.5 * tensor for name, tensor in model.model.state_dict().items()})


def resize(model):
    model.resize_token_embeddings(70, mean_resizing=False)
    model.get_input_embeddings().weight.data[61:] = 0.5
    model.lm_head.weight.data[61:] = 0.5


def replace_head(model):
    model.set_output_embeddings(torch.nn.Linear(24, 61, bias=False))
    model.lm_head.weight.copy_(torch.linspace(-1, 1, 24 * 61).view(61, 24))


def prune_values(model):
    mask = torch.ones(24, 24)
    mask[::2] = 0
    torch.nn.utils.prune.custom_from_mask(block(model).attn.v_proj, "weight", mask)


def prune_head_for_good(model):
    mask = torch.ones(61, 24)
    mask[::2] = 0
    torch.nn.utils.prune.custom_from_mask(model.lm_head, "weight", mask)
    torch.nn.utils.prune.remove(model.lm_head, "weight")


def hook_values(model):
    block(model).attn.v_proj.register_forward_hook(lambda module, inputs, output: 2 * output)


def hook_head(model):
    model.lm_head.register_forward_pre_hook(lambda module, inputs: (2 * inputs[0],))


def replace_forward(model):
    forward = block(model).mlp.forward
    block(model).mlp.forward = lambda hidden_states: 2 * forward(hidden_states)


def lora_config():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    return peft.LoraConfig(target_modules=["q_proj", "up_proj", "lm_head"], init_lora_weights=False)


def add_adapter(model):
    model.add_adapter(lora_config())
    model.eval()


def wrap_in_peft(model):
    from peft import get_peft_model

    return get_peft_model(model, lora_config()).eval()


def merge_into_weights(model):
    return wrap_in_peft(model).merge_and_unload()


CHANGES = [
    *(scale_queries, scale_keys_through_data, change_one_row_through_data, change_one_column_through_data),
    *(shift_values, assign_data, assign_parameter, round_to_half, load_into_the_trunk, resize, replace_head),
    *(prune_values, prune_head_for_good, hook_values, hook_head, replace_forward),
    *(add_adapter, wrap_in_peft, merge_into_weights),
]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_a_change_counts_as_in_the_plain_model(change, tied):
    """The reference is a plain model with the same change: to weights or modules, by an adapter or by a hook."""
    plain, ids = tiny_model(tie_word_embeddings=tied), random_ids(2, 6)
    optimized = copy.deepcopy(plain).optimize_for_inference()
    before = optimized(ids).logits
    plain, optimized = change(plain) or plain, change(optimized) or optimized
    expected, logits = plain(ids).logits, optimized(ids).logits
    assert relative_error(logits, expected) < 5e-6
    if change is not resize:
        assert relative_error(expected, before) > 1e-4


@pytest.mark.parametrize("weights", ["int8", "int4"])
@torch.no_grad()
def test_quantized_weights_are_packed_again(weights):
    plain, ids = tiny_model(), random_ids(2, 6)
    model = copy.deepcopy(plain).optimize_for_inference(weights)
    before = model(ids).logits
    for one in (plain, model):
        scale_keys_through_data(one)
        assign_data(one)
    fresh = plain.optimize_for_inference(weights)
    assert torch.equal(model(ids).logits, fresh(ids).logits)
    assert relative_error(model(ids).logits, before) > 0.1


@torch.no_grad()
def test_a_change_of_packed_weights_counts_from_the_next_text_on(monkeypatch):
    choose_always(monkeypatch, "oneDNN", "oneDNN")
    model, ids = tiny_model().optimize_for_inference(), random_ids(1, 6)
    begun = model(ids[:, :5], use_cache=True).past_key_values
    expected = model(ids[:, 5:], past_key_values=copy.deepcopy(begun)).logits
    scale_keys_through_data(model)
    assert torch.equal(model(ids[:, 5:], past_key_values=begun).logits, expected)
    assert relative_error(model(ids).logits[:, -1:], expected) > 1e-4


def test_an_adapter_learns_after_restoring_and_the_base_does_not():
    pytest.importorskip("peft")
    model, ids = tiny_model().optimize_for_inference(), random_ids(1, 5)
    adapted = wrap_in_peft(model)
    model.restore_from_inference()
    adapted.train()(ids, labels=ids).loss.backward()
    learned = {name for name, parameter in adapted.named_parameters() if parameter.grad is not None}
    assert learned and all("lora_" in name for name in learned)


def test_gradients_of_packed_weights_are_refused():
    model, ids = tiny_model().optimize_for_inference(), random_ids(1, 5)
    block(model).mlp.up_proj.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"^Call model\.restore_from_inference\(\) first: .* has no gradients\.$"):
        model(ids)
    with torch.no_grad():
        assert model(ids).logits.isfinite().all()


@torch.no_grad()
def test_autocast_computes_as_in_the_plain_model():
    plain, ids = tiny_model(), random_ids(2, 6)
    model = copy.deepcopy(plain).optimize_for_inference()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(ids).logits, plain(ids).logits)


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def saved_and_loaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copy_model", [copy.deepcopy, pickled, saved_and_loaded])
@pytest.mark.parametrize("weights", OPTIONS)
@torch.no_grad()
def test_an_optimized_model_can_be_copied_pickled_and_saved(weights, copy_model):
    model, ids = tiny_model(), random_ids(2, 5)
    model.optimize_for_inference(weights)
    expected = model(ids).logits
    twin = copy_model(model)
    assert torch.equal(twin(ids).logits, expected)
    assert all(layer.packed.complete for layer in twin.model.layers) and twin.lm_head.packed.complete
    scale_queries(twin)
    assert relative_error(twin(ids).logits, expected) > 1e-4
    assert torch.equal(model(ids).logits, expected)
    twin.restore_from_inference()
    assert all("packed" not in vars(module) for module in twin.modules())
    with pytest.raises(ValueError, match="optimized for inference already"):
        model.optimize_for_inference()


def test_what_is_saved_is_loaded_by_the_auto_class_and_optimized(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path).optimize_for_inference()
    assert model.lm_head.packed.complete
