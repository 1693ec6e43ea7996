"""Labels of texts, from a trained classifier."""

from collections.abc import Iterable

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .tokenization import check_text


@torch.no_grad()
def classify_text(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: str | Iterable[str], batch_size: int = 16
) -> list[dict[str, float]]:
    """The probability of every label for each text, by label name, the most probable first.

    Texts longer than `tokenizer.model_max_length` or the model's context are cut at the end, as in training.

    Raises ValueError for a text that is empty or not valid Unicode.
    """
    texts = [texts] if isinstance(texts, str) else list(texts)
    for number, text in enumerate(texts):
        if not check_text(text).strip():
            raise ValueError(f"Text {number} is empty; give at least one word to classify.")
    max_length = min(tokenizer.model_max_length, model.config.n_positions)
    was_training = model.training
    model.eval()
    results = []
    for start in range(0, len(texts), batch_size):
        batch = tokenizer(
            texts[start : start + batch_size],
            truncation=True,
            max_length=max_length,
            padding=True,
            split_special_tokens=True,
            return_tensors="pt",
        ).to(model.device)
        for probabilities in model(**batch, use_cache=False).logits.float().softmax(-1).tolist():
            named = ((model.config.id2label[i], probability) for i, probability in enumerate(probabilities))
            results.append(dict(sorted(named, key=lambda item: -item[1])))
    model.train(was_training)
    return results
