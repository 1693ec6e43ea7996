"""The loss without logits against the library's own loss on the logits: value and gradients."""

import pytest
import torch
import torch.nn.functional as F
from model_fixtures import random_ids, relative_error, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.loss.loss_utils import ForCausalLMLoss

from scratch_gpt2 import linear_cross_entropy as module
from scratch_gpt2.linear_cross_entropy import linear_cross_entropy

B, T, C, V = 3, 7, 24, 61
TOLERANCE = 2e-6
# bfloat16 has 8 bits. From the gradients in float32, part of the largest; the library's own come to lie as far away
# (measured over 8 seeds: at most 0.0071, and ours 0.0071), elsewhere as they are rounded at other places.
BFLOAT16_TOLERANCE = 2**-7


def hidden_and_weight(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    hidden_states = torch.randn(B, T, C, generator=generator).to(dtype).requires_grad_()
    weight = (torch.randn(V, C, generator=generator) * 0.3).to(dtype).requires_grad_()
    return hidden_states, weight


def some_labels(ignore_index=-100):
    """The first row has a gap, the second none, the last nothing at all."""
    labels = random_ids(B, T)
    labels[0, 2:5] = ignore_index
    labels[2] = ignore_index
    return labels


def library_loss(hidden_states, weight, labels, **kwargs):
    return ForCausalLMLoss(F.linear(hidden_states, weight), labels, vocab_size=V, **kwargs)


def assert_equal_to_library(hidden_states, weight, labels, tolerance=TOLERANCE, **kwargs):
    inputs = [tensor for tensor in (hidden_states, weight) if tensor.requires_grad]
    loss = linear_cross_entropy(hidden_states, weight, labels, **kwargs)
    expected = library_loss(hidden_states, weight, labels, **kwargs)
    assert loss.dtype == expected.dtype == torch.float32
    assert loss.shape == ()
    assert relative_error(loss, expected) <= tolerance
    gradients, expected_gradients = torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, inputs)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        assert gradient.dtype == expected_gradient.dtype
        assert relative_error(gradient, expected_gradient) <= tolerance


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"num_items_in_batch": 5},
        {"num_items_in_batch": torch.tensor(5)},
        {"ignore_index": 4},
        {"unknown": "ignored, as in the library"},
    ],
    ids=str,
)
@pytest.mark.parametrize("rows_per_chunk", [1, 4, 10**6])
def test_value_and_gradients(kwargs, rows_per_chunk, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", rows_per_chunk * V)
    if "unknown" in kwargs:  # the library passes it on to a function that ignores it
        kwargs = {"unknown": None}
    labels = some_labels(kwargs.get("ignore_index", -100))
    assert_equal_to_library(*hidden_and_weight(), labels, **kwargs)


def test_one_number_by_hand():
    """Two tokens with scores 0 and ln 3: the second has probability 3/4, the first 1/4."""
    hidden_states = torch.tensor([[[1.0], [1.0], [5.0]]])
    weight = torch.tensor([[0.0], [3.0]]).log1p().mul(torch.tensor(3.0).log() / torch.tensor(4.0).log())
    loss = linear_cross_entropy(hidden_states, weight, torch.tensor([[0, 1, 0]]))
    assert loss.item() == pytest.approx((0.2876820724 + 1.3862943611) / 2, rel=1e-6)  # -ln(3/4), -ln(1/4)


def test_shifted_labels_replace_labels():
    labels = some_labels()
    shifted = F.pad(labels[:, 1:], (0, 1), value=-100)
    assert_equal_to_library(*hidden_and_weight(), None, shift_labels=shifted)
    unlike = random_ids(B, T, seed=1)
    assert_equal_to_library(*hidden_and_weight(), unlike, shift_labels=shifted)
    hidden_states, weight = hidden_and_weight()
    expected = linear_cross_entropy(hidden_states, weight, labels)
    assert linear_cross_entropy(hidden_states, weight, shift_labels=shifted).item() == expected.item()


@pytest.mark.parametrize(
    "options", [{"skip_logits": True}, {"skip_logits": False}, {"num_items_in_batch": 8}], ids=str
)
def test_fewer_labels_than_tokens_are_refused_as_in_the_library(options):
    ids = random_ids(2, 7)
    with pytest.raises(ValueError, match=r"Expected input batch_size \(14\) to match target batch_size \(10\)\."):
        tiny_model().train()(ids, labels=ids[:, :5], **options)


@pytest.mark.parametrize("num_items_in_batch", [None, 5, torch.tensor(5)])
def test_nothing_to_learn_is_zero_with_a_valid_graph(num_items_in_batch):
    hidden_states, weight = hidden_and_weight()
    labels = torch.full((B, T), -100)
    labels[:, 0] = 7  # never a target: nothing comes before it
    loss = linear_cross_entropy(hidden_states, weight, labels, num_items_in_batch)
    assert loss.item() == 0
    loss.backward()
    for tensor in (hidden_states, weight):
        assert tensor.grad.shape == tensor.shape
        assert tensor.grad.abs().max() == 0


@pytest.mark.parametrize("skip_logits", [True, False])
@pytest.mark.parametrize("items", [{}, {"num_items_in_batch": torch.tensor(0)}], ids=["mean", "sum"])
def test_a_batch_with_nothing_to_learn_leaves_the_model_alone(items, skip_logits):
    model = tiny_model().train()
    loss = model(random_ids(B, T), labels=torch.full((B, T), -100), skip_logits=skip_logits, **items).loss
    loss.backward()
    assert loss.item() == 0
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in model.parameters())


