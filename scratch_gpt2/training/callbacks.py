"""What a training run shows while it runs: speed, samples, a log and plots beside the checkpoints."""

import importlib.util
import json
import logging
import time
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase, ProgressCallback, Trainer, TrainerCallback

from ..evaluation.hellaswag import Example, check_fits, encode_example, score_examples, summarize
from ..files import write_atomically
from ..prediction import evaluation_mode
from .plots import plot_log

logger = logging.getLogger(__name__)


def flops_per_token(config, length: int) -> int:
    """Floating point operations of training on one token, in rows of `length` tokens.

    6 for every weight of a matrix that the token passes (multiply and add, forward once and backward twice), including
    the output layer, and 12 * n_layer * n_embd * length for the attention scores and weighted sums. The masked half of
    the attention counts; recomputation does not (Chowdhery et al. 2022, "PaLM", appendix B).
    """
    matrices = config.matrix_parameters + config.vocab_size * config.n_embd
    return 6 * matrices + 12 * config.n_layer * config.n_embd * length


class SpeedCallback(TrainerCallback):
    """Counts the seconds spent in training steps; evaluation, saving and sampling are left out."""

    def __init__(self):
        self.seconds = 0.0
        self.steps = 0
        self.restart()

    def restart(self) -> None:
        """Leave out the time since the last step."""
        self.mark = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.steps += 1
        self._add_time()

    def on_evaluate(self, args, state, control, **kwargs):
        self.restart()

    on_train_begin = on_save = on_evaluate

    def _add_time(self):
        now = time.perf_counter()
        self.seconds += now - self.mark
        self.mark = now

    def seconds_per_step(self) -> float | None:
        """Mean since the last call; `None` if there was no step."""
        self._add_time()
        mean = self.seconds / self.steps if self.steps else None
        self.seconds, self.steps = 0.0, 0
        return mean


class ProgressBar(ProgressCallback):
    """Trainer's progress bar. It shows the numbers of a log entry only: texts are printed as they are."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        numbers = {name: value for name, value in logs.items() if not isinstance(value, str)}
        if numbers.keys() - {"epoch"}:
            super().on_log(args, state, control, logs=numbers, **kwargs)


class SampleCallback(TrainerCallback):
    """Continues `prompt` every `every` steps and at the end, prints the text and writes it to samples/step-N.txt.

    Sampling has a random state of its own, so that training does not depend on it. Add the callback to an existing
    `PretrainingTrainer`; its time does not count as training. Every process takes part, because under FSDP no process
    has the whole model. `text` is the last sample.

    Raises ValueError for a prompt that leaves no room for another token.
    """

    def __init__(
        self,
        trainer: Trainer,
        tokenizer: PreTrainedTokenizerBase,
        prompt: str,
        every: int,
        max_new_tokens: int = 60,
    ):
        self.trainer = trainer
        self.tokenizer = tokenizer
        self.prompt_ids = torch.tensor([tokenizer(prompt).input_ids or [tokenizer.eos_token_id]])
        self.every = every
        self.max_new_tokens = max_new_tokens
        self.text = ""
        check_prompt_fits(self.prompt_ids.shape[1], trainer.model.config.n_positions)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.every != 0 and state.global_step != state.max_steps:
            return
        self.text = text = self.sample(model, args.seed)
        if state.is_world_process_zero:
            print(f"\n--- sample at step {state.global_step} ---\n{text}\n", flush=True)
            folder = Path(args.output_dir, "samples")
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"step-{state.global_step}.txt").write_text(text + "\n", encoding="utf-8")
        self.trainer.speed.restart()

    def sample(self, model, seed: int) -> str:
        ids = self.prompt_ids.to(next(model.parameters()).device)
        room = model.config.n_positions - ids.shape[1]
        with evaluation_mode(model), torch.random.fork_rng():
            torch.manual_seed(seed)
            output = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=min(self.max_new_tokens, room),
                do_sample=True,
                top_k=50,
                use_cache=True,
                pad_token_id=self.tokenizer.pad_token_id,
            )
        return self.tokenizer.decode(output[0], skip_special_tokens=True)


def check_prompt_fits(tokens: int, n_positions: int) -> None:
    if tokens >= n_positions:
        raise ValueError(
            f"The prompt has {tokens} tokens, but the model's context of {n_positions} must also hold a new one; "
            "shorten --prompt."
        )


class HellaSwagCallback(TrainerCallback):
    """Logs `hellaswag_accuracy` and `hellaswag_accuracy_norm` (see `evaluation/hellaswag.py`) every `every` steps and
    at the end.

    Add it to an existing `PretrainingTrainer`, which it logs through. Its time does not count as training. Every
    process takes part, because under FSDP no process has the whole model.

    Raises ValueError for an example that does not fit the trainer's model.
    """

    def __init__(self, trainer: Trainer, tokenizer: PreTrainedTokenizerBase, examples: list[Example], every: int):
        self.trainer = trainer
        self.examples = [encode_example(tokenizer, example) for example in examples]
        self.every = every
        check_fits(trainer.model, self.examples)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.every != 0 and state.global_step != state.max_steps:
            return
        result = summarize(score_examples(model, self.examples))
        should_log = control.should_log
        self.trainer.log({"hellaswag_accuracy": result.accuracy, "hellaswag_accuracy_norm": result.accuracy_norm})
        control.should_log = should_log  # which logging has cleared, though this step's loss is still to be logged
        self.trainer.speed.restart()


class LogCallback(TrainerCallback):
    """Writes every log entry to log.jsonl, and plots them to curves.png whenever a checkpoint is saved.

    Trainer keeps the entries in its checkpoints. A resumed run replaces what was logged after its checkpoint.
    """

    def __init__(self):
        self.plots = importlib.util.find_spec("matplotlib") is not None

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            if not self.plots:
                logger.warning("curves.png needs matplotlib: pip install matplotlib.")
            Path(args.output_dir).mkdir(parents=True, exist_ok=True)
            content = "".join(json.dumps(entry) + "\n" for entry in state.log_history).encode()
            write_atomically(self._path(args), lambda file: file.write(content))

    def on_log(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            with self._path(args).open("a", encoding="utf-8") as file:
                file.write(json.dumps(state.log_history[-1]) + "\n")

    def on_save(self, args, state, control, **kwargs):
        if state.is_world_process_zero and self.plots:
            plot_log(state.log_history, Path(args.output_dir, "curves.png"))

    on_train_end = on_save

    @staticmethod
    def _path(args) -> Path:
        return Path(args.output_dir, "log.jsonl")
