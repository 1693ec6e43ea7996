"""Attributions: literal values for models computed by hand, and a trained classifier compared with occlusion."""

from types import SimpleNamespace

import pytest
import torch
import transformers
from model_fixtures import NO_DROPOUT

from scratch_gpt2 import ScratchGPT2Config, ScratchGPT2ForSequenceClassification, inspection
from scratch_gpt2.inspection import as_written, attribution_steps, join_characters, token_attributions
from scratch_gpt2.tokenization import train_tokenizer

WORDS = ["cat", "dog", "sun", "tea", "car", "sky", "hat", "map"]


class TwoTokens(torch.nn.Module):
    """Tokens a, b, c and the padding are the vectors (2, 0), (0, 3), (1, 1) and (0, 0); `function` makes logits."""

    def __init__(self, function, padding=(0.0, 0.0)):
        super().__init__()
        self.vectors = torch.nn.Embedding.from_pretrained(
            torch.tensor([[2.0, 0.0], [0.0, 3.0], [1.0, 1.0], list(padding)])
        )
        self.function = function
        self.device = torch.device("cpu")
        self.config = SimpleNamespace(id2label={0: "ham", 1: "spam"}, max_position_embeddings=4)

    def get_input_embeddings(self):
        return self.vectors

    def forward(self, inputs_embeds):
        return SimpleNamespace(logits=self.function(inputs_embeds))


class Letters:
    pad_token_id = eos_token_id = 3

    def __call__(self, text, **options):
        ids = torch.tensor([["abc-".index(letter) for letter in text]], dtype=torch.long)
        return {"input_ids": ids, "special_tokens_mask": torch.zeros_like(ids)}

    def decode(self, ids, **options):
        return "".join("abc-"[i] for i in ids)


def linear(embeds):
    """Logits (x - y, 2x + y) summed over the tokens, so the log odds of spam are x + 2y and those of ham -x - 2y."""
    x, y = embeds.sum(1).unbind(-1)
    return torch.stack((x - y, 2 * x + y), dim=-1)


def product(embeds):
    """Log odds of spam: the x of the first token times the y of the second."""
    odds = embeds[:, 0, 0] * embeds[:, 1, 1]
    return torch.stack((torch.zeros_like(odds), odds), dim=-1)


def test_a_linear_model_is_split_exactly():
    model = TwoTokens(linear)
    # 2 + 0, 0 + 6 and 1 + 2; the padding is (0, 0).
    assert token_attributions(model, Letters(), "abc") == [
        ("a", pytest.approx(2.0)),
        ("b", pytest.approx(6.0)),
        ("c", pytest.approx(3.0)),
    ]
    assert [value for _, value in token_attributions(model, Letters(), "ab", "ham")] == pytest.approx([-2.0, -6.0])
    assert token_attributions(model, Letters(), "ab", 0) == token_attributions(model, Letters(), "ab", "ham")


def test_attributions_are_differences_from_the_padding_token():
    model = TwoTokens(linear, padding=(1.0, 1.0))  # worth 1 + 2
    assert [value for _, value in token_attributions(model, Letters(), "abc")] == pytest.approx([-1.0, 3.0, 0.0])


def test_tokens_that_only_count_together_share():
    """x * y = 2 * 3 is halved between them; the gradient at the text times the input would give each the whole 6."""
    attributions = token_attributions(TwoTokens(product), Letters(), "ab")
    assert [value for _, value in attributions] == pytest.approx([3.0, 3.0])


def test_log_odds_of_one_of_three_labels():
    """Logits 0, 0 and x + y: log odds of the last are x + y - ln 2, whose constant cancels."""

    def three(embeds):
        total = embeds.sum((1, 2))
        return torch.stack((torch.zeros_like(total), torch.zeros_like(total), total), dim=-1)

    model = TwoTokens(three)
    model.config.id2label = {0: "a", 1: "b", 2: "c"}
    assert [value for _, value in token_attributions(model, Letters(), "ab", "c")] == pytest.approx([2.0, 3.0])


