"""Inspect a model: attributions, attention maps, head ablation, activation patching, the logit lens, token
probabilities and the size of the cache.

Apart from `token_attributions`, the functions take a ScratchGPT2 language model and one text, (1, T) token ids. They
never modify the model, so several threads can inspect it while it generates. The letters in shapes are those of
`modeling_scratch_gpt2.py`.
"""

from collections.abc import Iterator
from itertools import islice

import numpy as np
import torch
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from .modeling_scratch_gpt2 import ScratchGPT2ForCausalLM, causal_mask, eager_attention_forward
from .prediction import evaluation_mode
from .tokenization import BYTE_OF_CHARACTER, check_text

# Integrated gradients: initial number of parts, points in each part, the tolerated difference (nats) between a part's
# integral and the change of the log odds, and the number of points after which the tolerance is ignored.
PARTS = 4
POINTS = 8
TOLERANCE = 0.002
MAX_POINTS = 512
TOKENS_AT_ONCE = 1024
LOGITS_AT_ONCE = 128  # positions whose logits are in memory together: 26 MB with GPT-2's vocabulary


def token_attributions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    label: str | int | None = None,
) -> list[tuple[str, float]]:
    """How much each token of a text contributes to a label (positive: for it, negative: against it), computed with
    integrated gradients.

    The attributions sum to the difference in the label's log odds, log(p / (1 - p)) for its probability p, between the
    text and a baseline of padding tokens of the same length (Sundararajan, Taly and Yan 2017, arXiv:1703.01365):
    gradient times input, with the gradient averaged along the straight line from the embeddings of the baseline to
    those of the text. Attributions from the gradient at the text alone (Simonyan et al. 2013, arXiv:1312.6034;
    Shrikumar et al. 2016, arXiv:1605.01713) have no such sum, and are almost 0 wherever the model is confident.

    Args:
        model: any sequence classifier that takes `inputs_embeds` and has at least two labels.
        tokenizer: the special tokens that it adds are part of the text and of the baseline; their attribution is 0.
        label: name or id; by default the label that the model predicts.

    Returns pairs of a token's text and its attribution (a float). Tokens that form one character are joined.

    Raises ValueError for an empty text, one that `check_text` refuses or longer than the model's positions, a model
    with one label, an unknown label, and a tokenizer without padding and end-of-text token.
    """
    *_, attributions = attribution_steps(model, tokenizer, text, label)
    return attributions


def attribution_steps(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    label: str | int | None = None,
    max_points: int | None = None,
) -> Iterator[list[tuple[str, float]]]:
    """`token_attributions` in steps of at most TOKENS_AT_ONCE tokens, for callers that show progress or may stop.

    Yields the current estimate after each step (an empty list before the first one); the last one is the result.
    `max_points` (by default MAX_POINTS) limits the work: after that many points, the line is not divided further.
    """
    # The ids that `encode_texts` gives, and which of them the tokenizer has added.
    options = {"split_special_tokens": True, "return_special_tokens_mask": True, "verbose": False}
    encoded = tokenizer(check_text(text), return_tensors="pt", **options)
    input_ids = encoded["input_ids"].to(model.device)  # (1, T)
    added = encoded["special_tokens_mask"].to(model.device).bool()  # (1, T)
    check_inputs(model, tokenizer, input_ids, text)
    padding = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    embed = model.get_input_embeddings()
    with evaluation_mode(model):
        with torch.no_grad():
            end = embed(input_ids)  # (1, T, C)
            start = embed(torch.where(added, input_ids, padding))
            label = label_id(model, label, model(inputs_embeds=end).logits)
        for gradient in mean_gradient(model, start, end, label, max_points or MAX_POINTS):
            if gradient is None:
                yield []
                continue
            attributions = ((end - start)[0].float() * gradient).sum(-1)  # (T, C) -> (T,)
            yield as_written(text, join_characters(tokenizer, input_ids[0].tolist(), attributions.tolist()))


def check_inputs(model, tokenizer, input_ids: torch.Tensor, text: str) -> None:
    positions = getattr(model.config, "max_position_embeddings", None)
    length = input_ids.shape[1]
    if not length:
        raise ValueError(f"The text {text!r} has no tokens; give one to explain.")
    if positions is not None and length > positions:
        raise ValueError(f"The text has {length} tokens but the model has only {positions} positions; shorten it.")
    if len(model.config.id2label) < 2:
        raise ValueError("The model has one label only; a label's log odds need another.")
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is None:
        raise ValueError("The tokenizer has neither a padding nor an end-of-text token to compare the text with.")


