"""Two processes train what one process trains: DDP and FSDP2 on the processor, with gloo.

accelerate (1.15) shards with FSDP only where it finds GPUs: on the processor its `AcceleratorState` stays MULTI_CPU,
and Trainer silently runs DDP. `arguments_for_sharding` therefore tells it that the two processes have accelerators of
some kind. All that follows is accelerate's own FSDP2: wrapping, optimizer, clipping, saving and resuming.
"""

import json
import sys
from pathlib import Path

import pytest
import test_pretrain
import torch
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env
from model_fixtures import tiny_config, tiny_model
from safetensors.torch import load_file
from test_pretrain import history, make_trainer
from warm_python import run_two

from scratch_gpt2 import ScratchGPT2ForCausalLM
from scratch_gpt2.training.callbacks import SampleCallback
from scratch_gpt2.training.checkpoints import newest_intact_checkpoint
from scratch_gpt2.training.plan import device_memory
from scratch_gpt2.training.recipes import PretrainingArguments

pytestmark = pytest.mark.xdist_group("distributed")  # one worker: the fixtures occupy both cores
REPOSITORY = Path(__file__).resolve().parents[1]
CONFIGS = REPOSITORY / "examples" / "accelerate"
OPTIMIZERS = ("adamw", "muon")
EVALUATED_ROWS = (1, 2, 3, 5, 7, 16)


class CountingTokenizer:
    """As much of a tokenizer as sampling needs, for a vocabulary without words."""

    eos_token_id, pad_token_id = 2, 0

    def __call__(self, text):
        return type("Encoding", (), {"input_ids": [5, 6]})

    def decode(self, ids, skip_special_tokens):
        return " ".join(str(i) for i in ids.tolist())


def train(output_dir, optimizer, passes, resume_from_checkpoint=None):
    options = {"dropout": 0.0, "rows": 16, "gradient_accumulation_steps": passes, "save_steps": 3}
    trainer = make_trainer(output_dir, optimizer, **options)
    trainer.add_callback(SampleCallback(trainer, CountingTokenizer(), "", every=3, max_new_tokens=4))
    trainer.train(resume_from_checkpoint=resume_from_checkpoint)
    return trainer


def arguments_for_sharding(*args, **kwargs):
    arguments = PretrainingArguments(*args, **kwargs)
    assert PartialState().distributed_type == DistributedType.MULTI_CPU
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_XPU
    return arguments


def evaluation(trainer, rows):
    """With batches of 2 in each process, whose last ones are filled up unless `rows` is a multiple of 4."""
    trainer.args.per_device_eval_batch_size = 2
    return trainer.evaluate(trainer.train_dataset[:rows])["eval_loss"]


def held_bytes(trainer) -> dict[str, int]:
    """Of the weights and of the optimizer's state in this process, without the counters of steps."""
    states = (tensor for state in trainer.optimizer.state.values() for tensor in state.values())
    kept = {"parameters": trainer.model_wrapped.parameters(), "optimizer": filter(torch.is_tensor, states)}
    return {
        name: sum(getattr(t, "to_local", lambda t=t: t)().nbytes for t in tensors if t.dim())
        for name, tensors in kept.items()
    }


def work(kind, folder):
    """What each of the two processes runs."""
    if kind == "fsdp2":
        test_pretrain.PretrainingArguments = arguments_for_sharding
    for optimizer in OPTIMIZERS:
        trainer = train(folder / optimizer, optimizer, passes=1)
        assert trainer.args.world_size == 2 and trainer.is_fsdp_enabled == (kind == "fsdp2")
        (folder / f"{optimizer}-{trainer.args.process_index}.json").write_text(json.dumps(held_bytes(trainer)))
    resumed = train(folder / "muon", "muon", passes=1, resume_from_checkpoint=folder / "muon" / "checkpoint-3")
    evaluated = {rows: evaluation(trainer, rows) for rows in EVALUATED_ROWS}
    if trainer.is_world_process_zero():
        (folder / "evaluated.json").write_text(json.dumps(evaluated))
        (folder / "resumed.json").write_text(json.dumps([history(trainer), history(resumed)]))
    trainer.accelerator.end_training()


