"""The Trainer that pretraining, classification and instruction tuning share: each push is one commit, and the last
one is checked."""

import re
import sys

from huggingface_hub import CommitInfo
from transformers import Trainer
from transformers.trainer_utils import HubStrategy

from ..hub.push import check_pushed, hub_errors_explained, push
from ..hub.run_record import record_run
from .start import check_push


class PushingTrainer(Trainer):
    """Trainer whose `--push_to_hub` pushes as `hub.push` does, and that takes no step after the last one.

    Trainer itself would push the whole output folder, with token shards, test rows and training_args.bin, in several
    commits. `save_model` does not push; call `push_to_hub` when everything is in the output folder.

    Attributes:
        run: what `record_run` shall tell of this run, but for its metrics, in the card of a checkpoint.
    """

    run: dict | None = None

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
        super().save_model(output_dir, _internal_call=True)

    def push_to_hub(self, commit_message: str | None = "End of training", **kwargs) -> CommitInfo | None:
        """Push the output folder, and check what has arrived. For runs with `--push_to_hub`."""
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


def metrics_of_step(history: list[dict], step: int) -> dict[str, float]:
    """What Trainer has measured on the validation data at `step`, by the names of the Hub, without its speed."""
    metrics: dict[str, float] = {}
    for entry in history:
        if entry["step"] == step and "eval_loss" in entry:
            metrics |= {name.removeprefix("eval_"): entry[name] for name in entry if name.startswith("eval_")}
    return {name: value for name, value in metrics.items() if not re.search("runtime|per_second|time$", name)}
