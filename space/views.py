"""What "Look inside" shows: pictures of the functions of `scratch_gpt2.inspection`, one for each step of the walk."""

from collections.abc import Iterator
from dataclasses import dataclass

import markup
import numpy as np
import torch
from generation import ALTERNATIVES, Sampling, Step, next_chances, write_text
from limits import MAX_EXPLAINED_CHARACTERS, MAX_SENTENCE_TOKENS, check_input, counted

from scratch_gpt2.inspection import attention_maps, head_ablations, logit_lens, residual_stream, show_token

LENS_POSITIONS = 8
MOST_LIKELY = 12
SUMMARY = 5  # of them, that are shown first
CACHE_TOKENS = 40
TIMES = "\u00d7"
STRIP_WIDTH = 64  # numbers of a vector that are drawn
NEURON_ROWS = 16


@dataclass(frozen=True)
class Sentence:
    """A visitor's sentence as one model reads it: `ids` (1, T), `labels` for the eye."""

    model: torch.nn.Module
    tokenizer: object
    text: str
    ids: torch.LongTensor
    labels: list[str]
    left_out: int

    @property
    def config(self):
        return self.model.config


def read_sentence(model, tokenizer, text: str) -> Sentence:
    """Its first MAX_SENTENCE_TOKENS tokens. `<|endoftext|>` is read as plain characters.

    Raises ValueError for a text that is empty or too long.
    """
    check_input(text, MAX_EXPLAINED_CHARACTERS)
    whole = tokenizer(text, split_special_tokens=True, verbose=False)["input_ids"]
    ids = whole[: min(MAX_SENTENCE_TOKENS, model.config.n_positions - 1)]
    labels = [show_token(tokenizer, i) for i in ids]
    row = torch.tensor([ids], device=model.device)
    return Sentence(model, tokenizer, text, row, labels, len(whole) - len(ids))


def note(sentence: Sentence) -> str:
    """One sentence where the text was cut, or nothing."""
    if not sentence.left_out:
        return ""
    kept = len(sentence.labels)
    return f"The walk shows the first {kept} tokens and leaves out {counted(sentence.left_out, 'more token')}."


def overview(sentence: Sentence) -> str:
    """The most likely next tokens, and all steps in one line, each with its value for this sentence."""
    config, guesses = sentence.config, most_likely(sentence)
    best, chance = guesses[0]
    answer = markup.bars([markup.Bar(*guess) for guess in guesses])
    return f"<h2>What comes next?</h2>{answer}" + markup.stations(
        [
            ("step-tokens", "Tokens", f"{counted(len(sentence.text), 'character')} → {len(sentence.labels)}"),
            ("step-vectors", "Vectors", f"{len(sentence.labels)} {TIMES} {config.n_embd} numbers"),
            ("step-attention", "Attention", f"{config.n_layer} {TIMES} {counted(config.n_head, 'head')}"),
            ("step-mlp", "MLP", f"{config.inner_width:,} neurons"),
            ("step-lens", "Guess", f"first in layer {first_layer_of_answer(sentence)}"),
            ("step-next", "Next token", f"{best} {chance:.0%}"),
            ("step-cache", "Memory", f"{cache_kilobytes(config, len(sentence.labels)):,.0f} KiB"),
        ]
    )


@torch.no_grad()
def next_logits(sentence: Sentence) -> torch.Tensor:
    """(1, V)"""
    return sentence.model(sentence.ids, use_cache=False, logits_to_keep=1).logits[:, -1].float()


def most_likely(sentence: Sentence) -> list[tuple[str, float]]:
    chances, tokens = next_logits(sentence).softmax(-1)[0].topk(SUMMARY)
    return [(show_token(sentence.tokenizer, i), p) for i, p in zip(tokens.tolist(), chances.tolist(), strict=True)]


