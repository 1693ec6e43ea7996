"""Training of classifiers with transformers' Trainer: rows, model, loss, and what is evaluated."""

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.data import SequentialSampler
from transformers import (
    AutoConfig,
    DataCollatorWithPadding,
    EarlyStoppingCallback,
    EvalPrediction,
    PreTrainedTokenizerBase,
    TrainingArguments,
)
from transformers.modeling_outputs import SequenceClassifierOutput

from ..checkpoint_files import is_foreign_checkpoint
from ..configuration_scratch_gpt2 import ScratchGPT2Config
from ..data.text_classification import PreparedClassification, class_weights
from ..evaluation.models import check_finite, find_revision, is_classifier
from ..heads_scratch_gpt2 import ScratchGPT2ForSequenceClassification
from ..tokenization import encode_texts
from .trainer import PushingTrainer, without_warning
from .trunk_cache import TrainedTop, cache_trunk, collate_states


def check_labels(data: PreparedClassification) -> None:
    """Raise ValueError for fewer than two labels, rows with several labels, and a label without training rows."""
    for split, rows in data.splits.items():
        for number, row in enumerate(rows, start=1):
            if not isinstance(row["label"], str):
                raise ValueError(
                    f"Row {number} of the {split} rows has the label {row['label']!r}; each row needs one label, a "
                    "string. Data with several labels per row cannot be used here."
                )
    if len(data.label_names) < 2:
        raise ValueError(f"All rows have the label {data.label_names}; a classifier needs at least two.")
    trained = {row["label"] for row in data.splits["train"]}
    for split, rows in data.splits.items():
        for row in rows:
            if row["label"] not in trained:
                raise ValueError(
                    f"The label {row['label']!r} is in the {split} rows but not in the training rows, so it cannot be "
                    "learned; split the data again or remove it."
                )


def load_classifier(
    name: str, label_names: list[str], tokenizer: PreTrainedTokenizerBase, dropout: float = 0.0
) -> ScratchGPT2ForSequenceClassification:
    """Load a checkpoint of any head in float32 with a head for `label_names`: its own if it has one, else a new one.

    `config.id2label` holds the names, in the order of the checkpoint's head if it has one.

    Raises ValueError if the checkpoint's head has other labels.
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
    options = {
        "id2label": dict(enumerate(label_names)),
        "label2id": {label: number for number, label in enumerate(label_names)},
        "problem_type": "single_label_classification",
        "pad_token_id": tokenizer.pad_token_id,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout),
    }
    with without_warning("transformers.modeling_utils", "LOAD REPORT"):  # of a new head; gaps raise errors
        model = ScratchGPT2ForSequenceClassification.from_pretrained(
            name, dtype=torch.float32, num_labels=len(label_names), **options
        )
    check_finite(model, name)
    if len(tokenizer) > model.config.vocab_size:
        raise ValueError(
            f"The tokenizer has {len(tokenizer)} tokens but the model's vocab_size is {model.config.vocab_size}; use "
            "the tokenizer that the model was trained with."
        )
    return model


def fit_tokenizer(tokenizer: PreTrainedTokenizerBase, model: ScratchGPT2ForSequenceClassification) -> None:
    """Let the tokenizer that is saved beside the model encode as `encode_texts` does, also in `pipeline`."""
    tokenizer.model_max_length = model.config.n_positions
    tokenizer.init_kwargs["split_special_tokens"] = tokenizer.split_special_tokens = True


def head_labels(name: str) -> list[str] | None:
    """The labels of a classifier's head in the order of their ids; `None` for a checkpoint without such a head.

    Raises FileNotFoundError for a checkpoint that is neither local nor on the Hub.
    """
    hub = find_revision(name)
    if is_classifier(name, hub):
        config = AutoConfig.from_pretrained(name, **hub)
        return [config.id2label[number] for number in sorted(config.id2label)]
    is_foreign_checkpoint(name, hub)  # raises where there is none at all
    return None


def encode_rows(
    rows: list[dict], tokenizer: PreTrainedTokenizerBase, label2id: dict[str, int], max_length: int
) -> tuple[list[dict], int]:
    """Rows of `text`, `input_ids` and `labels`, and how many texts were cut to their first `max_length` tokens."""
    ids, cut = encode_texts(tokenizer, [row["text"] for row in rows], max_length=max_length)
    encoded = [
        {"text": row["text"], "input_ids": row_ids, "labels": label2id[row["label"]]}
        for row, row_ids in zip(rows, ids, strict=True)
    ]
    return encoded, cut


def encode_splits(
    data: PreparedClassification,
    tokenizer: PreTrainedTokenizerBase,
    config: ScratchGPT2Config,
    max_length: int | None = None,
) -> tuple[dict[str, list[dict]], str]:
    """The rows of all splits, and a sentence that says how many texts were cut.

    Training texts are cut to `max_length` tokens, by default to `config.n_positions`. The others are cut only to
    `config.n_positions`, as texts are that the trained model classifies.

    Raises ValueError for a `max_length` that is not from 1 to `config.n_positions`.
    """
    positions = config.n_positions
    if max_length is not None and not 1 <= max_length <= positions:
        raise ValueError(f"max_length is {max_length}, but the model reads 1 to {positions} tokens (n_positions).")
    limits = dict.fromkeys(data.splits, positions) | {"train": max_length or positions}
    encoded = {
        name: encode_rows(rows, tokenizer, config.label2id, max_length=limits[name])
        for name, rows in data.splits.items()
    }
    counts: dict[int, list[int]] = {}  # by limit, how many texts were cut and how many there are
    for name, (rows, cut) in encoded.items():
        before = counts.setdefault(limits[name], [0, 0])
        counts[limits[name]] = [before[0] + cut, before[1] + len(rows)]
    said = [
        f"{cut:,} of {all_:,} texts were cut to their first {limit} tokens" for limit, (cut, all_) in counts.items()
    ]
    return {name: rows for name, (rows, _) in encoded.items()}, ", ".join(said)


def label_weights(rows: list[dict], label_names: list[str]) -> list[float]:
    """`class_weights` of the rows' labels, in the order of `label_names`."""
    labels = [row["label"] for row in rows]
    by_name = dict(zip(sorted(set(labels)), class_weights(labels), strict=True))
    return [by_name[name] for name in label_names]


