"""Writing text: `generate` in its ways, caches, padding on the left, the longest sequence, compiled and exported."""

import logging
import warnings
from threading import Thread

import pytest
import torch
from model_fixtures import random_ids, relative_error, tiny_model, twins
from transformers import DynamicCache, StaticCache, TextIteratorStreamer, set_seed

N_POSITIONS = 32
TOLERANCE = 1e-5
TOO_LONG = (
    "The sequence is too long: {total} positions ({cached} cached and {new} new positions) but the model has "
    "n_positions=32; truncate the input or generate fewer tokens."
)


@pytest.fixture(scope="module", params=["eager", "sdpa"])
def model(request):
    return tiny_model(attn_implementation=request.param)


def generate(model, input_ids, new_tokens=12, **options):
    """New tokens only, always `new_tokens` of them unless `eos_token_id` is given."""
    options = {"attention_mask": torch.ones_like(input_ids), "do_sample": False, "eos_token_id": None} | options
    return model.generate(input_ids, max_new_tokens=new_tokens, **options)[:, input_ids.shape[1] :]


def left_padded(rows):
    """Input ids and mask of rows of different length; 0 pads."""
    length = max(len(row) for row in rows)
    ids = torch.tensor([[0] * (length - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_cache": False},
        {"num_beams": 3, "no_repeat_ngram_size": 2},
        {"num_beams": 3, "no_repeat_ngram_size": 2, "num_return_sequences": 2, "length_penalty": 2.0},
    ],
    ids=["greedy", "no cache", "beams", "several beams"],
)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_text_equals_transformers(options, attention):
    reference, ours = twins(attention=attention)
    ids, mask = left_padded([[5, 17, 23, 8], [40, 9]])
    texts = [generate(model, ids, 20, attention_mask=mask, **options) for model in (reference, ours)]
    assert torch.equal(*texts)
    assert len(texts[1].unique()) > 5, "a model that repeats itself would prove little"


def test_sampled_text_equals_transformers_and_itself():
    reference, ours = twins()
    ids = random_ids(2, 5)

    def sample(model, seed):
        set_seed(seed)
        return generate(model, ids, do_sample=True, top_k=20, top_p=0.9, temperature=0.8)

    assert torch.equal(sample(ours, 0), sample(ours, 0))
    assert torch.equal(sample(ours, 0), sample(reference, 0))
    assert not torch.equal(sample(ours, 0), sample(ours, 1))


@pytest.mark.parametrize("helper", ["assistant_model", "prompt_lookup_num_tokens"])
def test_assisted_decoding_writes_the_greedy_text(model, helper):
    prompt = torch.tensor([[5, 17, 5, 17, 5]])
    value = {"assistant_model": tiny_model(n_layer=1), "prompt_lookup_num_tokens": 2}[helper]
    assert torch.equal(generate(model, prompt, **{helper: value}), generate(model, prompt))


def test_static_cache_writes_the_greedy_text(model):
    ids, mask = left_padded([[5, 17, 23, 8], [40, 9]])
    expected = generate(model, ids, 20, attention_mask=mask)
    assert torch.equal(generate(model, ids, 20, attention_mask=mask, cache_implementation="static"), expected)


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"cache_implementation": "static"}], ids=str)
@pytest.mark.parametrize("pads", [1, 5])
def test_left_padding_changes_no_token(model, pads, options):
    prompt = [5, 17, 23, 8]
    alone = generate(model, torch.tensor([prompt]), 20)
    ids, mask = left_padded([prompt, list(range(3, 7 + pads))])
    assert ids[0].tolist() == [0] * pads + prompt
    assert torch.equal(generate(model, ids, 20, attention_mask=mask, **options)[:1], alone)


def test_pads_may_look_like_the_end_of_text(model):
    """pad == eos, as in GPT-2: the mask tells them apart."""
    prompt = [5, 2, 23, 8]
    ids, mask = left_padded([prompt, [9] * 6])
    ids[mask == 0] = 2
    text = generate(model, ids, attention_mask=mask, pad_token_id=2)
    assert torch.equal(text[:1], generate(model, torch.tensor([prompt])))


def test_text_ends_at_the_end_of_text(model):
    prompt = torch.tensor([[5, 17, 23, 8]])
    stop = generate(model, prompt)[0, 3].item()
    text = generate(model, prompt, eos_token_id=stop)[0].tolist()
    assert text == generate(model, prompt)[0, : len(text)].tolist()
    assert text.index(stop) == len(text) - 1


def test_embeddings_as_prompt_write_the_same_text(model):
    prompt = torch.tensor([[5, 17, 23, 8]])
    embeddings = model.get_input_embeddings()(prompt)
    mask = torch.ones_like(prompt)
    text = model.generate(
        inputs_embeds=embeddings, attention_mask=mask, max_new_tokens=12, do_sample=False, eos_token_id=None
    )
    assert torch.equal(text, generate(model, prompt))