@pytest.mark.parametrize("frozen", ["hidden_states", "weight"])
def test_frozen_parts_cost_and_get_nothing(frozen):
    hidden_states, weight = hidden_and_weight()
    {"hidden_states": hidden_states, "weight": weight}[frozen].requires_grad_(False)
    assert_equal_to_library(hidden_states, weight, some_labels())
    linear_cross_entropy(hidden_states, weight, some_labels()).backward()
    assert {"hidden_states": hidden_states, "weight": weight}[frozen].grad is None


def test_everything_frozen_and_no_grad():
    hidden_states, weight = hidden_and_weight()
    expected = library_loss(hidden_states, weight, some_labels()).item()
    with torch.no_grad():
        loss = linear_cross_entropy(hidden_states, weight, some_labels())
    assert not loss.requires_grad
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    loss = linear_cross_entropy(hidden_states.detach(), weight.detach(), some_labels())
    assert not loss.requires_grad
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def model_gradients(model, skip_logits, **inputs):
    model.zero_grad()
    outputs = model(**inputs, skip_logits=skip_logits)
    assert (outputs.logits is None) == skip_logits
    outputs.loss.backward()
    return outputs.loss, {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_in_the_model_skipping_logits_changes_no_gradient(tied, training):
    model = tiny_model(tie_word_embeddings=tied).train(training)
    inputs = {"input_ids": random_ids(B, T), "labels": some_labels(), "num_items_in_batch": 5}
    loss, gradients = model_gradients(model, True, **inputs)
    expected, expected_gradients = model_gradients(model, False, **inputs)
    assert relative_error(loss, expected) <= TOLERANCE
    assert ("lm_head.weight" in gradients) != tied
    for name, gradient in gradients.items():
        if not name.endswith("k_proj.bias"):  # zero but for rounding
            assert relative_error(gradient, expected_gradients[name]) <= 5 * TOLERANCE, name


def test_tied_gradient_is_the_sum_of_both_uses():
    inputs = {"input_ids": random_ids(B, T), "labels": some_labels()}
    tied, untied = tiny_model().train(), tiny_model(tie_word_embeddings=False).train()
    untied.load_state_dict(tied.state_dict())
    _, gradients = model_gradients(tied, True, **inputs)
    _, parts = model_gradients(untied, True, **inputs)
    both = parts["model.embed_tokens.weight"] + parts["lm_head.weight"]
    assert relative_error(gradients["model.embed_tokens.weight"], both) <= TOLERANCE
    assert relative_error(gradients["model.embed_tokens.weight"], parts["lm_head.weight"]) > 0.01


def test_frozen_tied_embeddings_in_the_model():
    model = tiny_model().train()
    model.get_input_embeddings().requires_grad_(False)
    inputs = {"input_ids": random_ids(B, T), "labels": some_labels()}
    _, gradients = model_gradients(model, True, **inputs)
    assert gradients["model.embed_tokens.weight"] is None
    assert gradients["model.layers.0.attn.q_proj.weight"].abs().max() > 0


def test_logits_are_skipped_as_trainer_calls_and_on_request():
    """Trainer passes `num_items_in_batch` and reads the loss alone; any other caller finds the logits."""
    model = tiny_model()
    inputs = {"input_ids": random_ids(B, T), "labels": some_labels()}
    embedded = {"inputs_embeds": model.get_input_embeddings()(inputs["input_ids"]), "labels": inputs["labels"]}
    for training in (False, True):
        model.train(training)
        assert model(**inputs).logits.shape == (B, T, V)
        assert model(inputs["input_ids"], num_items_in_batch=5).logits.shape == (B, T, V)
        assert model(**embedded, num_items_in_batch=5).logits.shape == (B, T, V)
        assert (model(**inputs, num_items_in_batch=5).logits is None) == training
        assert model(**inputs, num_items_in_batch=5, skip_logits=False).logits.shape == (B, T, V)
        assert model(**inputs, skip_logits=True).logits is None
        loss, logits = model(**inputs)[:2]
        assert (loss.shape, logits.shape) == ((), (B, T, V))


@pytest.mark.parametrize("mode", ["autocast", "weights"])
@pytest.mark.parametrize("rows_per_chunk", [4, 10**6])
def test_bfloat16(mode, rows_per_chunk, monkeypatch):
    """The product in bfloat16 and everything after it in float32, like the library: so is the loss. The gradients, as
    near to float32's as the library's own."""
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", rows_per_chunk * V)
    inputs = hidden_and_weight(torch.bfloat16 if mode == "weights" else torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mode == "autocast"):
        losses = [compute(*inputs, some_labels()) for compute in (linear_cross_entropy, library_loss)]
    assert relative_error(*losses) <= TOLERANCE
    assert losses[0].dtype == torch.float32
    exact_inputs = [tensor.detach().float().requires_grad_() for tensor in inputs]
    exact = torch.autograd.grad(library_loss(*exact_inputs, some_labels()), exact_inputs)
    for loss in losses:
        for gradient, tensor, expected in zip(torch.autograd.grad(loss, inputs), inputs, exact, strict=True):
            assert gradient.dtype == tensor.dtype
            assert relative_error(gradient.float(), expected) <= BFLOAT16_TOLERANCE


def test_float64_weights_are_computed_to_float32_like_in_the_library():
    assert_equal_to_library(*hidden_and_weight(torch.float64), some_labels(), tolerance=1e-6)


def test_gradients_by_finite_differences():
    """An independent check, in float64 weights: the loss itself is a float32, hence the large step."""
    hidden_states, weight = hidden_and_weight(torch.float64)
    labels = some_labels()
    gradient = torch.autograd.grad(linear_cross_entropy(hidden_states, weight, labels), weight)[0]
    direction = torch.randn(V, C, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    step = 1e-2
    with torch.no_grad():
        ahead = linear_cross_entropy(hidden_states, weight + step * direction, labels)
        behind = linear_cross_entropy(hidden_states, weight - step * direction, labels)
    slope = (ahead - behind).item() / (2 * step)
    assert slope == pytest.approx((gradient * direction).sum().item(), rel=1e-3)


def test_gradient_is_scaled_by_what_follows():
    hidden_states, weight = hidden_and_weight()
    plain = torch.autograd.grad(linear_cross_entropy(hidden_states, weight, some_labels()), (hidden_states, weight))
    scaled = torch.autograd.grad(
        3 * linear_cross_entropy(hidden_states, weight, some_labels()), (hidden_states, weight)
    )
    for gradient, threefold in zip(plain, scaled, strict=True):
        assert relative_error(threefold, 3 * gradient) <= TOLERANCE


def test_gradients_accumulate_over_calls():
    """Two halves of a batch, divided by the same number of items, are the whole batch."""
    hidden_states, weight = hidden_and_weight()
    labels = random_ids(B, T)
    whole = torch.autograd.grad(linear_cross_entropy(hidden_states, weight, labels, 18), weight)[0]
    for rows in (slice(0, 1), slice(1, B)):
        linear_cross_entropy(hidden_states[rows], weight, labels[rows], 18).backward()
    assert relative_error(weight.grad, whole) <= TOLERANCE


def test_second_backward_is_an_error():
    hidden_states, weight = hidden_and_weight()
    loss = linear_cross_entropy(hidden_states, weight, some_labels())
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"frees its gradients after one backward pass, even with retain_graph\."):
        loss.backward()


def test_second_derivative_is_an_error():
    """Through tied weights it would otherwise be there, without the part that goes through the loss."""
    model = tiny_model().train()
    loss = model(random_ids(B, T), labels=some_labels(), skip_logits=True).loss
    with pytest.raises(RuntimeError, match=r"has no second derivative: call the model with skip_logits=False\."):
        torch.autograd.grad(loss, list(model.parameters()), create_graph=True)


@pytest.mark.parametrize("rows_per_chunk", [4, 10**6])
def test_compiled_without_a_graph_break(rows_per_chunk, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", rows_per_chunk * V)
    torch.compiler.reset()
    model = tiny_model().train()
    inputs = {"input_ids": random_ids(B, T), "labels": some_labels(), "use_cache": False}
    expected, expected_gradients = model_gradients(model, True, **inputs)
    expected_gradients = {name: gradient.clone() for name, gradient in expected_gradients.items()}
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    model.zero_grad()
    loss = compiled(**inputs, skip_logits=True).loss
    loss.backward()
    assert relative_error(loss, expected) <= TOLERANCE
    for name, parameter in model.named_parameters():
        if not name.endswith("k_proj.bias"):
            assert relative_error(parameter.grad, expected_gradients[name]) <= 5 * TOLERANCE, name


class LargestTensor(TorchDispatchMode):
    """Notes how many numbers the largest tensor has that any operation returns, forward or backward."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.elements = max(self.elements, leaf.numel())
        return result


def test_logits_are_never_built(monkeypatch):
    """Neither they nor their gradient: at most a chunk of 4 rows, or a tensor of the network itself."""
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 4 * 1000)
    model = tiny_model(vocab_size=1000, n_embd=8, n_layer=1).train()
    ids = random_ids(4, 32)
    largest = {}
    for skip_logits in (True, False):
        with LargestTensor() as seen:
            model(ids, labels=ids, skip_logits=skip_logits).loss.backward()
        largest[skip_logits] = seen.elements
    assert largest == {True: 1000 * 8, False: 4 * 32 * 1000}


def test_unlabeled_positions_are_left_out_of_the_product(monkeypatch):
    """8 of 128 positions have a label, so one chunk of 8 rows is all there is."""
    model = tiny_model(vocab_size=1000, n_embd=4, n_layer=1).train()
    ids = random_ids(4, 32)
    labels = torch.full_like(ids, -100)
    labels[:, -2:] = ids[:, -2:]
    with LargestTensor() as seen:
        model(ids, labels=labels, skip_logits=True).loss.backward()
    assert seen.elements == 8 * 1000
