"""Answers of a causal language model to instructions, and how near they are to the reference answers."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from .. import ScratchGPT2ForCausalLM
from ..data.collators import PaddingCollator, Row
from ..data.instructions import Conversation, encode_prompt, render
from ..linear_cross_entropy import IGNORE_INDEX
from ..prediction import batches_by_length
from ..tokenization import load_tokenizer
from .models import load_causal_lm


@dataclass(frozen=True)
class ReferenceLoss:
    """`loss` is the mean over `tokens`, in nats, `perplexity` its exponential; `too_long` rows were left out."""

    loss: float
    perplexity: float
    tokens: int
    too_long: int


def load_model(name: str) -> PreTrainedModel:
    """Any causal language model: a folder or Hub id of ours or of transformers, nanoGPT's file, an adapter's folder.

    GPT-2 checkpoints of any origin become our model, except under an adapter that was trained on transformers' own.
    """
    adapter = adapter_config(name)
    if adapter is None:
        return load_causal_lm(name).eval()
    from peft import PeftModel

    base, targets = adapter["base_model_name_or_path"], str(adapter.get("target_modules"))
    if any(layer in targets for layer in ("c_attn", "c_proj", "c_fc")):
        return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), name).eval()
    return PeftModel.from_pretrained(load_model(base), name).eval()


def load_tokenizer_of(model_name: str) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model; for an adapter without one, that of its base."""
    adapter = adapter_config(model_name)
    if adapter is not None and not Path(model_name, "tokenizer.json").is_file():
        return load_tokenizer(adapter["base_model_name_or_path"])
    return load_tokenizer(model_name)


def adapter_config(name: str) -> dict | None:
    file = Path(name, "adapter_config.json")
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


@torch.no_grad()
def reference_loss(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, conversations: list[Conversation], batch_size: int = 8
) -> ReferenceLoss:
    """How likely the model finds the last answer of each conversation, up to and with the token that ends it.

    Every token counts the same. Conversations longer than the model's positions are left out.

    Raises ValueError where the prompt is not the beginning of the conversation in this chat template, and where all
    conversations are too long.
    """
    rows = [encode_reference(tokenizer, conversation) for conversation in conversations]
    positions = getattr(model.config, "max_position_embeddings", None) or math.inf
    fitting = [row for row in rows if len(row["input_ids"]) <= positions]
    if not fitting:
        raise ValueError(f"All {len(rows)} conversations are longer than the model's {positions} positions.")
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    own_loss = {"skip_logits": True} if isinstance(base, ScratchGPT2ForCausalLM) else {}
    collate = PaddingCollator(tokenizer.pad_token_id)

    total, tokens = 0.0, 0
    batches = batches_by_length([len(row["input_ids"]) for row in fitting], batch_size)
    for batch in tqdm(batches, desc="Reading the references", leave=False, disable=None):
        inputs = collate([fitting[row] for row in batch])
        scored = int((inputs["labels"][:, 1:] != IGNORE_INDEX).sum())
        inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
        loss = model(**inputs, use_cache=False, **own_loss).loss
        total, tokens = total + loss.item() * scored, tokens + scored  # the loss is a mean; a Python float is float64
    loss = total / tokens
    return ReferenceLoss(loss, math.exp(loss), tokens, too_long=len(rows) - len(fitting))


def encode_reference(tokenizer: PreTrainedTokenizerBase, conversation: Conversation) -> Row:
    """Unlike `encode_conversation` it does without {% generation %} marks, which few other models' templates have."""
    try:
        prompt = encode_prompt(tokenizer, conversation.prompt)
        ids = render(tokenizer, conversation.messages)["input_ids"]
    except ValueError as error:
        raise ValueError(f"{conversation.origin}: {error}") from error
    start = len(prompt)
    if ids[:start] != prompt or len(ids) == start:
        raise ValueError(f"{conversation.origin}: in this chat template the answer does not follow its prompt.")
    if tokenizer.eos_token_id in ids[start:]:
        ids = ids[: ids.index(tokenizer.eos_token_id, start) + 1]  # some templates write a line break after it
    return {"input_ids": ids, "labels": [IGNORE_INDEX] * start + ids[start:]}


def reference_metrics(responses: list[str], references: list[str]) -> dict[str, float]:
    """`rouge_l`, `bleu` and `exact_match`, each from 0 to 100; white space around a text does not count.

    ROUGE-L (Lin 2004) is the mean over the rows of the F1 of the longest common subsequence of words, by Google's
    rouge_score without stemming, as `evaluate.load("rouge")` has it: lower case, and only a-z and 0-9 make words.
    BLEU (Papineni et al. 2002) is that of the whole set, by sacrebleu with its defaults.

    Raises ImportError without these packages, ValueError without rows.
    """
    try:
        import sacrebleu
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise ImportError("Reference metrics need two packages: pip install rouge_score sacrebleu.") from error

    if not responses:
        raise ValueError("There are no responses to compare with references.")
    responses, references = ([text.strip() for text in texts] for texts in (responses, references))
    pairs = list(zip(references, responses, strict=True))
    scorer = RougeScorer(["rougeL"])
    rouge = sum(scorer.score(reference, response)["rougeL"].fmeasure for reference, response in pairs)
    return {
        "rouge_l": 100 * rouge / len(pairs),
        "bleu": sacrebleu.corpus_bleu(responses, [references]).score,
        "exact_match": 100 * sum(reference == response for reference, response in pairs) / len(pairs),
    }