def test_streaming(tiny_tokenizer):
    model = tiny_model(vocab_size=290, eos_token_id=None, bos_token_id=None)
    single_bytes = [number for number in range(290) if len(tiny_tokenizer.decode([number])) == 1]
    prompt = tiny_tokenizer("The cat sat on", return_tensors="pt")
    streamer = TextIteratorStreamer(tiny_tokenizer, skip_prompt=True, timeout=60)
    options = {"max_new_tokens": 12, "do_sample": False, "suppress_tokens": single_bytes, "no_repeat_ngram_size": 1}
    thread = Thread(target=model.generate, kwargs={**prompt, **options, "streamer": streamer})
    thread.start()
    pieces = list(streamer)
    thread.join(timeout=60)
    whole = model.generate(**prompt, **options)[0, prompt["input_ids"].shape[1] :]
    assert "".join(pieces) == tiny_tokenizer.decode(whole)
    assert len([piece for piece in pieces if piece]) > 1


def test_nothing_warns(model, caplog):
    ids, mask = left_padded([[5, 17, 23, 8], [40, 9]])
    transformers_logger = logging.getLogger("transformers")
    transformers_logger.addHandler(caplog.handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model.generate(ids, attention_mask=mask, max_new_tokens=4)
    finally:
        transformers_logger.removeHandler(caplog.handler)
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []


def new_cache(model, kind):
    return DynamicCache(config=model.config) if kind == "dynamic" else StaticCache(model.config, N_POSITIONS)


@pytest.mark.parametrize("with_positions", [False, True])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_cached_decoding_equals_the_whole(model, kind, with_positions):
    """Token by token after a prompt of 6, in rows with 0 to 5 pads on the left."""
    ids = random_ids(4, N_POSITIONS)
    mask = (torch.arange(N_POSITIONS) >= torch.tensor([[0], [1], [3], [5]])).long()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    whole = model(ids, attention_mask=mask).logits
    cache, parts = new_cache(model, kind), []
    for start, end in [(0, 6)] + [(n, n + 1) for n in range(6, N_POSITIONS)]:
        given = {"position_ids": positions[:, start:end]} if with_positions else {}
        step = model(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache, use_cache=True, **given)
        parts.append(step.logits)
    shown = mask.bool()
    assert relative_error(torch.cat(parts, dim=1)[shown], whole[shown]) <= TOLERANCE
    for row, pads in enumerate([0, 1, 3, 5]):  # and the whole equals the row alone
        assert relative_error(whole[row, pads:], model(ids[row : row + 1, pads:]).logits[0]) <= TOLERANCE


def test_cache_without_a_mask(model):
    ids = random_ids(2, 20)
    cache = model(ids[:, :7]).past_key_values
    assert cache.get_seq_length() == 7
    rest = model(ids[:, 7:], past_key_values=cache).logits
    assert relative_error(rest, model(ids).logits[:, 7:]) <= TOLERANCE


def test_cropped_cache_continues_with_other_tokens(model):
    ids, others = random_ids(2, 20), random_ids(2, 9, seed=1)
    cache = model(ids).past_key_values
    cache.crop(-12)
    assert cache.get_seq_length() == 8
    continued = model(others, past_key_values=cache).logits
    expected = model(torch.cat([ids[:, :8], others], dim=1)).logits[:, 8:]
    assert relative_error(continued, expected) <= TOLERANCE


def test_logits_to_keep(model):
    ids = random_ids(2, 9)
    logits = model(ids).logits
    assert relative_error(model(ids, logits_to_keep=1).logits, logits[:, -1:]) <= TOLERANCE
    chosen = torch.tensor([0, 4])
    assert relative_error(model(ids, logits_to_keep=chosen).logits, logits[:, chosen]) <= TOLERANCE


def test_recorded_outputs():
    model = tiny_model(attn_implementation="eager")
    outputs = model(random_ids(2, 9), output_attentions=True, output_hidden_states=True)
    assert [tuple(tensor.shape) for tensor in outputs.hidden_states] == [(2, 9, 24)] * 4  # embeddings and 3 blocks
    assert [tuple(tensor.shape) for tensor in outputs.attentions] == [(2, 4, 9, 9)] * 3
    for attention in outputs.attentions:
        assert attention.sum(-1).sub(1).abs().max() < 1e-6
        assert attention.triu(diagonal=1).abs().max() == 0
    last = model.lm_head(outputs.hidden_states[-1])
    assert relative_error(last, outputs.logits) <= TOLERANCE
    plain = model(random_ids(2, 9))
    assert plain.attentions is None
    assert plain.hidden_states is None


def test_longest_sequence_works_and_one_more_is_refused(model):
    assert model(random_ids(1, 32)).logits.shape == (1, 32, 61)
    with pytest.raises(ValueError) as error:
        model(random_ids(1, 33))
    assert str(error.value) == TOO_LONG.format(total=33, cached=0, new=33)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_longest_sequence_with_a_cache(model, kind):
    cache = new_cache(model, kind)
    model(random_ids(2, 30), past_key_values=cache, use_cache=True)
    assert model(random_ids(2, 2), past_key_values=cache).logits.shape == (2, 2, 61)
    with pytest.raises(ValueError) as error:
        model(random_ids(2, 1), past_key_values=cache)
    assert str(error.value) == TOO_LONG.format(total=33, cached=32, new=1)


@pytest.mark.parametrize(
    ("options", "cached", "new"),
    [({}, 32, 1), ({"use_cache": False}, 0, 33), ({"cache_implementation": "static"}, 32, 1)],
    ids=["dynamic", "no cache", "static"],
)
def test_longest_generated_text(options, cached, new):
    """The model reads 32 tokens and writes the 33rd; reading that one too is refused, and does no lasting harm."""
    model = tiny_model()
    prompt = random_ids(2, 30)
    assert generate(model, prompt, 3, **options).shape == (2, 3)
    with pytest.raises(ValueError) as error:
        generate(model, prompt, 4, **options)
    assert str(error.value) == TOO_LONG.format(total=33, cached=cached, new=new)
    assert generate(model, prompt[:, :10], 5, **options).shape == (2, 5)


def test_prompt_that_is_too_long(model):
    with pytest.raises(ValueError) as error:
        generate(model, random_ids(1, 40), 1)
    assert str(error.value) == TOO_LONG.format(total=40, cached=0, new=40)


def test_packed_rows_may_be_longer_than_their_documents(model):
    """Two documents of 20 tokens in one row of 40; one of 40 is refused."""
    ids = random_ids(1, 40)
    positions = torch.arange(20).repeat(2).unsqueeze(0)
    packed = model(ids, position_ids=positions, use_cache=False).logits
    apart = torch.cat([model(ids[:, :20]).logits, model(ids[:, 20:]).logits], dim=1)
    assert relative_error(packed, apart) <= TOLERANCE
    with pytest.raises(ValueError) as error:
        model(ids, position_ids=torch.arange(40).unsqueeze(0))
    assert str(error.value) == TOO_LONG.format(total=40, cached=0, new=40)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"input_ids": torch.tensor([[5, 61]])}, "Token id 61 is out of range: valid values are 0 to 60."),
        ({"input_ids": torch.tensor([[5, -1]])}, "Token id -1 is out of range: valid values are 0 to 60."),
        (
            {"input_ids": torch.tensor([[5, 6]]), "token_type_ids": torch.tensor([[0, 61]])},
            "Token type id 61 is out of range: valid values are 0 to 60.",
        ),
        (
            {"input_ids": torch.tensor([[5, 6]]), "position_ids": torch.tensor([[31, 32]])},
            "Position 32 is out of range: valid values are 0 to 31.",
        ),
        (
            {"input_ids": torch.tensor([[5, 6]]), "inputs_embeds": torch.zeros(1, 2, 24)},
            "Give exactly one of input_ids and inputs_embeds.",
        ),
        ({}, "Give exactly one of input_ids and inputs_embeds."),
    ],
    ids=["id", "negative id", "type", "position", "both", "neither"],
)
def test_bad_input_gets_one_sentence(model, inputs, message):
    with pytest.raises(ValueError) as error:
        model(**inputs)
    assert str(error.value) == message


