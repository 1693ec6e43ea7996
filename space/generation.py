"""Text generation, token by token, as Python generators: closing the generator stops the work.

`model.generate` would need a thread for a stream, an event to stop the thread, and the random state of the whole
process for a seed.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from limits import MAX_NEW_TOKENS
from transformers import (
    DynamicCache,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from scratch_gpt2.data.instructions import encode_prompt
from scratch_gpt2.inspection import cache_bytes

ALTERNATIVES = 8
NEXT_TURN = "\n\n### Instruction:"  # where a model that has not learned to stop continues with the user's turn
MAX_STOP_CHARACTERS = 100
MAX_MESSAGES = 100
END_MARK = " ■ the end"
MAX_SEED = 2**32 - 1
SETTINGS = {  # by field of Sampling: its name on the page, the smallest and the largest value
    "temperature": ("temperature", 0, 2),
    "top_k": ("top-k", 0, 1_000_000),
    "top_p": ("top-p", 0, 1),
    "repetition_penalty": ("repetition penalty", 1, 2),
    "max_new_tokens": ("length", 1, MAX_NEW_TOKENS),
    "seed": ("seed", 0, MAX_SEED),
}


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. A temperature of 0 takes the most likely; top_k 0 and top_p 1 keep all tokens."""

    temperature: float = 0.8
    top_k: int = 50
    top_p: float = 0.95
    repetition_penalty: float = 1.1
    max_new_tokens: int = 120
    seed: int = 0
    stop_at: str = ""

    def __post_init__(self):
        for field, (name, least, most) in SETTINGS.items():
            value = getattr(self, field)
            if not isinstance(value, int | float) or not least <= value <= most:
                raise ValueError(f"The {name} must be a number from {least:,} to {most:,}; choose one.")
        if len(self.stop_at or "") > MAX_STOP_CHARACTERS:
            raise ValueError(f"The text to stop at is longer than {MAX_STOP_CHARACTERS} characters; shorten it.")

    def processors(self) -> LogitsProcessorList:
        """What turns the model's logits into the distribution that is sampled from, in this order."""
        steps = [RepetitionPenaltyLogitsProcessor(self.repetition_penalty)] if self.repetition_penalty > 1 else []
        if self.temperature > 0:
            steps.append(TemperatureLogitsWarper(float(self.temperature)))
        top_k = int(self.top_k) if self.temperature > 0 else 1
        steps += [TopKLogitsWarper(top_k)] if top_k > 0 else []
        steps += [TopPLogitsWarper(float(self.top_p))] if self.top_p < 1 else []
        return LogitsProcessorList(steps)


@dataclass(frozen=True)
class Step:
    """One written token. `probability` is what the model gave it, `chance` what was left or added by the settings;
    `alternatives` are (id, probability, chance) of the most likely tokens, `cache_bytes` the size of the
    key-value cache."""

    token: int
    probability: float
    chance: float
    alternatives: list[tuple[int, float, float]]
    cache_bytes: int


def write(model: PreTrainedModel, ids: list[int], sampling: Sampling, begun: Sequence[Step] = ()) -> Iterator[Step]:
    """Continue `ids` until the end-of-text token, the limit of `sampling`, or the end of the model's context.

    `begun` are tokens written before; they count towards the limit and are not yielded again.

    Raises ValueError where `ids` leave no room for a token.
    """
    ids = [*ids, *(step.token for step in begun)]
    room = model.config.n_positions - len(ids)
    if room < 1:
        raise ValueError(
            f"The text has {len(ids)} tokens, and the model reads at most {model.config.n_positions - 1} before it "
            "writes; shorten it."
        )
    generator = torch.Generator(model.device).manual_seed(int(sampling.seed))
    processors, cache = sampling.processors(), DynamicCache(config=model.config)
    seen = torch.tensor([ids], device=model.device)  # (1, T)
    for _ in range(min(int(sampling.max_new_tokens) - len(begun), room)):
        step = next_step(model, seen, cache, processors, generator)
        yield step
        if step.token == model.config.eos_token_id:
            return
        seen = torch.cat((seen, seen.new_tensor([[step.token]])), dim=1)


