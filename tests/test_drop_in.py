"""What transformers' GPT-2 does, ours does too: calls of the head, labels outside the vocabulary, masks, arguments.

Each test names the right value, which comes from transformers' GPT-2 with the same weights or from its error.
"""

import accelerate
import pytest
import torch
import torch.nn.functional as F
from model_fixtures import random_ids, relative_error, tiny_config, tiny_model, twins
from torch import nn
from torch.nn.utils import parametrize, prune
from transformers import (
    DynamicCache,
    GPT2ForSequenceClassification,
    GPT2ForTokenClassification,
    GPT2LMHeadModel,
    StaticCache,
)

import scratch_gpt2
from scratch_gpt2.linear_cross_entropy import only_multiplies

TOLERANCE = 1e-5
AS_TRAINER = {"num_items_in_batch": 12}  # with it, and in training, the loss is computed without logits
IDS = random_ids(2, 7)
MODES = {
    "evaluation": (False, {}),
    "training": (True, {}),
    "Trainer": (True, AS_TRAINER),
    "loss only": (False, {"skip_logits": True}),
}


def loss_of(model, **inputs):
    return model(input_ids=IDS, labels=IDS, **inputs).loss


# Calling the head


class Half(nn.Module):
    """A parametrization: the layer uses half of the stored weight."""

    def forward(self, weight):
        return weight / 2


def halve_by_hook(head):
    head.register_forward_hook(lambda module, args, output: output / 2)


def halve_by_pre_hook(head):
    head.register_forward_pre_hook(lambda module, args: (args[0] / 2,))


def halve_by_instance(head):
    forward = head.forward
    head.forward = lambda hidden_states: forward(hidden_states) / 2


def halve_by_parametrization(head):
    parametrize.register_parametrization(head, "weight", Half())


def halve_by_accelerate(head):
    class Halve(accelerate.hooks.ModelHook):
        def post_forward(self, module, output):
            return output / 2

    accelerate.hooks.add_hook_to_module(head, Halve())


def prune_all(head):
    prune.l1_unstructured(head, "weight", 0.5)


def add_bias(head):
    head.bias = nn.Parameter(torch.linspace(-1, 1, head.out_features))


CHANGES = [
    halve_by_hook,
    halve_by_pre_hook,
    halve_by_instance,
    halve_by_parametrization,
    halve_by_accelerate,
    prune_all,
    add_bias,
]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_whatever_changes_the_head_changes_the_loss(change, mode):
    training, extra = MODES[mode]
    options = {"tie_word_embeddings": False}
    reference, ours = twins(**options)
    ours.lm_head.weight.data, plain = reference.lm_head.weight.data.clone(), loss_of(ours.train(training), **extra)
    for model in (reference, ours):
        change(model.lm_head)
        model.train(training)
    extra_of_stock = {name: value for name, value in extra.items() if name != "skip_logits"}
    expected = loss_of(reference, **extra_of_stock)
    assert relative_error(loss_of(ours, **extra), expected) <= TOLERANCE
    assert relative_error(plain, expected) > 1e-3, "the change would not show"


@pytest.mark.parametrize("mode", MODES)
def test_hooks_of_every_kind_are_called(mode):
    training, extra = MODES[mode]
    model = tiny_model().train(training)
    head, called = model.lm_head, []
    hooks = [
        head.register_forward_pre_hook(lambda *_: called.append("before")),
        head.register_forward_hook(lambda *_: called.append("after")),
        head.register_full_backward_pre_hook(lambda *_: called.append("gradient before")),
        head.register_full_backward_hook(lambda *_: called.append("gradient after")),
    ]
    loss_of(model, **extra).backward()
    assert called == ["before", "after", "gradient before", "gradient after"]
    for hook in hooks:
        hook.remove()
    everywhere = nn.modules.module.register_module_forward_hook(
        lambda module, *_: called.append("global") if module is head else None
    )
    loss_of(model, **extra)
    everywhere.remove()
    assert called[4:] == ["global"]
    assert only_multiplies(head)


def test_a_loss_function_of_the_user_is_used_as_trainer_calls():
    reference, ours = twins()
    for model in (reference, ours):
        model.train().loss_function = lambda logits, labels, vocab_size, **kwargs: logits.square().mean()
    assert relative_error(loss_of(ours, **AS_TRAINER), loss_of(reference, **AS_TRAINER)) <= TOLERANCE


@pytest.mark.parametrize("mode", MODES)
def test_offloaded_weights(mode):
    """accelerate supplies a module's weight only while the module runs; otherwise it lies on the meta device."""
    training, extra = MODES[mode]
    model = tiny_model().train(training)
    expected = loss_of(model, **extra).item()
    accelerate.cpu_offload(model, torch.device("cpu"))
    assert model.lm_head.weight.is_meta
    with torch.no_grad():
        assert loss_of(model, **extra).item() == pytest.approx(expected, rel=TOLERANCE)


