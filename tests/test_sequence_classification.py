"""Which token the classification head reads, and which loss it computes."""

import math

import pytest
import torch
import torch.nn.functional as F
import transformers

from scratch_gpt2 import ScratchGPT2Config, ScratchGPT2ForSequenceClassification

EOS = 9
PAD = 0


def make_model(num_labels=3, **options):
    torch.manual_seed(0)
    config = ScratchGPT2Config(
        vocab_size=10,
        n_positions=16,
        n_embd=8,
        n_layer=2,
        n_head=2,
        initializer_range=0.3,
        num_labels=num_labels,
        **{"bos_token_id": EOS, "eos_token_id": EOS, "pad_token_id": EOS} | options,
    )
    return ScratchGPT2ForSequenceClassification(config).eval()


def what_the_head_reads(model, **inputs):
    """Input of `score`, and the normalised hidden states (B, T, C) it was taken from."""
    read = []
    hook = model.score.register_forward_pre_hook(lambda module, args: read.append(args[0]))
    hidden_states = model(**inputs, output_hidden_states=True).hidden_states[-1]
    hook.remove()
    return read, hidden_states


def pooled_index(model, **inputs):
    """Position of the token that the head reads in each row."""
    (pooled,), hidden_states = what_the_head_reads(model, **inputs)
    return (hidden_states == pooled[:, None]).all(-1).int().argmax(-1).tolist()