def test_generate_names_an_id_outside_the_vocabulary(model):
    with pytest.raises(ValueError, match=r"^Token id 61 is out of range: valid values are 0 to 60\.$"):
        generate(model, torch.tensor([[5, 61]]))


@pytest.mark.parametrize("padded", [False, True])
def test_compiled_without_a_graph_break(padded):
    torch.compiler.reset()
    model = tiny_model()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    ids = random_ids(2, 9)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    inputs = {"input_ids": ids, "attention_mask": mask if padded else None}
    assert relative_error(compiled(**inputs).logits, model(**inputs).logits) <= TOLERANCE


def test_compiled_to_machine_code():
    torch.compiler.reset()
    model = tiny_model(n_layer=1)
    ids = random_ids(2, 9)
    compiled = torch.compile(model, fullgraph=True)
    assert relative_error(compiled(ids, use_cache=False).logits, model(ids).logits) <= TOLERANCE


def test_compiled_step_with_a_static_cache():
    """What `generate` does on a GPU: the prompt eagerly, then each step through one compiled graph."""
    torch.compiler.reset()
    model = tiny_model()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    ids = random_ids(2, 12)
    cache = new_cache(model, "static")
    model(ids[:, :9], past_key_values=cache)
    expected = model(ids).logits
    for n in range(9, 12):
        step = compiled(ids[:, n : n + 1], past_key_values=cache, position_ids=torch.tensor([[n]]))
        assert relative_error(step.logits[:, 0], expected[:, n]) <= TOLERANCE


def test_exported_with_any_length(model):
    length = torch.export.Dim("length", min=2, max=N_POSITIONS)
    exported = torch.export.export(
        model,
        (random_ids(2, 7),),
        {"use_cache": False},
        dynamic_shapes={"input_ids": {1: length}, "use_cache": None},
        strict=False,
    ).module()
    for ids in (random_ids(2, 11), random_ids(2, 32)):
        assert relative_error(exported(ids, use_cache=False).logits, model(ids).logits) <= TOLERANCE