def first_layer_of_answer(sentence: Sentence) -> int:
    """The layer (from 1) from which on the logit lens shows the model's answer; 0 for the embeddings."""
    guesses = logit_lens(sentence.model, sentence.ids)[1][:, -1, 0]  # (n_layer + 1,)
    others = (guesses != guesses[-1]).nonzero()
    return int(others[-1]) + 1 if len(others) else 0


def tokens(sentence: Sentence) -> str:
    return markup.chips(zip(sentence.labels, sentence.ids[0].tolist(), strict=True))


@torch.no_grad()
def vectors(sentence: Sentence) -> str:
    """The embeddings, the positions, and their sum, the first STRIP_WIDTH numbers of each."""
    model = sentence.model.model
    embedded = model.embed_tokens(sentence.ids)[0]  # (T, C)
    positions = model.embed_positions.weight[: len(embedded)]
    parts = [("token", embedded), ("position", positions), ("sum, read by layer 1", embedded + positions)]
    largest = max(part.abs().quantile(0.98).item() for _, part in parts) or 1.0
    pictures = [(name, (part[:, :STRIP_WIDTH] / largest).clamp(-1, 1).numpy()) for name, part in parts]
    return markup.rows_of_numbers(pictures, sentence.labels)


def strongest_head(sentence: Sentence, layer: int) -> int:
    """The head (from 1) of a layer whose removal changes the probability of the most likely next token most."""
    ablations = head_ablations(sentence.model, sentence.ids, layer - 1)  # (H + 1, V)
    best = ablations[0].argmax()
    return 1 + int((ablations[1:, best] - ablations[0, best]).abs().argmax())


def heads(sentence: Sentence, layer: int, head: int) -> tuple[str, str, str]:
    """Thumbnails of all heads of a layer, the lines of one of them, and the prediction without it. `layer` and `head`
    count from 1. Raises ValueError where there is no such layer or head."""
    if not 1 <= head <= sentence.config.n_head:
        raise ValueError(f"There is no head {head}; layer {layer} has heads 1 to {sentence.config.n_head}.")
    maps = attention_maps(sentence.model, sentence.ids, layer - 1).numpy()  # (H, T, T)
    ablations = head_ablations(sentence.model, sentence.ids, layer - 1)  # (H + 1, V)
    whole, without = ablations[0], ablations[head]
    best = int(whole.argmax())
    effects = (ablations[1:, best] - whole[best]).tolist()
    ids = torch.cat((whole.topk(5).indices, without.topk(5).indices)).unique().tolist()
    ids.sort(key=lambda i: -whole[i].item())
    rows = [markup.Bar(show_token(sentence.tokenizer, i), without[i].item(), whole[i].item()) for i in ids]
    return (
        markup.thumbnails(maps, effects, head - 1),
        markup.arcs(sentence.labels, maps[head - 1]),
        markup.bars(rows, legend=(f"without head {head} of layer {layer}", "with all heads")),
    )