def test_offloaded_weights_train_as_in_transformers():
    losses = []
    for model in twins():
        accelerate.cpu_offload(model.train(), torch.device("cpu"))
        losses.append(loss_of(model, **AS_TRAINER))
    assert relative_error(losses[1], losses[0]) <= TOLERANCE
    assert losses[1].requires_grad == losses[0].requires_grad


# Labels outside the vocabulary


@pytest.mark.parametrize("label", [61, 63, 64, 1000, -1, -101])
@pytest.mark.parametrize("mode", MODES)
def test_a_label_outside_the_vocabulary_is_an_index_error(mode, label):
    """61 tokens in rows of 64 logits: the loss of label 61 was infinite, and its gradients finite."""
    training, extra = MODES[mode]
    labels = IDS.clone()
    labels[1, 3] = label
    message = rf"^Target {label} is out of bounds\.$"
    with pytest.raises(IndexError, match=message):
        F.cross_entropy(torch.zeros(1, 61), torch.tensor([label]))
    with pytest.raises(IndexError, match=message):
        tiny_model().train(training)(IDS, labels=labels, **extra)


@pytest.mark.parametrize("mode", ["training", "loss only"])
def test_a_label_outside_the_vocabulary_does_not_pass_a_compiled_model(mode):
    torch.compiler.reset()
    training, extra = MODES[mode]
    compiled = torch.compile(tiny_model().train(training), fullgraph=True, backend="aot_eager")
    labels = IDS.clone()
    labels[1, 3] = 61
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        compiled(IDS, labels=labels, use_cache=False, **extra)


def test_labels_of_other_heads_outside_their_range_are_index_errors():
    for head, labels in (
        (scratch_gpt2.ScratchGPT2ForTokenClassification, torch.full((2, 7), 2)),
        (scratch_gpt2.ScratchGPT2ForSequenceClassification, torch.tensor([0, 2])),
    ):
        with pytest.raises(IndexError, match=r"^Target 2 is out of bounds\.$"):
            head(tiny_config(num_labels=2))(IDS, labels=labels)
    choices = scratch_gpt2.ScratchGPT2DoubleHeadsModel(tiny_config())
    with pytest.raises(IndexError, match=r"^Target 61 is out of bounds\.$"):
        choices(IDS[None], labels=torch.full_like(IDS[None], 61))
    with pytest.raises(IndexError, match=r"^Target 2 is out of bounds\.$"):
        choices(IDS[None], mc_labels=torch.tensor([2]))


# Arguments


@pytest.mark.parametrize("name", ["encoder_hidden_states", "encoder_attention_mask", "head_mask"])
def test_arguments_that_are_not_implemented_are_refused_by_every_head(name):
    for head in scratch_gpt2.__all__:
        model_class = getattr(scratch_gpt2, head)
        if not head.startswith("ScratchGPT2") or head in ("ScratchGPT2Config", "ScratchGPT2PreTrainedModel"):
            continue
        model = model_class(tiny_config())
        model(IDS, **{name: None})
        with pytest.raises(ValueError, match=rf"^{name} is not implemented: use transformers' own GPT-2 for it\.$"):
            model(IDS, **{name: torch.ones(2, 7, 24)})


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("keep", [3, torch.tensor([0, 4])], ids=["last", "chosen"])
def test_logits_to_keep_leaves_the_loss_alone(keep, mode):
    """Every label counts, in every mode; the logits that are there are the ones asked for."""
    training, extra = MODES[mode]
    model = tiny_model().train(training)
    whole = model(IDS, labels=IDS, **extra)
    part = model(IDS, labels=IDS, logits_to_keep=keep, **extra)
    assert relative_error(part.loss, whole.loss) <= TOLERANCE
    if whole.logits is not None:
        expected = whole.logits[:, -3:] if isinstance(keep, int) else whole.logits[:, keep]
        assert torch.equal(part.logits, expected)


def test_logits_to_keep_for_each_row():
    reference, ours = twins()
    mask = torch.tensor([[0, 1, 1, 0, 0, 0, 1], [0, 0, 0, 0, 0, 1, 0]]).bool()
    for keep in (torch.tensor([[0, 4], [5, 1]]), mask, mask[0]):
        expected = reference(IDS, logits_to_keep=keep).logits
        assert relative_error(ours(IDS, logits_to_keep=keep).logits, expected) <= TOLERANCE


@pytest.mark.parametrize("eos", [2, [2], [5, 0], [0, 2]], ids=str)
def test_pooling_with_several_end_tokens(eos):
    """A pad token that also ends texts is no mark of padding: the last token counts. Stock looks for the pad id."""
    model = scratch_gpt2.ScratchGPT2ForSequenceClassification(tiny_config(eos_token_id=eos)).eval()
    texts = torch.tensor([[5, 17, 0, 0], [8, 40, 9, 0]])
    read = []
    model.score.register_forward_pre_hook(lambda module, args: read.append(args[0]))
    hidden_states = model(texts, output_hidden_states=True).hidden_states[-1]
    index = (hidden_states == read[0][:, None]).all(-1).int().argmax(-1).tolist()
    assert index == ([3, 3] if eos in ([5, 0], [0, 2]) else [1, 2])


