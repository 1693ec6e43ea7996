"""A model that has learned where texts end stops there, although the end-of-text token is also the pad token."""

import torch

from scratch_gpt2 import ScratchGPT2Config, ScratchGPT2ForCausalLM
from scratch_gpt2.linear_cross_entropy import IGNORE_INDEX

DIALOGUES = [
    ("Where is the cat?", " On the mat."),
    ("Where is the rat?", " Under the hat of the cat."),
    ("Who sat?", " It."),
    ("What is on the mat?", " The hat, the cat and the rat."),
]


def padded(tokenizer, dialogues):
    """Rows padded by length on the right; the prompt is masked, the eos that ends the answer is not."""
    rows = [
        (tokenizer(prompt).input_ids, [*tokenizer(answer).input_ids, tokenizer.eos_token_id])
        for prompt, answer in dialogues
    ]
    longest = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids = torch.full((len(rows), longest), tokenizer.pad_token_id)
    labels = torch.full_like(ids, IGNORE_INDEX)
    mask = torch.zeros_like(ids)
    for row, (prompt, answer) in enumerate(rows):
        end = len(prompt) + len(answer)
        ids[row, :end] = torch.tensor(prompt + answer)
        labels[row, len(prompt) : end] = torch.tensor(answer)
        mask[row, :end] = 1
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def test_every_answer_is_exact_and_stops(tiny_tokenizer):
    eos = tiny_tokenizer.eos_token_id
    assert tiny_tokenizer.pad_token_id == eos
    torch.manual_seed(0)
    config = ScratchGPT2Config.from_preset(
        "tiny",
        n_layer=2,
        n_embd=64,
        vocab_size=len(tiny_tokenizer),
        bos_token_id=eos,
        eos_token_id=eos,
        pad_token_id=eos,
    )
    model = ScratchGPT2ForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    batch = padded(tiny_tokenizer, DIALOGUES)
    for _ in range(150):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    model.eval()
    prompts = [prompt for prompt, _ in DIALOGUES]
    inputs = tiny_tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    output = model.generate(**inputs, max_new_tokens=60, do_sample=False)[:, inputs.input_ids.shape[1] :]
    for row, (_, answer) in zip(output.tolist(), DIALOGUES, strict=True):
        expected = [*tiny_tokenizer(answer).input_ids, eos]
        assert row == expected + [eos] * (len(row) - len(expected))
