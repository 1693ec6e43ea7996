"""Preference tuning with TRL's DPOTrainer: its recipe, its trainer, and what is measured before and after."""

import copy
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_utils import SchedulerType
from trl import DPOConfig, DPOTrainer

from ..command_help import LENGTH_ALIASES, public
from ..data.instructions import encode_conversation, encode_prompt
from ..data.preferences import Preference
from ..evaluation.chat_client import Endpoint
from ..evaluation.continuations import Choices, log_likelihoods
from ..evaluation.judge import JudgedRow, judge
from ..prediction import batches_by_length, encode_prompts, respond
from .recipes import RecipeArguments
from .trainer import PushingTrainer


@dataclass
class PreferenceArguments(RecipeArguments, DPOConfig):
    """One epoch of Direct Preference Optimization (Rafailov et al. 2023, arXiv:2305.18290), with TRL's options."""

    num_train_epochs: float = 1
    learning_rate: float = 5e-6
    beta: float = field(default=0.1, metadata=public("How strongly the model is kept close to the initial model."))
    max_length: int | None = field(
        default=None,
        metadata=public(
            "Maximum tokens of a prompt and an answer; longer pairs are left out. By default n_positions.",
            LENGTH_ALIASES,
        ),
    )
    lr_scheduler_type: SchedulerType | str = "cosine"
    warmup_steps: float = 0.1
    max_grad_norm: float = 1.0
    per_device_train_batch_size: int = 8
    per_device_eval_batch_size: int = 8
    eval_steps: float | None = 0.2
    save_steps: float = 0.2
    save_total_limit: int | None = 2
    load_best_model_at_end: bool = True


def encode_pair(tokenizer: PreTrainedTokenizerBase, pair: Preference) -> Choices:
    """The ids of the prompt, and of the chosen and the rejected answer with the eos that ends each."""
    prompt = encode_prompt(tokenizer, pair.prompt)
    whole = (encode_conversation(tokenizer, one.messages, max_length=10**9) for one in (pair.chosen, pair.rejected))
    return prompt, [encoded["input_ids"][len(prompt) :] for encoded in whole]


def fitting_pairs(
    tokenizer: PreTrainedTokenizerBase, pairs: list[Preference], max_length: int
) -> tuple[list[Preference], list[Choices]]:
    """The pairs of which prompt and either answer have at most `max_length` tokens, and their ids: a cut answer would
    lose its end, which is a part of what is preferred."""
    fitting, encoded = [], []
    for pair in pairs:
        prompt, both = encode_pair(tokenizer, pair)
        if len(prompt) + max(map(len, both)) <= max_length:
            fitting.append(pair)
            encoded.append((prompt, both))
    return fitting, encoded


def as_dataset(pairs: list[Preference]) -> Dataset:
    """The pairs as TRL reads them; it renders them with the tokenizer's chat template, as `encode_pair` does."""
    rows = [
        {"prompt": pair.prompt, "chosen": pair.chosen.messages[-1:], "rejected": pair.rejected.messages[-1:]}
        for pair in pairs
    ]
    return Dataset.from_list(rows)


def answer_log_probabilities(model: PreTrainedModel, pairs: list[Choices], batch_size: int = 8) -> torch.Tensor:
    """(N, 2): log-probability of the chosen and of the rejected answer of each pair, in nats."""
    model = model.get_base_model() if hasattr(model, "get_base_model") else model  # the adapters are inside its layers
    scores: torch.Tensor = torch.empty(len(pairs), 2, dtype=torch.float64)
    for batch in log_likelihoods(model, pairs, batch_size):
        for number, values in batch:
            scores[number] = torch.tensor(values, dtype=torch.float64)
    return scores