@pytest.mark.parametrize(
    ("text", "label", "message"),
    [
        ("", None, "The text '' has no tokens; give one to explain."),
        ("ababa", None, "The text has 5 tokens but the model has only 4 positions; shorten it."),
        (
            "a\ud83d",
            None,
            "The text is not valid Unicode: character 1 is '\\ud83d', half of a surrogate pair; "
            "remove it, or read the source as UTF-8 with errors='replace'.",
        ),
        ("ab", "eggs", "The label 'eggs' is not one of the model's: 'ham', 'spam'."),
        ("ab", 2, "The label 2 is not one of the model's: 'ham', 'spam'."),
    ],
)
def test_mistakes_are_named(text, label, message):
    with pytest.raises(ValueError) as error:
        token_attributions(TwoTokens(linear), Letters(), text, label)
    assert str(error.value) == message


def test_a_model_with_one_label_has_no_log_odds():
    model = TwoTokens(linear)
    model.config.id2label = {0: "stars"}
    with pytest.raises(ValueError, match="The model has one label only"):
        token_attributions(model, Letters(), "ab")


@pytest.fixture(scope="module")
def trained():
    """A classifier for which `win` makes a text spam, unless `not` is in it as well."""
    tokenizer = train_tokenizer([" ".join([*WORDS, "win", "not"]) + " " + " ".join(WORDS)] * 9, vocab_size=300)
    generator = torch.Generator().manual_seed(0)
    texts, labels = [], []
    for number in range(256):
        words = [WORDS[i] for i in torch.randint(len(WORDS), (5,), generator=generator).tolist()]
        places = torch.randperm(5, generator=generator).tolist()
        if number % 4 in (1, 2):
            words[places[0]] = "win"
        if number % 4 in (2, 3):
            words[places[1]] = "not"
        texts.append(" " + " ".join(words))
        labels.append(int(number % 4 == 1))
    torch.manual_seed(0)
    special = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), tokenizer.eos_token_id)
    config = ScratchGPT2Config(
        vocab_size=len(tokenizer),
        n_positions=16,
        n_embd=32,
        n_layer=2,
        n_head=2,
        num_labels=2,
        **NO_DROPOUT,
        **special,
    )
    config.id2label, config.label2id = {0: "ham", 1: "spam"}, {"ham": 0, "spam": 1}
    model = ScratchGPT2ForSequenceClassification(config)
    inputs = tokenizer(texts, return_tensors="pt", padding=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        loss = model(**inputs, labels=torch.tensor(labels)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.02
    return model.eval(), tokenizer


def spam_log_odds(model, ids):
    with torch.no_grad():
        ham, spam = model(torch.tensor([ids])).logits[0].tolist()
    return spam - ham


def test_attributions_sum_to_the_difference_of_log_odds(trained):
    model, tokenizer = trained
    for text in (" win tea sun sky", " not win cat", " sky", " dog map not tea"):
        ids = tokenizer(text)["input_ids"]
        expected = spam_log_odds(model, ids) - spam_log_odds(model, [tokenizer.pad_token_id] * len(ids))
        attributions = token_attributions(model, tokenizer, text, "spam")
        assert "".join(token for token, _ in attributions) == text
        assert sum(value for _, value in attributions) == pytest.approx(expected, abs=0.01)


SPAM = (" win tea sun sky", " tea win sky hat cat", " map sky dog tea win")


@pytest.mark.parametrize("text", SPAM)
def test_attributions_agree_with_occlusion(trained, text):
    """The word that makes a text spam has the highest attribution, and replacing it lowers the odds of spam."""
    model, tokenizer = trained
    ids, cat = tokenizer(text)["input_ids"], tokenizer(" cat")["input_ids"]
    drops = [spam_log_odds(model, ids) - spam_log_odds(model, ids[:i] + cat + ids[i + 1 :]) for i in range(len(ids))]
    attributions = token_attributions(model, tokenizer, text)
    tokens, values = zip(*attributions, strict=True)
    assert tokens[drops.index(max(drops))] == tokens[values.index(max(values))] == " win"
    assert max(drops) > 10 and max(values) > 5
    against = [value for _, value in token_attributions(model, tokenizer, text, "ham")]
    assert against == pytest.approx([-value for value in values], abs=1e-4)


def test_the_gradient_at_the_text_alone_says_nothing_where_the_model_is_sure(trained):
    model, tokenizer = trained
    embeds = model.get_input_embeddings()(torch.tensor([tokenizer(SPAM[0])["input_ids"]])).detach().requires_grad_()
    ham, spam = model(inputs_embeds=embeds).logits[0]
    (gradient,) = torch.autograd.grad(spam - ham, embeds)
    assert (gradient * embeds).sum(-1).abs().max() < 0.1
    assert sum(value for _, value in token_attributions(model, tokenizer, SPAM[0])) > 10


def test_the_model_is_left_as_it_was(trained):
    model, tokenizer = trained
    model.train()
    with torch.no_grad():
        token_attributions(model, tokenizer, SPAM[0])
    assert model.training and all(parameter.grad is None for parameter in model.parameters())
    model.eval()


def test_other_classifiers_and_the_special_tokens_that_they_add(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    tokenizer = transformers.BertTokenizerFast(str(tmp_path / "vocab.txt"))
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.BertConfig(vocab_size=len(words), **sizes, num_labels=3)
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(config).eval()
    first, *tokens, last = token_attributions(model, tokenizer, "cat sun tea", "LABEL_2")
    assert (first, last) == (("[CLS]", 0.0), ("[SEP]", 0.0))
    assert [token for token, _ in tokens] == ["cat", "sun", "tea"]
    log_probs = model(torch.tensor([[2, 4, 6, 7, 3], [2, 0, 0, 0, 3]])).logits.log_softmax(-1)[:, 2]
    with_text, without = (p - (1 - p.exp()).log() for p in log_probs)
    assert sum(value for _, value in tokens) == pytest.approx((with_text - without).item(), abs=1e-4)


def test_tokens_that_make_up_one_character_are_joined(tiny_tokenizer):
    ids = tiny_tokenizer("a £ \ufffd!")["input_ids"]
    joined = join_characters(tiny_tokenizer, ids, [1.0] * len(ids))
    assert "".join(piece for piece, _ in joined) == "a £ \ufffd!"
    assert ("£", 2.0) in joined  # two bytes in UTF-8
    assert sum(value for _, value in joined) == len(ids)


def test_capitals_that_the_tokenizer_reads_as_small_letters_are_kept():
    pieces = [("win", 1.0), (" £", 0.5), ("90!", -1.0)]
    assert as_written("WIN £90!", pieces) == [("WIN", 1.0), (" £", 0.5), ("90!", -1.0)]
    assert as_written("\u0130win", [("i\u0307", 1.0), ("win", 0.5)]) == [("i\u0307", 1.0), ("win", 0.5)]


def test_steps_end_with_the_result_and_restore_training_mode_when_abandoned(tiny_tokenizer):
    model = ScratchGPT2ForSequenceClassification(
        ScratchGPT2Config(
            vocab_size=len(tiny_tokenizer), n_positions=64, n_embd=8, n_layer=1, n_head=2, pad_token_id=0
        )
    ).train()
    first, *_, last = attribution_steps(model, tiny_tokenizer, "the cat sat", "LABEL_1")
    assert first == [] and last == token_attributions(model, tiny_tokenizer, "the cat sat", "LABEL_1")
    steps = attribution_steps(model, tiny_tokenizer, "the cat sat")
    next(steps)
    assert not model.training
    steps.close()
    assert model.training


def test_the_number_of_points_is_bounded(monkeypatch):
    taken = []
    original = inspection.gradients_at
    monkeypatch.setattr(inspection, "gradients_at", lambda *a: taken.append(len(a[-1])) or original(*a))
    monkeypatch.setattr(inspection, "TOLERANCE", -1.0)  # never accurate enough
    list(attribution_steps(TwoTokens(product), Letters(), "ab", max_points=64))
    assert taken == [32, 64]