@torch.no_grad()
def neurons(sentence: Sentence, layer: int) -> tuple[str, str]:
    """What the MLP of a layer computes for the last token: a picture of its neurons, and one sentence. `layer` counts
    from 1."""
    block = sentence.model.model.layers[layer - 1]
    states = residual_stream(sentence.model, sentence.ids)[layer - 1]  # (1, T, C)
    attended = states + block.attn(block.attn_norm(states))[0]
    active = block.mlp.act(block.mlp.up_proj(block.mlp_norm(attended)))[0, -1]  # (4C,)
    added = block.mlp.down_proj(active)
    count, ratio = int((active > 0.1).sum()), (added.norm() / attended[0, -1].norm()).item()
    padded = np.zeros((NEURON_ROWS, -(-len(active) // NEURON_ROWS)))
    padded.flat[: len(active)] = (active / active.abs().max().clamp(min=1e-6)).numpy()
    text = (
        f"In layer {layer}, {count:,} of {len(active):,} neurons are active for the last token, "
        f"“{sentence.labels[-1]}”; the vector that they add is {ratio:.1f} times as long as the one it is added to."
    )
    return markup.picture(padded, f"Activations of the {len(active):,} neurons", "neurons"), text


def lens(sentence: Sentence) -> str:
    """The logit lens on the last tokens: a row for each layer, a column for each token."""
    part = slice(-LENS_POSITIONS, None)
    probabilities, guesses = (values[:, part, 0].tolist() for values in logit_lens(sentence.model, sentence.ids))
    layers = sentence.config.n_layer
    names = ["embeddings", *(f"layer {number}" for number in range(1, layers)), f"layer {layers} (answer)"]
    rows = [
        (name, [(show_token(sentence.tokenizer, guess), p) for guess, p in zip(row, chances, strict=True)])
        for name, row, chances in zip(names, guesses, probabilities, strict=True)
    ]
    return markup.table(["after …", *sentence.labels[part]], rows, "What each layer would say next")


def next_token(sentence: Sentence, temperature: float, top_k: int, top_p: float) -> tuple[str, str]:
    """Bars of the most likely next tokens, with their probabilities before and after these settings, and one
    sentence."""
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, repetition_penalty=1)
    logits = next_logits(sentence)
    probabilities = logits.softmax(-1)[0]
    chances = next_chances(sentence.ids, logits, sampling.processors())
    ids = probabilities.topk(min(MOST_LIKELY, len(probabilities))).indices.tolist()
    rows = [markup.Bar(show_token(sentence.tokenizer, i), chances[i].item(), probabilities[i].item()) for i in ids]
    left = int((chances > 0).sum())
    text = f"{left:,} of {len(chances):,} tokens can be drawn."
    return markup.bars(rows, legend=("drawn from", "the model's probability")), text


def cache_kilobytes(config, positions: int) -> float:
    """Keys and values in float32."""
    return 2 * config.n_layer * config.n_embd * 4 * positions / 1024


def cache(sentence: Sentence, steps: list[Step] = ()) -> tuple[str, str]:
    """Columns of the cache's size after each token that was read or written, and the sum behind the last one."""
    config, begun = sentence.config, len(sentence.labels)
    sizes = [cache_kilobytes(config, position) for position in range(1, begun + 1)]
    sizes += [step.cache_bytes / 1024 for step in steps[1:]]  # the first step reads the sentence alone
    factors = ["2 (key and value)", counted(config.n_layer, "layer"), f"{config.n_embd} numbers", "4 bytes"]
    text = (
        f"{f' {TIMES} '.join([counted(len(sizes), 'position'), *factors])} = {sizes[-1]:,.0f} KiB. "
        f"Each new token adds {cache_kilobytes(config, 1):,.1f} KiB."
    )
    return markup.columns(sizes, begun, f"{sizes[-1]:,.0f} KiB after {counted(len(sizes), 'position')}"), text


def grow_cache(sentence: Sentence) -> Iterator[tuple[str, str, str]]:
    """The text, `cache` and its sentence, after every token that the model writes."""
    sampling = Sampling(max_new_tokens=CACHE_TOKENS)
    for written, steps in write_text(sentence.model, sentence.tokenizer, sentence.ids[0].tolist(), sampling):
        yield (sentence.text + written, *cache(sentence, steps))


def alternatives(tokenizer, number: int, step: Step) -> str:
    """The popover of one written token: what else could have stood there, each with a click that continues with it."""
    rows = [(i, p, chance) for i, p, chance in step.alternatives]
    if step.token not in [i for i, _, _ in rows]:
        rows = [*rows[: ALTERNATIVES - 1], (step.token, step.probability, step.chance)]
    drawn = [
        markup.Bar(
            show_token(tokenizer, i) if i != tokenizer.eos_token_id else "■ the end",
            p,
            mark="drawn" if i == step.token else "",
            pick="" if i == step.token else f"write {number} {place}",
        )
        for place, (i, p, _) in enumerate(rows)
    ]
    return markup.alternatives("Click another to continue with it", drawn)
