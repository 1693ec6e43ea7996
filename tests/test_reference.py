"""The definition in plain tensor arithmetic: its loss and its sampling equal the model's, and it explains itself.
`test_parity.py` compares its logits with the network's and with transformers' GPT-2."""

import math

import pytest
import torch
from model_fixtures import TOKENS, random_ids, tiny_model
from test_registration import output_of

from scratch_gpt2.reference import gpt2_logits, main, next_token_loss, sample
from scratch_gpt2.tokenization import train_tokenizer


def test_loss_of_known_probabilities():
    """Two tokens are predicted, with probability 1/2 and 1/4; the last logits and the first token do not count."""
    probabilities = torch.tensor([[[0.5, 0.25, 0.25], [0.25, 0.25, 0.5], [1e-9, 1e-9, 1.0]]])
    loss = next_token_loss(probabilities.log(), torch.tensor([[2, 0, 1]]))
    assert loss.item() == pytest.approx((math.log(2) + math.log(4)) / 2)


def test_loss_equals_the_models():
    model, ids = tiny_model(), random_ids(3, 9)
    loss = next_token_loss(gpt2_logits(model.state_dict(), ids, n_head=4), ids)
    assert loss.item() == pytest.approx(model(ids, labels=ids).loss.item(), rel=1e-6)


def test_most_likely_tokens_equal_greedy_generation():
    model, ids = tiny_model(eos_token_id=None), random_ids(2, 5)
    drawn = sample(model.state_dict(), ids, n_head=4, steps=12, top_k=1)
    assert drawn.tolist() == model.generate(ids, max_new_tokens=12, do_sample=False).tolist()


def test_samples_follow_the_temperature_and_top_k():
    """The next token of 4,000 equal rows, against the probabilities of the two most likely tokens."""
    model, ids = tiny_model(), random_ids(1, 5)
    logits = model(ids).logits[0, -1]
    values, tokens = (logits / 2).topk(2)
    torch.manual_seed(0)
    drawn = sample(model.state_dict(), ids.repeat(4000, 1), n_head=4, steps=1, temperature=2.0, top_k=2)[:, -1]
    assert set(drawn.tolist()) == set(tokens.tolist())
    share = (drawn == tokens[0]).float().mean().item()
    assert share == pytest.approx(values.softmax(0)[0].item(), abs=0.03)  # four standard deviations


def test_shapes_that_it_reports():
    shapes = {}
    gpt2_logits(
        tiny_model().state_dict(), random_ids(2, 9), 4, lambda name, x: shapes.setdefault(name, tuple(x.shape))
    )
    assert shapes == {
        "embeddings": (2, 9, 24),
        "queries of a head": (2, 9, 6),
        "attention of a head": (2, 9, 9),
        "heads, joined": (2, 9, 24),
        "feed-forward": (2, 9, 96),
        "block 0": (2, 9, 24),
        "block 1": (2, 9, 24),
        "block 2": (2, 9, 24),
        "logits": (2, 9, 61),
    }


def test_watched_attention_equals_the_models():
    """What a learner reads off one row of it is what the model computes."""
    model, ids = tiny_model(attn_implementation="eager"), random_ids(1, 9)
    watched = []
    gpt2_logits(model.state_dict(), ids, 4, lambda name, x: watched.append(x) if name == "attention of a head" else 0)
    expected = torch.cat(model(ids, output_attentions=True).attentions, dim=1)[0]  # (n_layer * H, T, T)
    torch.testing.assert_close(torch.cat(watched), expected, rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference")
    tokenizer = train_tokenizer(["Once upon a time there was a cat. "] * 20, vocab_size=280)
    tiny_model(vocab_size=280, **TOKENS).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_command_prints_shapes_loss_and_text(checkpoint):
    code = f"import runpy, sys; sys.argv = ['reference', {str(checkpoint)!r}, 'Once upon a time']\n"
    lines = output_of(code + "runpy.run_module('scratch_gpt2.reference', run_name='__main__')").splitlines()
    names = [line[:20].strip() for line in lines[:11]]
    assert names[0] == "tokens" and names[1] == "embeddings" and names[9] == "logits" and names[10] == "loss"
    length = int(lines[0].split("(1, ")[1].split(")")[0])
    assert lines[1][20:] == f"(1, {length}, 24)" and lines[9][20:] == f"(1, {length}, 280)"
    assert lines[10].endswith(" nats per token") and lines[11].startswith("Once upon a time")


def test_text_without_a_token_to_predict(checkpoint):
    with pytest.raises(SystemExit, match="at least two tokens"):
        main(str(checkpoint), "O")