# Masks


def columns(*shape):
    return torch.ones(*shape, dtype=torch.long)


@pytest.mark.parametrize("head", [GPT2LMHeadModel, GPT2ForSequenceClassification, GPT2ForTokenClassification])
@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (columns(2, 6), "attention_mask has 6 columns, but there are 7 positions (0 cached and 7 new positions); "
         "give a column for each."),
        (columns(2, 8), "attention_mask has 8 columns, but there are 7 positions (0 cached and 7 new positions); "
         "give a column for each."),
        (columns(1, 7), "attention_mask has the shape (1, 7), but (2, positions) or 4 dimensions are needed."),
        (columns(7), "attention_mask has the shape (7,), but (2, positions) or 4 dimensions are needed."),
        (columns(2, 7, 7), "attention_mask has the shape (2, 7, 7), but (2, positions) or 4 dimensions are needed."),
        (columns(2, 1, 7), "attention_mask has the shape (2, 1, 7), but (2, positions) or 4 dimensions are needed."),
    ],
    ids=["short", "long", "one row", "1-D", "3-D", "3-D for all"],
)  # fmt: skip
def test_masks_of_another_shape_are_refused(head, mask, message):
    _, ours = twins(head)
    with pytest.raises(ValueError) as error:
        ours(IDS, attention_mask=mask)
    assert str(error.value) == message


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_mask_for_the_new_tokens_alone_is_refused(kind):
    """Stock takes it for the first positions and is 2.79 off; ours was 3.61 off."""
    model = tiny_model()
    cache = DynamicCache(config=model.config) if kind == "dynamic" else StaticCache(model.config, 32)
    model(IDS[:, :4], past_key_values=cache, use_cache=True)
    with pytest.raises(ValueError) as error:
        model(IDS[:, 4:], past_key_values=cache, attention_mask=columns(2, 3))
    assert str(error.value) == (
        "attention_mask has 3 columns, but there are 7 positions (4 cached and 3 new positions); give a column for "
        "each."
    )


@pytest.mark.parametrize("head", ["causal", "classification"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_mask_may_cover_positions_that_are_still_to_come(kind, head):
    """As wide as the cache has room: the columns of later positions are not read."""
    head_class = GPT2LMHeadModel if head == "causal" else GPT2ForSequenceClassification
    _, model = twins(head_class)
    mask = columns(2, 7)
    mask[0, :2] = 0
    expected = model(IDS, attention_mask=mask).logits
    cache = DynamicCache(config=model.config) if kind == "dynamic" else StaticCache(model.config, 32)
    model(IDS[:, :4], past_key_values=cache, attention_mask=mask[:, :4], use_cache=True)
    wide = torch.cat([mask, columns(2, 25)], dim=1)
    logits = model(IDS[:, 4:], past_key_values=cache, attention_mask=wide, use_cache=True).logits
    assert relative_error(logits, expected[:, 4:] if head == "causal" else expected) <= TOLERANCE


@pytest.mark.parametrize("shape", [(2, 0), (0, 7), (0, 0)], ids=str)
def test_empty_input_is_refused(shape):
    message = f"The input is empty: {shape[0]} rows of {shape[1]} tokens; give at least one of each."
    empty = torch.zeros(shape, dtype=torch.long)
    for model in (tiny_model(), scratch_gpt2.ScratchGPT2ForSequenceClassification(tiny_config())):
        for inputs in ({"input_ids": empty}, {"inputs_embeds": torch.zeros(*shape, 24)}):
            with pytest.raises(ValueError) as error:
                model(**inputs)
            assert str(error.value) == message


# Meta tensors


@pytest.mark.parametrize(("attention", "masked"), [("eager", False), ("eager", True), ("sdpa", False)])
@pytest.mark.parametrize("mode", MODES)
def test_meta_tensors(mode, attention, masked):
    """Shapes without numbers, as FLOP counters and planners of memory use them. (sdpa with a mask asks for numbers in
    the library, for stock too.)"""
    training, extra = MODES[mode]
    with torch.device("meta"):
        model = scratch_gpt2.ScratchGPT2ForCausalLM(tiny_config(attn_implementation=attention)).train(training)
        ids = torch.zeros(2, 7, dtype=torch.long)
        mask = torch.ones_like(ids) if masked else None
        loss = model(ids, attention_mask=mask, labels=ids, **extra).loss
        assert model(ids, position_ids=torch.zeros_like(ids)).logits.shape == (2, 7, 61)
    assert loss.is_meta
    assert loss.shape == ()