def environment_of_accelerate(config: Path) -> dict[str, str]:
    """What `accelerate launch` sets for each process, except for its rank."""
    options = ["--config_file", config, "--num_processes", "2", "--mixed_precision", "no", __file__]
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(list(map(str, options))))
    variables = prepare_multi_gpu_env(arguments)
    return {name: variables[name] for name in variables if name.startswith(("ACCELERATE_", "FSDP_"))}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    for optimizer in OPTIMIZERS:
        train(folder / optimizer, optimizer, passes=2)
    return folder


@pytest.fixture(scope="module", params=["ddp", "fsdp2"])
def together(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    variables = environment_of_accelerate(CONFIGS / f"{request.param}.yaml")
    both = run_two(__file__, request.param, folder, variables=variables)
    assert [done.returncode for done in both] == [0, 0], [done.stderr[-5000:] for done in both]
    return folder


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines() if '"loss"' in line]


def logged(folder, key):
    state = json.loads((folder / "checkpoint-6" / "trainer_state.json").read_text())
    return [entry[key] for entry in state["log_history"] if key in entry]


# AdamW: the order of float32 sums. Muon orthogonalises in bfloat16, where another order of sums shows earlier.
@pytest.mark.parametrize(("optimizer", "tolerance"), [("adamw", 2e-6), ("muon", 1e-4)])
def test_same_losses_as_one_process(alone, together, optimizer, tolerance):
    expected = logged(alone / optimizer, "loss")
    assert len(expected) == 6
    assert logged(together / optimizer, "loss") == pytest.approx(expected, rel=tolerance)
    assert logged(together / optimizer, "grad_norm") == pytest.approx(logged(alone / optimizer, "grad_norm"), rel=1e-3)


def test_resume_is_the_same_run(together):
    straight, resumed = json.loads((together / "resumed.json").read_text())
    assert len(straight) == 6 and resumed == straight


def test_evaluation_counts_every_row_once(together, tmp_path):
    """The rows that fill up the last batches count neither in the loss nor in the number of tokens."""
    evaluated = json.loads((together / "evaluated.json").read_text())
    model = ScratchGPT2ForCausalLM.from_pretrained(newest_intact_checkpoint(together / "muon"))
    data = make_trainer(tmp_path, rows=16).train_dataset
    for rows in EVALUATED_ROWS:
        ids = torch.stack([row["input_ids"] for row in data[:rows]])
        with torch.no_grad():
            expected = model(ids, labels=ids).loss.item()
        assert evaluated[str(rows)] == pytest.approx(expected, rel=1e-5), rows


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_fullest_process_holds_what_the_plan_says(request, together, optimizer):
    held = [json.loads((together / f"{optimizer}-{rank}.json").read_text()) for rank in (0, 1)]
    strategy = request.node.callspec.params["together"]
    planned = device_memory(tiny_config(), strategy, devices=2, rows=2, length=8, optimizer=optimizer)
    for name in ("parameters", "optimizer"):
        assert max(one[name] for one in held) == getattr(planned, name) > 0


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_checkpoints_are_ordinary_ones(alone, together, optimizer):
    checkpoint = newest_intact_checkpoint(together / optimizer)
    assert checkpoint.endswith("checkpoint-6")
    reference = Path(newest_intact_checkpoint(alone / optimizer))
    tensors = load_file(Path(checkpoint, "model.safetensors"))
    assert tensors.keys() == load_file(reference / "model.safetensors").keys()
    assert Path(checkpoint, "config.json").read_text() == (reference / "config.json").read_text()
    python_files = {path.name for path in Path(checkpoint).glob("*.py")}
    assert python_files == {path.name for path in reference.glob("*.py")}
    model = ScratchGPT2ForCausalLM.from_pretrained(checkpoint)
    assert torch.equal(model.lm_head.weight, tensors["model.embed_tokens.weight"])


def test_samples_are_those_of_one_process(alone, together):
    expected = (alone / "adamw" / "samples" / "step-3.txt").read_text()
    assert len(expected.split()) == 6
    assert (together / "adamw" / "samples" / "step-3.txt").read_text() == expected


def test_fsdp_wraps_the_modules_that_must_not_be_split():
    config = yaml.safe_load((CONFIGS / "fsdp2.yaml").read_text())["fsdp_config"]
    assert config["fsdp_transformer_layer_cls_to_wrap"].split(",") == ScratchGPT2ForCausalLM._no_split_modules
    assert type(tiny_model().model.layers[0]).__name__ in ScratchGPT2ForCausalLM._no_split_modules
    assert config["fsdp_version"] == 2


if __name__ == "__main__":
    work(sys.argv[1], Path(sys.argv[2]))
