"""Training of classifiers with transformers' Trainer: rows, model, loss, and what is evaluated."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import SequentialSampler
from transformers import (
    AutoConfig,
    DataCollatorWithPadding,
    EarlyStoppingCallback,
    PreTrainedTokenizerBase,
    TrainingArguments,
)

from ..data.text_classification import PreparedClassification
from ..evaluation.metrics import classification_metrics
from ..heads_scratch_gpt2 import ScratchGPT2ForSequenceClassification
from .trainer import PushingTrainer
from .trunk_cache import TrainedTop, cache_trunk, collate_states


def check_labels(data: PreparedClassification) -> None:
    """Raise ValueError for less than two labels, and for one that the training rows never show."""
    if len(data.label_names) < 2:
        raise ValueError(f"All rows have the label {data.label_names}; a classifier needs at least two.")
    trained = {row["label"] for row in data.splits["train"]}
    for split, rows in data.splits.items():
        for row in rows:
            if row["label"] not in trained:
                raise ValueError(
                    f"The label {row['label']!r} is in the {split} rows but not in the training rows, so it cannot be "
                    "learnt; split the data anew or remove it."
                )


def load_classifier(
    name: str, label_names: list[str], tokenizer: PreTrainedTokenizerBase, dropout: float = 0.0
) -> ScratchGPT2ForSequenceClassification:
    """A checkpoint of any head in float32 with a head for `label_names`: its own where it has one, else a new one.

    `config.id2label` holds the names, in the order of the checkpoint's head if it has one.

    Raises ValueError where the checkpoint's head has other labels.
    """
    known = head_labels(name)
    if known is not None:
        if set(known) != set(label_names):
            theirs, ours = (", ".join(map(repr, names)) for names in (known, label_names))
            raise ValueError(
                f"{name} is a classifier for {theirs}, not for {ours}; start from a language model, or use data "
                "with its labels."
            )
        label_names = known
    return ScratchGPT2ForSequenceClassification.from_pretrained(
        name,
        dtype=torch.float32,
        num_labels=len(label_names),
        id2label=dict(enumerate(label_names)),
        label2id={label: number for number, label in enumerate(label_names)},
        problem_type="single_label_classification",
        pad_token_id=tokenizer.pad_token_id,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout),
    )


def head_labels(name: str) -> list[str] | None:
    """The labels of a classifier's head in the order of their ids; `None` for a checkpoint without such a head."""
    if os.path.exists(name) and not Path(name, "config.json").is_file():
        return None  # a format of others that knows language models only
    config = AutoConfig.from_pretrained(name)
    if not any(architecture.endswith("ForSequenceClassification") for architecture in config.architectures or []):
        return None
    return [config.id2label[number] for number in sorted(config.id2label)]


def encode_rows(
    rows: list[dict], tokenizer: PreTrainedTokenizerBase, label2id: dict[str, int], max_length: int
) -> tuple[list[dict], int]:
    """Rows of `text`, `input_ids` and `labels`, and how many texts were cut to their first `max_length` tokens."""
    texts = [row["text"] for row in rows]
    ids = tokenizer(texts, split_special_tokens=True, verbose=False)["input_ids"]
    encoded = [
        {"text": row["text"], "input_ids": row_ids[:max_length], "labels": label2id[row["label"]]}
        for row, row_ids in zip(rows, ids, strict=True)
    ]
    return encoded, sum(len(row_ids) > max_length for row_ids in ids)


def weighted_loss(class_weights: list[float] | None = None, label_smoothing: float = 0.0) -> Callable:
    """Cross-entropy for Trainer's `compute_loss_func`, each row times the weight of its class.

    The sum is divided by the number of rows of the whole step, so that accumulating gradients changes nothing. The
    weights of `class_weights` sum to the number of rows over the training data.
    """
    weight = None if class_weights is None else torch.tensor(class_weights)

    def compute_loss(outputs, labels, num_items_in_batch=None):
        logits = outputs.logits.float()
        class_weight = None if weight is None else weight.to(logits.device)
        total = F.cross_entropy(logits, labels, class_weight, reduction="sum", label_smoothing=label_smoothing)
        return total / (len(labels) if num_items_in_batch is None else num_items_in_batch)

    return compute_loss