def positive_label(rows: list[dict], label_names: list[str], wanted: str | None = None) -> str | None:
    """The label of precision, recall and F1: `wanted`, by default the rarer of two labels. `None` for more than two
    labels: the metrics are then means over the labels.

    Raises ValueError for an unknown `wanted`, and for one of more than two labels.
    """
    if wanted is not None and wanted not in label_names:
        raise ValueError(f"The positive label {wanted!r} is not one of {', '.join(map(repr, label_names))}.")
    if len(label_names) > 2:
        if wanted is not None:
            raise ValueError(f"There are {len(label_names)} labels, but only one of two can be the positive label.")
        return None
    counts = Counter(row["label"] for row in rows)
    return wanted or min(reversed(label_names), key=lambda name: counts[name])


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

    The latter are logged as `train_sample_loss` and `train_sample_accuracy`. `test_rows` are for `predict`. Every loss
    is the training objective, with class weights and label smoothing, over exactly the rows that were asked for, in
    any batches and on any number of processes.

    Args:
        model: a classifier (also with adapters), or `TrainedTop`.
        splits: the rows of `train`, `validation` and `test`, from `encode_rows` or `cache_trunk`.
        patience: stop when the best evaluation is this many evaluations old; 0, or `eval_strategy` no: never.
        positive: the label of precision, recall and F1, from `positive_label`.
    """

    def __init__(
        self,
        model,
        args: TrainingArguments,
        tokenizer: PreTrainedTokenizerBase,
        splits: dict,
        class_weights: list[float] | None = None,
        patience: int = 0,
        positive: str | None = None,
    ):
        args.label_names = ["labels"]  # Trainer does not find them in a model that PEFT has wrapped
        self.label_names_by_id = [model.config.id2label[i] for i in range(model.config.num_labels)]
        self.positive = positive
        super().__init__(
            model,
            args,
            data_collator=collate_states if isinstance(model, TrainedTop) else DataCollatorWithPadding(tokenizer),
            train_dataset=splits["train"],
            eval_dataset=splits["validation"],
            processing_class=tokenizer,
            compute_loss_func=weighted_loss(class_weights, args.label_smoothing_factor),
            compute_metrics=self.measure,
            callbacks=[EarlyStoppingCallback(patience)] if patience and args.eval_strategy != "no" else None,
        )
        self.test_rows = splits["test"]
        size = min(len(splits["train"]), len(splits["validation"]))
        sample = [splits["train"][i * len(splits["train"]) // size] for i in range(size)]
        self.train_sample = sorted(sample, key=lambda row: -len(row["input_ids"]))

    def measure(self, prediction: EvalPrediction) -> dict[str, float]:
        """The loss, and the metrics of `classification_metrics` that are one number."""
        from ..evaluation.metrics import classification_metrics  # takes seconds to import

        logits, labels = prediction.predictions, prediction.label_ids
        names, positive = self.label_names_by_id, self.positive
        metrics = classification_metrics(logits.argmax(-1), labels, logits, label_names=names, positive=positive)
        output = SequenceClassifierOutput(logits=torch.from_numpy(logits))  # type: ignore[arg-type]
        metrics["loss"] = self.compute_loss_func(output, torch.from_numpy(labels)).item()  # type: ignore[misc]
        return {name: value for name, value in metrics.items() if isinstance(value, float)}

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Without the batch's loss: Trainer's mean of these counts twice the rows that fill up the last batches of
        several processes. `measure` has the loss of the rows themselves."""
        _, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        return None, logits, labels

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval") -> dict[str, float]:
        if eval_dataset is None:
            metrics = self.predict(self.train_sample, ignore_keys, metric_key_prefix="train_sample").metrics
            should_log = self.control.should_log
            self.log({name: metrics[name] for name in ("train_sample_loss", "train_sample_accuracy")})
            self.control.should_log = should_log
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def validation_loss(self) -> float:
        """Validation loss of the model as it is after the training, evaluated now only if it has not been before."""
        step, best = self.state.global_step, self.state.best_model_checkpoint
        if self.args.load_best_model_at_end and best is not None:
            step = int(Path(best).name.removeprefix("checkpoint-"))
        if step not in evaluated_losses(self.state.log_history):
            self.evaluate()
            step = self.state.global_step
        return evaluated_losses(self.state.log_history)[step]

    def _get_eval_sampler(self, eval_dataset):
        """Grouped by length, `predict` would return the rows in another order than they were given."""
        return SequentialSampler(eval_dataset) if self.args.world_size <= 1 else None


def evaluated_losses(history: list[dict]) -> dict[int, float]:
    return {entry["step"]: entry["eval_loss"] for entry in history if "eval_loss" in entry}


def make_trainer(
    model,
    args: TrainingArguments,
    tokenizer: PreTrainedTokenizerBase,
    splits: dict[str, list[dict]],
    cached_part: str | None = None,
    cache_folder: str | os.PathLike | None = None,
    **options,
) -> ClassificationTrainer:
    """A trainer of the whole `model`, or with `cached_part` (`head` or `last_block`, as given to `train_only`) of that
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
