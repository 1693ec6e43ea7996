"""Batches as literal lists; packed rows have the loss and gradients of separate ones, on real rows too."""

import pytest
import torch
from model_fixtures import tiny_model

from scratch_gpt2 import ScratchGPT2ForCausalLM
from scratch_gpt2.data.collators import PackingCollator, PaddingCollator, pack
from scratch_gpt2.data.instructions import encode_conversations, read_instructions

EOS = 9  # also what is padded with


def example(*ids, prompt=1):
    return {"input_ids": list(ids), "labels": [-100] * prompt + list(ids[prompt:])}


ROWS = [example(1, 2, EOS), example(3, 4, 5, 6, EOS, prompt=3), example(7, EOS)]


def as_lists(batch):
    return {name: tensor.tolist() for name, tensor in batch.items()}


def test_padding():
    assert as_lists(PaddingCollator(EOS)(ROWS)) == {
        "input_ids": [[1, 2, EOS, EOS, EOS], [3, 4, 5, 6, EOS], [7, EOS, EOS, EOS, EOS]],
        "labels": [[-100, 2, EOS, -100, -100], [-100, -100, -100, 6, EOS], [-100, EOS, -100, -100, -100]],
        "attention_mask": [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 1, 0, 0, 0]],
    }


def test_packing():
    """Lengths 3, 5 and 2 into rows of 7: the 5 and the 2 fill one up."""
    rows = pack([*ROWS, example(1, 2, 3, 4, EOS, prompt=0)], length=7)
    assert rows == [
        {
            "input_ids": [3, 4, 5, 6, EOS, 7, EOS],
            "labels": [-100, -100, -100, 6, EOS, -100, EOS],
            "position_ids": [0, 1, 2, 3, 4, 0, 1],
        },
        {"input_ids": [1, 2, 3, 4, EOS], "labels": [-100, 2, 3, 4, EOS], "position_ids": [0, 1, 2, 3, 4]},
        {"input_ids": [1, 2, EOS], "labels": [-100, 2, EOS], "position_ids": [0, 1, 2]},
    ]
    assert as_lists(PackingCollator(EOS)(rows[:2])) == {
        "input_ids": [[3, 4, 5, 6, EOS, 7, EOS], [1, 2, 3, 4, EOS, EOS, EOS]],
        "labels": [[-100, -100, -100, 6, EOS, -100, EOS], [-100, 2, 3, 4, EOS, -100, -100]],
        "position_ids": [[0, 1, 2, 3, 4, 0, 1], [0, 1, 2, 3, 4, 0, 1]],
    }


def test_the_best_fit_is_taken():
    """After 7 and 6 in rows of 10 there is room for 3 and 4: the 4 fills the second, the 3 the first."""
    sizes = [
        [len(row["input_ids"]), row["position_ids"].count(0)]
        for row in pack([example(*range(n)) for n in (3, 6, 4, 7)], 10)
    ]
    assert sizes == [[10, 2], [10, 2]]


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="An example of 5 tokens does not fit into rows of 4"):
        pack(ROWS, length=4)


def test_real_rows_are_all_there_and_fill_the_rows(shared_data, gpt2_tokenizer):
    conversations = read_instructions(str(shared_data / "alpaca_random_2000.json"))
    examples, dropped = encode_conversations(gpt2_tokenizer, conversations, max_length=1024)
    rows = pack(examples, length=1024)
    tokens = sum(len(example["input_ids"]) for example in examples)
    assert dropped == 0
    assert tokens / 1024 <= len(rows) <= 1.01 * tokens / 1024
    assert all(len(row["input_ids"]) <= 1024 for row in rows)
    documents = []
    for row in rows:
        starts = [index for index, position in enumerate(row["position_ids"]) if position == 0]
        ends = [*starts[1:], len(row["input_ids"])]
        documents += [tuple(row["input_ids"][start:end]) for start, end in zip(starts, ends, strict=True)]
    assert sorted(documents) == sorted(tuple(example["input_ids"]) for example in examples)


def test_as_many_rows_as_trl_packs(shared_data, gpt2_tokenizer):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    conversations = read_instructions(str(shared_data / "alpaca_cherry_5pct.json"))
    examples, _ = encode_conversations(gpt2_tokenizer, conversations, max_length=512)
    ids = datasets.Dataset.from_dict({"input_ids": [example["input_ids"] for example in examples]})
    assert len(pack(examples, 512)) == len(trl.pack_dataset(ids, 512, "bfd", map_kwargs={"batch_size": len(ids)}))


# Isolation


def loss_and_gradients(model, batch, tokens):
    model.zero_grad()
    loss = model(**batch, num_items_in_batch=tokens).loss
    loss.backward()
    return loss.item(), {name: weight.grad.clone() for name, weight in model.named_parameters()}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_packed_padded_and_separate_rows_are_the_same(attention, training):
    """Nine documents of 2 to 10 tokens in a batch of rows of different length, the last with padding."""
    generator = torch.Generator().manual_seed(0)
    examples = [
        example(*torch.randint(3, 61, (n,), generator=generator).tolist(), prompt=n // 2) for n in range(2, 11)
    ]
    tokens = sum(label != -100 for row in examples for label in row["labels"][1:])
    model = tiny_model(attn_implementation=attention).train(training)
    rows = pack(examples, length=20)
    assert len({len(row["input_ids"]) for row in rows}) > 1
    packed, packed_gradients = loss_and_gradients(model, PackingCollator(2)(rows), tokens)
    padded, padded_gradients = loss_and_gradients(model, PaddingCollator(2)(examples), tokens)
    separate = sum(loss_and_gradients(model, PaddingCollator(2)([row]), tokens)[0] for row in examples)
    assert packed == pytest.approx(separate, rel=1e-6)
    assert padded == pytest.approx(separate, rel=1e-6)
    torch.testing.assert_close(packed_gradients, padded_gradients, rtol=1e-4, atol=1e-6)


def test_nothing_reaches_across_documents():
    model = tiny_model().eval()
    batch = PackingCollator(2)(pack([example(*range(3, 9)), example(*range(10, 14))], length=12))
    embeddings = model.get_input_embeddings()(batch.pop("input_ids")).detach().requires_grad_()  # (1, 10, C)
    logits = model(inputs_embeds=embeddings, position_ids=batch["position_ids"]).logits
    logits[0, 6:].sum().backward()
    assert not embeddings.grad[0, :6].any() and embeddings.grad[0, 6:].any()


def test_packed_loss_of_real_rows(shared_data, gpt2_tokenizer):
    """Packed and padded: equal to 1e-5 on the same tokens."""
    conversations = read_instructions(str(shared_data / "alpaca_random_2000.json"), max_rows=48)
    examples, _ = encode_conversations(gpt2_tokenizer, conversations, max_length=256)
    sizes = {"vocab_size": 50257, "n_positions": 256, "n_embd": 32, "n_head": 4, "n_layer": 2}
    model = tiny_model(**sizes, bos_token_id=50256, eos_token_id=50256, pad_token_id=50256)
    assert type(model) is ScratchGPT2ForCausalLM
    with torch.no_grad():
        padded = model(**PaddingCollator(50256)(examples), skip_logits=True).loss.item()
        packed = model(**PackingCollator(50256)(pack(examples, 256)), skip_logits=True).loss.item()
    assert packed == pytest.approx(padded, rel=1e-6)
    assert padded > 5