def stock_pooled_index(input_ids, **config):
    """The same for transformers' GPT-2, which applies the head everywhere and picks a position afterwards."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 10, "n_positions": 16, "n_embd": 8, "n_layer": 1, "n_head": 2, "num_labels": 3}
    model = transformers.GPT2ForSequenceClassification(transformers.GPT2Config(**sizes, **config)).eval()
    everywhere = []
    model.score.register_forward_hook(lambda module, args, output: everywhere.append(output))
    logits = model(input_ids).logits
    return (everywhere[0] == logits[:, None]).all(-1).int().argmax(-1).tolist()


# Two texts, [1, 2, 3, EOS] and [4, EOS], each ending in a real end of text; GPT-2's padding is EOS as well.
RIGHT = torch.tensor([[1, 2, 3, EOS], [4, EOS, EOS, EOS]])
RIGHT_MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
LEFT = torch.tensor([[1, 2, 3, EOS], [EOS, EOS, 4, EOS]])
LEFT_MASK = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])


@pytest.mark.parametrize(
    ("input_ids", "mask", "expected"), [(RIGHT, RIGHT_MASK, [3, 1]), (LEFT, LEFT_MASK, [3, 3])], ids=["right", "left"]
)
def test_the_real_final_eos_is_read(input_ids, mask, expected):
    assert pooled_index(make_model(), input_ids=input_ids, attention_mask=mask) == expected


@pytest.mark.parametrize(
    ("input_ids", "mask", "expected"), [(RIGHT, RIGHT_MASK, [3, 1]), (LEFT, LEFT_MASK, [3, 3])], ids=["right", "left"]
)
def test_embeddings_in_place_of_ids(input_ids, mask, expected):
    model = make_model()
    embeds = model.get_input_embeddings()(input_ids)
    assert pooled_index(model, inputs_embeds=embeds, attention_mask=mask) == expected
    from_ids = model(input_ids, attention_mask=mask).logits
    torch.testing.assert_close(model(inputs_embeds=embeds, attention_mask=mask).logits, from_ids)


def test_without_a_mask_every_token_counts_when_padding_looks_like_eos():
    model = make_model()
    assert pooled_index(model, input_ids=RIGHT) == [3, 3]
    assert pooled_index(model, inputs_embeds=model.get_input_embeddings()(RIGHT)) == [3, 3]


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_pad_id_of_its_own_is_found_without_a_mask_as_in_transformers(side):
    rows = {"right": [[1, 2, 3, EOS], [4, EOS, PAD, PAD]], "left": [[1, 2, 3, EOS], [PAD, PAD, 4, EOS]]}
    expected = {"right": [3, 1], "left": [3, 3]}[side]
    input_ids = torch.tensor(rows[side])
    assert pooled_index(make_model(pad_token_id=PAD), input_ids=input_ids) == expected
    assert stock_pooled_index(input_ids, pad_token_id=PAD, eos_token_id=EOS) == expected


def test_the_mask_wins_over_the_pad_id():
    input_ids = torch.tensor([[1, 2, PAD, 3], [4, PAD, PAD, 5]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    assert pooled_index(make_model(pad_token_id=PAD), input_ids=input_ids, attention_mask=mask) == [2, 1]


def test_the_logits_do_not_depend_on_the_padding():
    model = make_model()
    alone = [model(torch.tensor([row])).logits[0] for row in ([1, 2, 3, EOS], [4, EOS])]
    for input_ids, mask in ((RIGHT, RIGHT_MASK), (LEFT, LEFT_MASK)):
        torch.testing.assert_close(model(input_ids, attention_mask=mask).logits, torch.stack(alone))


def test_the_head_runs_on_one_position_per_row():
    read, _ = what_the_head_reads(make_model(), input_ids=RIGHT, attention_mask=RIGHT_MASK)
    assert [tuple(vectors.shape) for vectors in read] == [(2, 8)]


# Losses of fixed logits, computed by hand.
LOGITS = torch.tensor([[math.log(1.0), math.log(2.0), math.log(5.0)], [math.log(4.0), math.log(3.0), math.log(1.0)]])


def loss_of(logits, labels, **options):
    """What the head makes of logits that we put in its place."""
    model = make_model(num_labels=logits.shape[1], **options)
    model.score.register_forward_hook(lambda module, args, output: logits)
    return model(RIGHT, attention_mask=RIGHT_MASK, labels=labels).loss.item()


def test_single_label_loss():
    expected = -(math.log(5 / 8) + math.log(4 / 8)) / 2
    assert loss_of(LOGITS, torch.tensor([2, 0])) == pytest.approx(expected)


def test_multi_label_loss():
    # The logits are log odds: 1:1, 2:1, 5:1 and 4:1, 3:1, 1:1.
    expected = -sum(math.log(p) for p in (1 / 2, 1 / 3, 5 / 6, 4 / 5, 3 / 4, 1 / 2)) / 6
    assert loss_of(LOGITS, torch.tensor([[1.0, 0.0, 1.0], [1.0, 1.0, 0.0]])) == pytest.approx(expected)


@pytest.mark.parametrize("labels", [[1.0, 5.0], [[1.0], [5.0]], [1, 5]], ids=["flat", "column", "whole"])
def test_regression_loss(labels):
    assert loss_of(torch.tensor([[3.0], [4.0]]), torch.tensor(labels)) == pytest.approx((2.0**2 + 1.0**2) / 2)


def test_regression_loss_of_several_numbers():
    logits, labels = torch.tensor([[3.0, 0.0], [4.0, 1.0]]), torch.tensor([[1.0, 0.0], [5.0, 4.0]])
    assert loss_of(logits, labels, problem_type="regression") == pytest.approx((4.0 + 0.0 + 1.0 + 9.0) / 4)


def test_problem_type_overrules_the_guess():
    labels = torch.tensor([2.0, 0.0]).long()
    expected = F.cross_entropy(LOGITS, labels).item()
    assert loss_of(LOGITS, labels, problem_type="single_label_classification") == pytest.approx(expected)
    one_hot = torch.tensor([[0, 0, 1], [1, 0, 0]])  # whole numbers, so the guess would be single-label
    expected = F.binary_cross_entropy_with_logits(LOGITS, one_hot.float()).item()
    assert loss_of(LOGITS, one_hot, problem_type="multi_label_classification") == pytest.approx(expected)


def test_problem_type_is_not_guessed_once_and_for_all():
    model = make_model(num_labels=3)
    model(RIGHT, attention_mask=RIGHT_MASK, labels=torch.tensor([2, 0]))
    assert model.config.problem_type is None