def label_id(model, label: str | int | None, logits: torch.Tensor) -> int:
    if label is None:
        return int(logits[0].argmax())
    names = model.config.id2label
    for number, name in names.items():
        if label in (number, name):
            return number
    raise ValueError(f"The label {label!r} is not one of the model's: {', '.join(map(repr, names.values()))}.")


def mean_gradient(
    model, start: torch.Tensor, end: torch.Tensor, label: int, max_points: int
) -> Iterator[torch.Tensor | None]:
    """Gradient (T, C) of the label's log odds over the embeddings, averaged over the line from `start` to `end`.

    A classifier may change its decision within a small part of the line. Therefore the line is divided into parts, and
    each part is halved until its gradients account for the difference of the log odds between its ends. Yields the
    current estimate after every step (None in the first round); the last one is the result.
    """
    points, weights = (torch.tensor(numbers) / 2 for numbers in np.polynomial.legendre.leggauss(POINTS))
    lefts, width = torch.arange(PARTS) / PARTS, 1 / PARTS  # where the parts begin, (P,), and their length
    total, estimate = torch.zeros(end.shape[1:], device=end.device), None
    points_taken = 0
    while len(lefts):
        places = lefts[:, None] + width * (points + 0.5)  # (P, POINTS)
        steps = []
        for gradients in gradients_at(model, start, end, label, places.flatten()):
            steps.append(gradients)
            yield estimate
        gradients = torch.cat(steps).unflatten(0, places.shape)  # (P, POINTS, T, C)
        gradients = width * torch.einsum("n,pntc->ptc", weights.to(gradients), gradients)  # integrals of the parts
        found = (gradients * (end - start)).sum((1, 2))  # (P,)
        before, after = log_odds_at(model, start, end, label, torch.cat((lefts, lefts + width))).chunk(2)
        points_taken += places.numel()
        done = (found - (after - before)).abs() < TOLERANCE
        if points_taken >= max_points:
            done = torch.ones_like(done)
        total += gradients[done].sum(0)
        estimate = total + gradients[~done].sum(0)
        width /= 2
        lefts = lefts[~done.cpu()]
        lefts = torch.cat((lefts, lefts + width))
    yield estimate


