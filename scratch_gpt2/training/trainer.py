"""The Trainer that pretraining, classification and instruction tuning share.

It stops at a loss that is not finite and at Ctrl-C, resumes with a changed learning rate, and pushes a run in one
commit. `LanguageModelTrainer` adds the losses of language models.
"""

import logging
import re
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub import CommitInfo
from transformers import EvalPrediction, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import HubStrategy, IntervalStrategy, SaveStrategy

from ..cli import Stopped
from ..files import is_disk_full
from ..hub.push import check_pushed, hub_errors_explained, push
from ..hub.run_record import record_run
from ..linear_cross_entropy import IGNORE_INDEX
from .checkpoints import find_fault, list_checkpoints, step_of
from .start import check_push


class PushingTrainer(Trainer):
    """Trainer that takes no step too many, saves nothing that is broken, and pushes as `hub.push` does.

    - A loss or weight that is not finite raises ValueError before anything is saved.
    - Ctrl-C or SIGTERM ends the training after the current step with a checkpoint, unless `save_strategy` is no, and
      raises `Stopped`. A second Ctrl-C ends it at once.
    - Resuming applies a changed `learning_rate`, schedule, `weight_decay`, `save_steps`, `eval_steps` and
      `logging_steps` from its first step on; Trainer restores those of the checkpoint.
    - `train_loss` is the mean over all steps of the run, also after resuming.
    - `save_model` does not push; call `push_to_hub` when everything is in the output folder. Trainer itself would push
      the whole output folder, with token shards, test rows and training_args.bin, in several commits.

    Attributes:
        run: the arguments of `record_run` except the metrics, for the card of a checkpoint.
    """

    run: dict | None = None

    def train(self, *args, **kwargs):
        stop = StopCallback(self.args)
        self.add_callback(stop)
        try:
            with stop.signals_caught():
                output = super().train(*args, **kwargs)
        finally:
            self.remove_callback(stop)
        if stop.signal_number is not None:
            raise Stopped(stop.signal_number, how_to_continue(self))
        return output

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not self._all_processes(torch.isfinite(loss)):
            raise ValueError(
                f"The loss is {loss.item():g} in step {self.state.global_step + 1} with learning_rate "
                f"{self.args.learning_rate:g}: training has diverged. {last_good_checkpoint(self)}"
            )
        return loss

    def _all_processes(self, condition: torch.Tensor) -> bool:
        """Whether `condition`, a boolean, holds in every process; otherwise they would wait for each other."""
        if self.args.world_size == 1:
            return bool(condition)
        return int(self.accelerator.reduce((~condition).int().to(self.args.device), "sum")) == 0

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "train_loss" in logs:
            logs["train_loss"] = self._mean_training_loss()
        super().log(logs, start_time)

    def _mean_training_loss(self) -> float:
        total, last = 0.0, 0
        for entry in self.state.log_history:
            if "loss" in entry:
                total += entry["loss"] * (entry["step"] - last)
                last = entry["step"]
        unlogged = self.state.global_step - self._globalstep_last_logged
        return (total + (self._tr_loss.item() if unlogged else 0.0)) / max(last + unlogged, 1)

    def _maybe_log_save_evaluate(self, *args, **kwargs) -> None:
        """A checkpoint has the losses that were logged, so they are logged before one is saved."""
        may_save = self.control.should_save or self.control.should_evaluate
        if may_save and self.args.logging_strategy != IntervalStrategy.NO:
            self.control.should_log = True
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _init_training_state(self, max_steps: int, *args, **kwargs) -> tuple[int, int]:
        """Trainer goes on with the `save_steps`, `eval_steps` and `logging_steps` of the checkpoint, and warns."""
        with without_warning("transformers.trainer_utils", "arguments do not match"):
            state = super()._init_training_state(max_steps, *args, **kwargs)
        self.state.compute_steps(self.args, max_steps)
        return state

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or not hasattr(self.lr_scheduler, "lr_lambdas"):
            return
        rate = self.args.learning_rate
        for i, group in enumerate(self.optimizer.param_groups):
            factor = self.lr_scheduler.lr_lambdas[i](self.lr_scheduler.last_epoch)
            group["initial_lr"] = self.lr_scheduler.base_lrs[i] = rate
            group["lr"] = self.lr_scheduler._last_lr[i] = rate * factor
            if group["weight_decay"] > 0:
                group["weight_decay"] = self.args.weight_decay

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        """Raises ValueError for `polynomial` without a step after the warm-up, where the library divides by 0."""
        warmup = self.args.get_warmup_steps(num_training_steps)
        if self.args.lr_scheduler_type == "polynomial" and warmup >= num_training_steps:
            raise ValueError(
                f"lr_scheduler_type polynomial needs more steps than the {warmup} of its warm-up, but the run has "
                f"{num_training_steps}; set warmup_steps to 0."
            )
        return super().create_scheduler(num_training_steps, optimizer)

    def _issue_warnings_after_load(self, load_result) -> None:
        """A tied head has no weights of its own in a checkpoint, which is no reason to warn."""
        tied = set(getattr(self.model, "_tied_weights_keys", None) or ())
        if (
            load_result.missing_keys
            and set(load_result.missing_keys) <= tied
            and self.model.config.tie_word_embeddings
        ):
            self.model.tie_weights()
            load_result = load_result._replace(missing_keys=[])
        super()._issue_warnings_after_load(load_result)

    def _run_epoch(self, **kwargs) -> None:
        """Trainer (5.23) takes one step more where a finished run is resumed, say, because its end was not saved."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(**kwargs)

    def _get_dataloader(
        self, dataset, description, batch_size, sampler_fn=None, is_training=False, dataloader_key=None
    ):
        """`--dataloader_drop_last` is for training steps: an evaluation reads every row."""
        drop_last = self.args.dataloader_drop_last
        self.args.dataloader_drop_last = drop_last and is_training
        try:
            return super()._get_dataloader(dataset, description, batch_size, sampler_fn, is_training, dataloader_key)
        finally:
            self.args.dataloader_drop_last = drop_last

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        check_push(self.args)
        with hub_errors_explained(str(self.args.hub_model_id)):
            super().init_hf_repo(token, private)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        finite = [torch.isfinite(local(weight)).all() for weight in self.model.parameters() if weight.requires_grad]
        if not self._all_processes(torch.stack([one.to(self.args.device) for one in finite]).all()):
            raise ValueError(
                f"The weights are not finite after step {self.state.global_step} with learning_rate "
                f"{self.args.learning_rate:g}: training has diverged. {last_good_checkpoint(self)}"
            )
        super().save_model(output_dir, _internal_call=True)

    def _save_checkpoint(self, model, trial) -> None:
        """On a full disk, what has been written of the checkpoint is removed, so that the run can be resumed from the
        one before."""
        folder = Path(str(self.args.output_dir), f"checkpoint-{self.state.global_step}")
        try:
            with without_warning("transformers.trainer_utils", "mtime may not be reliable"):  # of quick steps
                super()._save_checkpoint(model, trial)
        except Exception as error:
            if not is_disk_full(error):
                raise
            shutil.rmtree(folder, ignore_errors=True)
            raise OSError(
                f"There is no space left on the disk of {folder}; free some, and run the same command with --resume."
            ) from error

    def push_to_hub(self, commit_message: str | None = "End of training", **kwargs) -> CommitInfo | None:
        """Push the output folder, and check the pushed model. For runs with `--push_to_hub`."""
        if not self.is_world_process_zero():
            return None
        folder, destination = str(self.args.output_dir), str(self.hub_model_id)
        try:
            commit = push(folder, destination, message=commit_message or "End of training")
        except OSError as error:
            later = f"python examples/push_to_hub.py --folder {folder} --repo_id {destination}"
            raise OSError(f"{str(error).removesuffix('.')}: {later}") from error
        difference = check_pushed(folder, destination, commit.oid)
        print(f"\npushed {commit.commit_url}, loaded from there: outputs differ by {difference:g}")
        return commit

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """A checkpoint that cannot be pushed does not end the training."""
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        step = self.state.global_step
        try:
            if self.run is not None:
                record_run(checkpoint_folder, **self.run, metrics=metrics_of_step(self.state.log_history, step))
            push(checkpoint_folder, str(self.hub_model_id), message=f"Training in progress, step {step}")
        except (OSError, ValueError) as error:
            print(f"\nnot pushed at step {step}: {error}", file=sys.stderr)

    def _finish_current_push(self) -> None:
        """Nothing is pushed in the background."""


@contextmanager
def without_warning(logger: str, part: str) -> Iterator[None]:
    """Keep a library from logging messages with this part, which have nothing to tell to the user."""

    def matters(record: logging.LogRecord) -> bool:
        return part not in record.getMessage()

    logging.getLogger(logger).addFilter(matters)
    try:
        yield
    finally:
        logging.getLogger(logger).removeFilter(matters)


def metrics_of_step(history: list[dict], step: int) -> dict[str, float]:
    """What Trainer has measured on the validation data at `step`, by the names of the Hub, without its speed."""
    metrics: dict[str, float] = {}
    for entry in history:
        if entry["step"] == step and "eval_loss" in entry:
            metrics |= {name.removeprefix("eval_"): entry[name] for name in entry if name.startswith("eval_")}
    return {name: value for name, value in metrics.items() if not re.search("runtime|per_second|time$", name)}


def local(weight: torch.Tensor) -> torch.Tensor:
    """The part of a sharded weight that this process holds."""
    return weight.to_local() if hasattr(weight, "to_local") else weight


def last_good_checkpoint(trainer: Trainer) -> str:
    """What to do after a divergence. A checkpoint of the present step has the weights that diverged."""
    folder, step = str(trainer.args.output_dir), trainer.state.global_step
    good = [path for path in list_checkpoints(folder) if step_of(path) < step and find_fault(path) is None]
    if not good:
        return "Nothing was saved; begin again with a lower learning_rate."
    best = max(good, key=step_of)
    remedy = f"The last good checkpoint is {best}: continue with --resume and a lower learning_rate"
    bad = Path(folder, f"checkpoint-{step}")
    return f"{remedy}, after deleting {bad}." if bad.is_dir() else f"{remedy}."


def how_to_continue(trainer: Trainer) -> str:
    state = trainer.state
    progress = f"stopped at step {state.global_step} of {state.max_steps}"
    if Path(str(trainer.args.output_dir), f"checkpoint-{state.global_step}").is_dir():
        return f"{progress}; add --resume to the same command to continue"
    return f"{progress}; nothing was saved, because save_strategy is no"


class StopCallback(TrainerCallback):
    """Stops the training after a signal, at the same step in every process.

    Attributes:
        signal_number: of the signal that ended the training; `None` without one.
    """

    def __init__(self, args: TrainingArguments):
        self.world_size = args.world_size
        self.received: int | None = None
        self.signal_number: int | None = None
        self.device = args.device

    @contextmanager
    def signals_caught(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

        def receive(number: int, frame) -> None:
            self.received = number
            print("\nstopping after this step; press Ctrl-C again to stop at once", file=sys.stderr, flush=True)
            signal.signal(number, handlers[signal.Signals(number)])

        for number in handlers:
            signal.signal(number, receive)
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def on_step_end(self, args, state, control, **kwargs):
        received = self.received or 0
        if self.world_size > 1:
            shared = torch.tensor(received, device=self.device)
            torch.distributed.all_reduce(shared, op=torch.distributed.ReduceOp.MAX)
            received = int(shared)
        if received and state.global_step < state.max_steps:
            self.signal_number = received
            control.should_training_stop = True
            control.should_evaluate = False
            control.should_save = args.save_strategy != SaveStrategy.NO

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.signal_number is not None:  # the epoch has not ended
            control.should_evaluate = control.should_save = False


class LanguageModelTrainer(PushingTrainer):
    """`PushingTrainer` for language models.

    `eval_loss` is the mean over all labeled tokens, in any batches and on any number of processes. Trainer itself
    averages the means of the batches, which weights a token by how few others its batch has, and counts the rows that
    fill up the last batches of several processes twice. It is the loss without label smoothing, as is the perplexity.

    Label smoothing in training compares each position with the token after it. Trainer itself, which knows the shift
    of its own classes only, would teach the model to copy its input.
    """

    def __init__(self, model, args: TrainingArguments, **kwargs):
        if args.label_smoothing_factor:
            kwargs["compute_loss_func"] = smoothed_loss(args.label_smoothing_factor)
        super().__init__(model, args, compute_metrics=self.mean_over_tokens, **kwargs)
        self.evaluated_loss = self.evaluated_tokens = 0.0

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Return the summed loss of the batch as the "prediction" of its first row, (B,), and its number of labeled
        tokens as the label."""
        inputs = self._prepare_inputs(inputs)
        labels = inputs["labels"] = inputs["labels"].clone()  # (B, T)
        state = self.accelerator.gradient_state
        if state.end_of_dataloader and state.remainder > 0:
            own = state.remainder - self.args.process_index * len(labels)
            labels[max(own, 0) :] = IGNORE_INDEX  # rows that fill up the batch
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = model(**inputs, num_items_in_batch=1, skip_logits=True).loss
        sums, tokens = torch.zeros(2, len(labels), device=labels.device)
        sums[0], tokens[0] = loss, (labels[:, 1:] != IGNORE_INDEX).sum()
        return None, sums, tokens

    def mean_over_tokens(self, prediction: EvalPrediction, compute_result: bool = True) -> dict[str, float]:
        """The loss of `prediction_step`'s batches, all at once or, with `batch_eval_metrics`, one after the other."""
        self.evaluated_loss += total(prediction.predictions)
        self.evaluated_tokens += total(prediction.label_ids)
        if not compute_result:
            return {}
        loss = self.evaluated_loss / self.evaluated_tokens if self.evaluated_tokens else float("nan")
        self.evaluated_loss = self.evaluated_tokens = 0.0
        return {"loss": loss}


def total(values) -> float:
    """The sum of an array or tensor, or of a list of them, in double precision."""
    parts = values if isinstance(values, list) else [values]
    return float(
        sum(np.asarray(part.cpu() if torch.is_tensor(part) else part).sum(dtype=np.float64) for part in parts)
    )


def smoothed_loss(factor: float) -> Callable:
    """Cross-entropy with label smoothing for a causal language model, as Trainer's `compute_loss_func`."""

    def compute_loss(outputs, labels: torch.Tensor, num_items_in_batch=None) -> torch.Tensor:
        logits = outputs.logits[:, :-1].float()  # (B, T - 1, V)
        targets = labels[:, 1:].to(logits.device)
        summed = F.cross_entropy(
            logits.flatten(0, 1),
            targets.flatten(),
            ignore_index=IGNORE_INDEX,
            reduction="sum",
            label_smoothing=factor,
        )
        items = (targets != IGNORE_INDEX).sum() if num_items_in_batch is None else num_items_in_batch
        return summed / items

    return compute_loss