@torch.no_grad()  # around one step, not around a `yield`: the steps of one text may run in different threads
def next_step(model, seen: torch.Tensor, cache: DynamicCache, processors, generator: torch.Generator) -> Step:
    new = seen[:, cache.get_seq_length() :]
    logits = model(new, past_key_values=cache, logits_to_keep=1).logits[:, -1].float()  # (1, V)
    probabilities, chances = logits.softmax(-1)[0], next_chances(seen, logits, processors)
    token = int(torch.multinomial(chances, 1, generator=generator))
    most_likely = probabilities.topk(min(ALTERNATIVES, len(probabilities))).indices.tolist()
    alternatives = [(i, probabilities[i].item(), chances[i].item()) for i in most_likely]
    return Step(token, probabilities[token].item(), chances[token].item(), alternatives, cache_bytes(cache))


def next_chances(seen: torch.Tensor, logits: torch.Tensor, processors: LogitsProcessorList) -> torch.Tensor:
    """(V,): the distribution that is drawn from, given ids (1, T) and logits (1, V)."""
    return processors(seen, logits.clone()).softmax(-1)[0]


def write_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: list[int],
    sampling: Sampling,
    begun: Sequence[Step] = (),
) -> Iterator[tuple[str, list[Step]]]:
    """The text so far and its steps, after every token; a character of several tokens appears when it is whole. Ends
    before `sampling.stop_at` where the text comes to it; the last step may be the end-of-text token."""
    steps = list(begun)
    if begun:
        yield decode(tokenizer, steps), steps
    for step in write(model, ids, sampling, begun):
        steps.append(step)
        text = decode(tokenizer, steps)
        if sampling.stop_at and sampling.stop_at in text:
            yield text.split(sampling.stop_at)[0], steps
            return
        yield text, steps


def decode(tokenizer: PreTrainedTokenizerBase, steps: Sequence[Step]) -> str:
    """The text of the steps, without the end-of-text token and without a last character that is not whole yet."""
    ids = [step.token for step in steps if step.token != tokenizer.eos_token_id]
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False).removesuffix("\ufffd")


def split_text(tokenizer: PreTrainedTokenizerBase, text: str, steps: Sequence[Step]) -> list[tuple[int, str, float]]:
    """`text` of `write_text` by token: (number of the step, its characters, its probability). Tokens that are no
    character by themselves are joined with those that complete it; the end-of-text token is END_MARK."""
    pieces, pending, shown = [], [], 0
    for number, step in enumerate(steps):
        if step.token == tokenizer.eos_token_id:
            pieces.append((number, END_MARK, step.probability))
            break
        pending.append(step)
        piece = tokenizer.decode([step.token for step in pending], clean_up_tokenization_spaces=False)
        if shown < len(text) and not piece.endswith("\ufffd"):
            pieces.append((number, piece[: len(text) - shown], step.probability))
            pending, shown = [], shown + len(piece)
    return pieces


def chat_prompt(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], n_positions: int, room: int
) -> tuple[list[int], int]:
    """Ids of a conversation that ends with a user's message, and how many of its first messages they leave out, so
    that `room` tokens (at most half the context) remain for the answer.

    Raises ValueError where the last message alone is too long, or the chat template refuses one.
    """
    most = n_positions - min(room, n_positions // 2)
    first = max(0, len(messages) - MAX_MESSAGES)
    first += first % 2  # keep question and answer together
    while True:
        ids = encode_prompt(tokenizer, messages[first:])
        if len(ids) <= most:
            return ids, first
        if first >= len(messages) - 1:
            raise ValueError(
                f"The message has {len(ids)} tokens with the prompt around it, and the model reads at most {most}; "
                "shorten it."
            )
        first = min(first + 2, len(messages) - 1)