def between(start: torch.Tensor, end: torch.Tensor, places: torch.Tensor) -> Iterator[torch.Tensor]:
    """Embeddings (N, T, C) at `places` (N,) from 0, `start`, to 1, `end`, at most TOKENS_AT_ONCE tokens at a time."""
    for some in places.to(end).split(max(1, TOKENS_AT_ONCE // end.shape[1])):
        yield start + some[:, None, None] * (end - start)


def gradients_at(model, start, end, label: int, places: torch.Tensor) -> Iterator[torch.Tensor]:
    """Gradients (N, T, C) of the log odds at `places`, in steps."""
    for embeds in between(start, end, places):
        with torch.enable_grad():
            odds = log_odds(model(inputs_embeds=embeds.requires_grad_()).logits.float(), label)
            (gradients,) = torch.autograd.grad(odds.sum(), embeds)
        yield gradients.float()


@torch.no_grad()
def log_odds_at(model, start, end, label: int, places: torch.Tensor) -> torch.Tensor:
    """Log odds (N,) at `places`."""
    embeddings = between(start, end, places)
    return torch.cat([log_odds(model(inputs_embeds=embeds).logits.float(), label) for embeds in embeddings])


def log_odds(logits: torch.Tensor, label: int) -> torch.Tensor:
    """(S, number of labels) -> (S,)"""
    others = [number for number in range(logits.shape[1]) if number != label]
    return logits[:, label] - logits[:, others].logsumexp(-1)


def join_characters(tokenizer, ids: list[int], attributions: list[float]) -> list[tuple[str, float]]:
    """Tokens as text. A non-ASCII character can consist of several tokens, none of which is text on its own."""
    joined: list[tuple[str, float]] = []
    begun: list[int] = []
    total = 0.0
    for number, (token, attribution) in enumerate(zip(ids, attributions, strict=True), start=1):
        begun, total = [*begun, token], total + attribution
        piece = tokenizer.decode(begun, clean_up_tokenization_spaces=False)
        if not piece.endswith("\ufffd") or number == len(ids):
            joined.append((piece, total))
            begun, total = [], 0.0
    return joined


def as_written(text: str, pieces: list[tuple[str, float]]) -> list[tuple[str, float]]:
    """The pieces with the upper-case letters of `text`, if the tokenizer lower-cases its input."""
    joined = "".join(piece for piece, _ in pieces)
    if joined != text.lower() or len(joined) != len(text):
        return pieces
    characters = iter(text)
    return [("".join(islice(characters, len(piece))), attribution) for piece, attribution in pieces]


@torch.no_grad()
def attention_maps(model: ScratchGPT2ForCausalLM, input_ids: torch.LongTensor, layer: int) -> torch.Tensor:
    """The attention weights of all heads of one layer: (H, T, T) in float32. Row t contains the weights of position t,
    which sum to 1.

    They are recomputed from the input of the layer, because the fast attention functions do not return their weights.
    One layer at a time limits the memory: 50 MB for 1,024 tokens and 12 heads; all layers of GPT-2 take 600 MB.

    Args:
        layer: from 0 to n_layer - 1.

    Raises ValueError for a layer that the model does not have.
    """
    if not 0 <= layer < model.config.n_layer:
        raise ValueError(f"There is no layer {layer}: this model has layers 0 to {model.config.n_layer - 1}.")
    block = model.model.layers[layer]
    hidden_states = block.attn_norm(residual_stream(model, input_ids)[layer])  # (1, T, C)
    query = block.attn.split_heads(block.attn.q_proj(hidden_states))  # (1, T, C) -> (1, H, T, D)
    key = block.attn.split_heads(block.attn.k_proj(hidden_states))
    mask = additive_mask(hidden_states)
    _, weights = eager_attention_forward(block.attn, query, key, key, mask, block.attn.scaling)
    return weights[0].float()


@torch.no_grad()
def head_ablations(model: ScratchGPT2ForCausalLM, input_ids: torch.LongTensor, layer: int) -> torch.Tensor:
    """Probabilities of the next token when single heads of one layer are removed: (H + 1, V) in float32. Row 0 is
    computed with all heads, row h + 1 without head h.

    The output of an attention layer is a sum with one term for each head (Elhage et al. 2021, "A mathematical
    framework for transformer circuits"). Removing a head removes its term from the stream that later layers read.

    Raises ValueError for a layer that the model does not have.
    """
    weights = attention_maps(model, input_ids, layer)  # (H, T, T)
    block = model.model.layers[layer]
    states = residual_stream(model, input_ids)[layer]  # (1, T, C)
    value = block.attn.v_proj(block.attn_norm(states))[0].unflatten(-1, (len(weights), -1))  # (T, H, D)
    head_outputs = torch.einsum("hts,shd->htd", weights.to(value), value)
    out_proj = block.attn.out_proj.weight.unflatten(1, (len(weights), -1))  # (C, H, D)
    parts = torch.einsum("htd,chd->htc", head_outputs, out_proj)
    attended = states + parts.sum(0) + block.attn.out_proj.bias
    states = torch.cat((attended, attended - parts))  # (H + 1, T, C)
    states = states + block.mlp(block.mlp_norm(states))
    mask = additive_mask(states)
    for later in model.model.layers[layer + 1 :]:
        states = later(states, mask)
    return model.lm_head(model.model.norm(states[:, -1])).float().softmax(-1)


@torch.no_grad()
def activation_patching(
    model: ScratchGPT2ForCausalLM, clean_ids: torch.LongTensor, corrupted_ids: torch.LongTensor
) -> torch.Tensor:
    """Find the layers and positions that carry the difference between two texts of equal length (Meng et al. 2022,
    "Locating and Editing Factual Associations in GPT", section 2).

    Returns the probabilities of the next token after the corrupted text, (n_layer, T, V) in float32. For entry [l, t],
    the input of layer l at position t is replaced by that of the clean text.

    Raises ValueError for texts of different lengths.
    """
    if clean_ids.shape != corrupted_ids.shape:
        raise ValueError(f"The texts have {clean_ids.shape[1]} and {corrupted_ids.shape[1]} tokens; make them equal.")
    clean, corrupted = residual_stream(model, clean_ids), residual_stream(model, corrupted_ids)
    positions = torch.arange(clean_ids.shape[1], device=clean_ids.device)
    results = []
    for number in range(model.config.n_layer):
        states = corrupted[number].repeat(len(positions), 1, 1)  # (T, T, C): row t is patched at position t
        states[positions, positions] = clean[number][0]
        mask = additive_mask(states)
        for layer in model.model.layers[number:]:
            states = layer(states, mask)
        results.append(model.lm_head(model.model.norm(states[:, -1])).float().softmax(-1))
    return torch.stack(results)


def additive_mask(states: torch.Tensor) -> torch.Tensor:
    """The causal mask of `states` (B, T, C) as numbers to add to the scores: (1, 1, T, T)."""
    allowed = causal_mask(states.shape[1]).to(states.device)
    mask = states.new_zeros(allowed.shape).masked_fill(~allowed, torch.finfo(states.dtype).min)
    return mask[None, None]


@torch.no_grad()
def logit_lens(
    model: ScratchGPT2ForCausalLM, input_ids: torch.LongTensor, top_k: int = 1
) -> tuple[torch.Tensor, torch.LongTensor]:
    """The prediction after the embeddings and after each layer: the final norm and the output layer, applied to the
    residual stream (nostalgebraist 2020, "interpreting GPT: the logit lens").

    Returns probabilities and ids of the `top_k` most probable tokens in descending order, both
    (n_layer + 1, T, top_k). The last entry is the prediction of the whole model.
    """
    states = residual_stream(model, input_ids)
    normed = [model.model.norm(state[0]) for state in states[:-1]] + [states[-1][0]]  # (n_layer + 1) times (T, C)
    pairs = [most_probable(model, state, top_k) for state in normed]
    probabilities, ids = zip(*pairs, strict=True)
    return torch.stack(probabilities), torch.stack(ids)


@torch.no_grad()
def token_probabilities(
    model: ScratchGPT2ForCausalLM, input_ids: torch.LongTensor, top_k: int = 5
) -> tuple[torch.Tensor, torch.Tensor, torch.LongTensor]:
    """The probability of each token of a text given the tokens before it, and the most probable alternatives.

    Returns the probabilities (T - 1,) of tokens 1 to T - 1, then the probabilities and ids (T - 1, top_k) of the most
    probable tokens at these positions.
    """
    states = model.model(input_ids, use_cache=False).last_hidden_state[0, :-1]  # (T - 1, C)
    of_text = [
        model.lm_head(some).float().softmax(-1).gather(-1, following[:, None])[:, 0]
        for some, following in zip(states.split(LOGITS_AT_ONCE), input_ids[0, 1:].split(LOGITS_AT_ONCE), strict=True)
    ]
    return torch.cat(of_text), *most_probable(model, states, top_k)


def residual_stream(model: ScratchGPT2ForCausalLM, input_ids: torch.LongTensor) -> tuple[torch.Tensor, ...]:
    """(n_layer + 1) times (1, T, C): the input of each layer, and the output of the final norm."""
    return model.model(input_ids, use_cache=False, output_hidden_states=True).hidden_states


def most_probable(model, states: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.LongTensor]:
    """Normalized states (T, C) -> probabilities and ids (T, top_k). Raises ValueError for a `top_k` out of range."""
    if not 1 <= top_k <= model.config.vocab_size:
        raise ValueError(f"top_k is {top_k} but must lie between 1 and {model.config.vocab_size}, the vocabulary.")
    pairs = [model.lm_head(some).float().softmax(-1).topk(top_k) for some in states.split(LOGITS_AT_ONCE)]
    probabilities, ids = zip(*pairs, strict=True)
    return torch.cat(probabilities), torch.cat(ids)


def cache_bytes(past_key_values: Cache) -> int:
    """Bytes of the keys and values of all layers: for GPT-2, 2 * n_layer * n_embd numbers for each position."""
    layers = [layer for layer in past_key_values.layers if layer.is_initialized]
    return sum(tensor.numel() * tensor.element_size() for layer in layers for tensor in (layer.keys, layer.values))


def show_token(tokenizer: PreTrainedTokenizerBase, token_id: int) -> str:
    """A printable form of one token: spaces and line breaks as symbols, incomplete characters as hexadecimal bytes."""
    text = tokenizer.decode([token_id], clean_up_tokenization_spaces=False)
    if "\ufffd" in text:
        spelled = tokenizer.convert_ids_to_tokens(token_id)
        text = "<" + " ".join(f"{BYTE_OF_CHARACTER[character]:02x}" for character in spelled) + ">"
    signs = {" ": "\u00b7", "\n": "\u21b5", "\t": "\u21e5"}
    return "".join(signs.get(c, c if c.isprintable() else f"<{ord(c):02x}>") for c in text)