class ClassificationTrainer(PushingTrainer):
    """Trainer that evaluates on the validation rows and, for the curves, on as many training rows.

    The latter are logged as `train_sample_loss` and `train_sample_accuracy`. `test_rows` are for `predict`.

    Args:
        model: a classifier (also with adapters), or `TrainedTop`.
        splits: the rows of `train`, `validation` and `test`, from `encode_rows` or `cache_trunk`.
        patience: stop when the best validation loss is so many epochs old; 0: never.
    """

    def __init__(
        self,
        model,
        args: TrainingArguments,
        tokenizer: PreTrainedTokenizerBase,
        splits: dict,
        class_weights: list[float] | None = None,
        patience: int = 0,
    ):
        args.label_names = ["labels"]  # Trainer does not find them in a model that PEFT has wrapped
        self.label_names_by_id = [model.config.id2label[i] for i in range(model.config.num_labels)]
        super().__init__(
            model,
            args,
            data_collator=collate_states if isinstance(model, TrainedTop) else DataCollatorWithPadding(tokenizer),
            train_dataset=splits["train"],
            eval_dataset=splits["validation"],
            processing_class=tokenizer,
            compute_loss_func=weighted_loss(class_weights, args.label_smoothing_factor),
            compute_metrics=self.rates,
            callbacks=[EarlyStoppingCallback(patience)] if patience else None,
        )
        self.test_rows = splits["test"]
        size = min(len(splits["train"]), len(splits["validation"]))
        sample = [splits["train"][i * len(splits["train"]) // size] for i in range(size)]
        self.train_sample = sorted(sample, key=lambda row: -len(row["input_ids"]))

    def rates(self, prediction) -> dict[str, float]:
        """What `classification_metrics` says in one number each."""
        metrics = classification_metrics(
            prediction.predictions.argmax(-1),
            prediction.label_ids,
            prediction.predictions,
            label_names=self.label_names_by_id,
        )
        return {name: value for name, value in metrics.items() if isinstance(value, float)}

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval") -> dict[str, float]:
        if eval_dataset is None:
            metrics = self.predict(self.train_sample, ignore_keys, metric_key_prefix="train_sample").metrics
            should_log = self.control.should_log
            self.log({name: metrics[name] for name in ("train_sample_loss", "train_sample_accuracy")})
            self.control.should_log = should_log
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def _get_eval_sampler(self, eval_dataset):
        """Grouped by length, `predict` would return the rows in another order than they were given."""
        return SequentialSampler(eval_dataset) if self.args.world_size <= 1 else None


def make_trainer(
    model,
    args: TrainingArguments,
    tokenizer: PreTrainedTokenizerBase,
    splits: dict[str, list[dict]],
    cached_part: str | None = None,
    cache_folder: str | os.PathLike | None = None,
    **options,
) -> ClassificationTrainer:
    """A trainer of the whole `model`, or with `cached_part` (`head` or `last_block`, as `train_only` got it) of that
    part on hidden states kept in `cache_folder`. The trained weights are those of `model` in either case.

    Evaluation takes the longest rows first, so that little is padded. `options` are those of `ClassificationTrainer`.
    """
    splits = {
        name: rows if name == "train" else sorted(rows, key=lambda row: -len(row["input_ids"]))
        for name, rows in splits.items()
    }
    if cached_part is not None:
        model.to(args.device)
        with args.main_process_first(desc="hidden states of the frozen blocks"):
            splits = cache_trunk(model, cached_part, splits, cache_folder)  # type: ignore[arg-type, assignment]
        model = TrainedTop(model, cached_part)
    return ClassificationTrainer(model, args, tokenizer, splits, **options)


def confident_mistakes(rows: list[dict], logits: np.ndarray, count: int = 10) -> list[tuple[int, int, float]]:
    """(row, predicted label id, its probability) of the wrong predictions, the most confident first."""
    probabilities = torch.from_numpy(logits).float().softmax(-1)
    confidence, predicted = probabilities.max(-1)
    wrong = [i for i, row in enumerate(rows) if row["labels"] != predicted[i]]
    wrong.sort(key=lambda i: -confidence[i])
    return [(i, predicted[i].item(), confidence[i].item()) for i in wrong[:count]]
