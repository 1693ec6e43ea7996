"""How close a language model's answers are to the references, and how likely it finds the references themselves."""

import math
import unicodedata
from dataclasses import dataclass
from functools import lru_cache

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.collators import PaddingCollator, Row
from ..data.instructions import Conversation, encode_prompt, render
from ..linear_cross_entropy import IGNORE_INDEX
from ..prediction import batches_by_length, evaluation_mode
from .models import input_device
from .perplexity import exponential, loss_options

BLEU_WORDS = 4  # BLEU counts sequences of up to four words
# Scripts without spaces between words: each character, with its combining marks, is a word.
UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"


@dataclass(frozen=True)
class ReferenceLoss:
    """`loss` is the mean over `tokens`, in nats, `perplexity` its exponential; `too_long` rows were left out."""

    loss: float
    perplexity: float
    tokens: int
    too_long: int


@torch.no_grad()
def reference_loss(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, conversations: list[Conversation], batch_size: int = 8
) -> ReferenceLoss:
    """How likely the model finds the last answer of each conversation, including the token that ends it.

    Every token has the same weight. Conversations longer than the model's positions are left out.

    Raises ValueError if the prompt is not the beginning of the conversation in this chat template, and if all
    conversations are too long.
    """
    rows = [encode_reference(tokenizer, conversation) for conversation in conversations]
    positions = getattr(model.config, "max_position_embeddings", None) or math.inf
    fitting = [row for row in rows if len(row["input_ids"]) <= positions]
    if not fitting:
        raise ValueError(f"All {len(rows)} conversations are longer than the model's {positions} positions.")
    options, device = loss_options(model), input_device(model)
    collate = PaddingCollator(tokenizer.pad_token_id)

    total, tokens = 0.0, 0
    batches = batches_by_length([len(row["input_ids"]) for row in fitting], batch_size)
    with evaluation_mode(model):
        for batch in tqdm(batches, desc="Loss of the references", leave=False, disable=None):
            inputs = collate([fitting[row] for row in batch])
            scored = int((inputs["labels"][:, 1:] != IGNORE_INDEX).sum())
            inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
            loss = model(**inputs, use_cache=False, **options).loss
            total += loss.item() * scored  # the loss is a mean; a Python float is float64
            tokens += scored
    loss = total / tokens
    return ReferenceLoss(loss, exponential(loss), tokens, too_long=len(rows) - len(fitting))


def encode_reference(tokenizer: PreTrainedTokenizerBase, conversation: Conversation) -> Row:
    """Unlike `encode_conversation`, this works without {% generation %} markers, which few templates have."""
    try:
        prompt = encode_prompt(tokenizer, conversation.prompt)
        ids = render(tokenizer, conversation.messages)["input_ids"]
    except ValueError as error:
        raise ValueError(f"{conversation.origin}: {error}") from error
    start = len(prompt)
    if ids[:start] != prompt or len(ids) == start:
        raise ValueError(f"{conversation.origin}: in this chat template the answer does not follow its prompt.")
    if tokenizer.eos_token_id in ids[start:]:
        ids = ids[: ids.index(tokenizer.eos_token_id, start) + 1]  # some templates add a line break
    return {"input_ids": ids, "labels": [IGNORE_INDEX] * start + ids[start:]}


def reference_metrics(responses: list[str], references: list[str]) -> dict[str, float]:
    """`rouge_l`, `bleu` and `exact_match`, each from 0 to 100. White space around a text and the way in which Unicode
    composes its characters (NFC or NFD) are ignored.

    ROUGE-L (Lin 2004) is the mean over the rows of the F1 of the longest common subsequence of words, by Google's
    rouge_score without stemming. For English it is that of `evaluate.load("rouge")`; the words are those of
    `UnicodeWords`, because rouge_score itself only knows a-z and 0-9.

    BLEU (Papineni et al. 2002) is computed over the whole set by sacrebleu with its defaults, with the characters of
    scripts without spaces as words, as in its tokenizer "zh". It counts sequences of one to four words in all
    responses together: a response of fewer than four words adds no sequence of four, and a set of such responses has
    a BLEU of 0 even if all of them are right. `short_responses` counts them.

    Raises:
        ImportError: rouge_score or sacrebleu is missing.
        ValueError: there are no responses.
    """
    check_metric_packages()
    import sacrebleu
    from rouge_score.rouge_scorer import RougeScorer

    if not responses:
        raise ValueError("There are no responses to compare with references.")
    responses, references = (
        [unicodedata.normalize("NFC", text.strip()) for text in texts] for texts in (responses, references)
    )
    pairs = list(zip(references, responses, strict=True))
    scorer = RougeScorer(["rougeL"], tokenizer=UnicodeWords())
    rouge = sum(scorer.score(reference, response)["rougeL"].fmeasure for reference, response in pairs)
    spaced_responses, spaced_references = (list(map(space_characters, texts)) for texts in (responses, references))
    return {
        "rouge_l": 100 * rouge / len(pairs),
        "bleu": sacrebleu.corpus_bleu(spaced_responses, [spaced_references]).score,
        "exact_match": 100 * sum(reference == response for reference, response in pairs) / len(pairs),
    }


def check_metric_packages() -> None:
    """Raise ImportError if a package that `reference_metrics` needs is missing."""
    try:
        import rouge_score  # noqa: F401
        import sacrebleu  # noqa: F401
    except ImportError as error:
        raise ImportError("Reference metrics need two packages: pip install rouge_score sacrebleu.") from error


def short_responses(responses: list[str]) -> int:
    """Number of responses with fewer words, as BLEU counts them, than the longest sequences that it counts."""
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    tokenize = Tokenizer13a()
    return sum(len(tokenize(space_characters(response)).split()) < BLEU_WORDS for response in responses)


class UnicodeWords:
    """Words for rouge_score: lower-case runs of letters, combining marks and digits of any script.

    In scripts without spaces between words (Chinese, Japanese, Thai, Lao, Khmer, Burmese) each character is a word.
    """

    def tokenize(self, text: str) -> list[str]:
        word, _ = patterns()
        return word.findall(text.lower())


def space_characters(text: str) -> str:
    """Put spaces around the characters of scripts that have none between words."""
    _, character = patterns()
    return character.sub(r" \g<0> ", text)


@lru_cache
def patterns():
    import regex  # a dependency of sacrebleu; unlike `re` it knows scripts and combining marks

    character = rf"[{UNSPACED}]\p{{M}}*"
    word = rf"{character}|[[\p{{L}}\p{{M}}\p{{N}}]--[{UNSPACED}]]+"
    return regex.compile(word, regex.V1), regex.compile(character, regex.V1)