def preference_metrics(scores: torch.Tensor, reference: torch.Tensor, beta: float) -> dict[str, float]:
    """Metrics of a model from the (N, 2) log-probabilities of `answer_log_probabilities`, of it and of the reference.

    `loss` is that of DPO. `accuracy` is the share of pairs whose chosen answer the model finds more probable than the
    rejected one, and `margin` the mean difference of both log-probabilities, in nats. `reward_accuracy` and
    `reward_margin` compare how much more probable each answer has become, as the loss does.
    """
    margins, before = scores[:, 0] - scores[:, 1], reference[:, 0] - reference[:, 1]
    rewards = beta * (margins - before)
    return {
        "loss": -F.logsigmoid(rewards).mean().item(),
        "accuracy": (margins > 0).double().mean().item(),
        "margin": margins.mean().item(),
        "reward_accuracy": (rewards > 0).double().mean().item(),
        "reward_margin": rewards.mean().item(),
    }


class PreferenceTrainer(PushingTrainer, DPOTrainer):
    """TRL's trainer, with the stops, the resuming and the pushing of `PushingTrainer`.

    An evaluation computes `preference_metrics` over exactly the pairs of `evaluated`, in any batches and on any number
    of processes; TRL averages the means of batches, which on several processes count some pairs twice. Every process
    computes all of them.

    Args:
        evaluated: ids of the pairs to evaluate on, from `fitting_pairs`.
    """

    def __init__(self, model: PreTrainedModel, args: PreferenceArguments, evaluated: list[Choices], **kwargs):
        reference = None if kwargs.get("peft_config") else copy.deepcopy(model)
        super().__init__(model, reference, args, **kwargs)
        self.evaluated = evaluated
        self.reference_scores: torch.Tensor | None = None

    def scores(self, pairs: list[Choices]) -> torch.Tensor:
        return answer_log_probabilities(self.model, pairs, self.args.per_device_eval_batch_size)

    def train(self, *args, **kwargs):
        self.reference_scores = self.scores(self.evaluated)  # also where a checkpoint is resumed: it is loaded later
        return super().train(*args, **kwargs)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval") -> dict[str, float]:
        if self.reference_scores is None:
            raise ValueError("There is no reference to compare with before the training begins.")
        measured = preference_metrics(self.scores(self.evaluated), self.reference_scores, self.args.beta)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in measured.items()}
        self.model.eval()  # TRL logs the metrics of the training with those of a model in training mode
        self.log(dict(metrics))
        control = self.control  # type: ignore[has-type]
        self.control = self.callback_handler.on_evaluate(self.args, self.state, control, metrics)
        return metrics

    def create_model_card(self, *args, **kwargs) -> None:
        """`hub.push` writes the card."""


def answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: list[Preference], max_new_tokens: int
) -> list[JudgedRow]:
    """What the model answers to the prompts that leave room for an answer, beside the chosen answers."""
    longest = model.config.n_positions - max_new_tokens
    fitting, prompts = encode_prompts(tokenizer, [pair.chosen for pair in pairs], longest)
    texts = {}
    for batch in batches_by_length([len(ids) for ids in prompts], 16):
        options = {"max_new_tokens": max_new_tokens, "do_sample": False}
        for row, response in zip(
            batch, respond(model, tokenizer, [prompts[row] for row in batch], **options), strict=True
        ):
            texts[row] = response.text
    return [JudgedRow(row.instruction, row.input, row.output, texts[number]) for number, row in enumerate(fitting)]


def win_rate(before: list[int | None], after: list[int | None]) -> tuple[float, int]:
    """The share of pairs of scores of which the second is higher, ties counted half, and the number of these pairs;
    those without both scores are left out. The share is nan if there is none."""
    both = [(b, a) for b, a in zip(before, after, strict=True) if b is not None and a is not None]
    wins = sum(1.0 if a > b else 0.5 if a == b else 0.0 for b, a in both)
    return (wins / len(both) if both else math.nan), len(both)


def judged(rows: list[JudgedRow], endpoint: Endpoint, file: Path) -> list[int | None]:
    """The judge's score of each row; `file` keeps its replies, and a resumed run does not ask for them again."""
    result = judge(rows, endpoint, file)
    return [result.scores.get(row) for row in range(1, len(rows) + 1)]
