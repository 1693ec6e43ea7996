"""Tune an assistant to the answers that people prefer: Direct Preference Optimization with TRL.

    python examples/dpo.py --data instruction-data-with-preference.json --model runs/assistant --output_dir runs/dpo
    python examples/dpo.py --data trl-lib/ultrafeedback_binarized --model runs/alpaca --lora --merge --bf16 \\
        --output_dir runs/dpo-lora
    python examples/dpo.py --data instruction-data-with-preference.json --model runs/assistant --output_dir runs/dpo \\
        --judge llama3.2                                         # also the win rate, by a model that Ollama serves
    accelerate launch --config_file examples/accelerate/ddp.yaml --num_processes 2 examples/dpo.py \\
        --data instruction-data-with-preference.json --model runs/assistant --output_dir runs/dpo2

Start from a model that follows instructions (examples/sft.py). Rows are {"instruction", "input", "chosen",
"rejected"}, {"prompt", "chosen", "rejected"}, or conversations `chosen` and `rejected`, in files or on the Hub. The
training makes chosen answers more probable than rejected ones, compared with the model that it starts from; `--beta`
keeps it close to that model. `--lora` trains adapters only.

The script evaluates held-out pairs before and after training: how often the model finds the chosen answer
more probable (accuracy), and by how many nats on average (margin). `--judge` has a language model score the answers
to these prompts, before and after, and reports how often the later one is better (win rate).

All options of TRL's DPOConfig can be set too. To continue a run that was stopped, add `--resume` to its command.
`--eval_only` measures `--model` on the pairs held out instead. The output folder gets the model with the lowest
validation loss (or its adapter) and the tokenizer, preferences.json with the numbers before and after, checkpoint-N,
log.jsonl, curves.png, and run.json for the model card. `--push_to_hub --hub_model_id me/dpo` pushes them.
"""

if __name__ == "__main__":  # --help and mistyped options are answered before the imports below, which take seconds
    import os
    import runpy

    runpy.run_path(os.path.join(os.path.dirname(os.path.abspath(__file__)), "_quick.py"))

import os
from dataclasses import dataclass, field
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from scratch_gpt2.cli import given_options, parse_arguments, run_main
from scratch_gpt2.command_help import MODEL_ALIASES, ROW_ALIASES, TOKENIZER_ALIASES, public
from scratch_gpt2.data.instructions import split
from scratch_gpt2.data.preferences import Preference, read_preferences
from scratch_gpt2.evaluation.chat_client import OLLAMA, Endpoint
from scratch_gpt2.files import write_json
from scratch_gpt2.hardware import keep_freed_memory
from scratch_gpt2.hub.run_record import record_run
from scratch_gpt2.tokenization import load_tokenizer
from scratch_gpt2.training.callbacks import LogCallback
from scratch_gpt2.training.checks import (
    check_fits_checkpoint,
    check_installed,
    check_row_count,
    check_training_arguments,
    open_output_dir,
    remove_results,
)
from scratch_gpt2.training.evaluation_only import (
    check_evaluation,
    evaluates_only,
    load_evaluated,
    write_evaluation,
)
from scratch_gpt2.training.identity import check_identity, fingerprint, same_path
from scratch_gpt2.training.preferences import (
    PreferenceArguments,
    PreferenceTrainer,
    answer_log_probabilities,
    answers,
    as_dataset,
    fitting_pairs,
    judged,
    preference_metrics,
    win_rate,
)
from scratch_gpt2.training.start import check_launch, check_push, describe, fit_to_tokenizer

METRICS = ("loss", "accuracy", "margin", "reward_accuracy", "reward_margin")


@dataclass
class Arguments:
    model: str = field(metadata=public("Assistant to start from: a folder or a Hub id.", MODEL_ALIASES))
    data: list[str] | None = field(default=None, metadata=public("Files of pairs, or Hub data sets.", ROW_ALIASES))
    tokenizer: str | None = field(
        default=None, metadata=public("Folder, Hub id or tiktoken:gpt2; by default the model's.", TOKENIZER_ALIASES)
    )
    max_rows: int | None = field(default=None, metadata=public("Use only the first N pairs."))
    validation: float = field(default=0.05, metadata=public("Share of the pairs for validation."))
    test: float = field(default=0.1, metadata=public("Share of the pairs measured before and after."))
    lora: bool = field(
        default=False, metadata=public("Train low-rank adapters instead of the whole model.", ["--use_peft"])
    )
    lora_rank: int = field(default=16, metadata=public("Rank of the adapters.", ["--lora_r"]))
    lora_alpha: int = field(default=32, metadata=public("The adapters' output is scaled by lora_alpha / lora_rank."))
    merge: bool = field(
        default=False, metadata=public("Save the adapted model as an ordinary one, and its adapter in adapter/.")
    )
    judge: str | None = field(default=None, metadata={"help": "Model that scores the answers, on a server."})
    base_url: str = field(default=OLLAMA, metadata={"help": "Address of the judge's server with OpenAI's API."})
    max_new_tokens: int = field(default=128, metadata={"help": "Maximum length of the answers for the judge."})
    resume: bool = field(default=False, metadata={"help": "Continue from the newest complete checkpoint."})


def recipe(parsed) -> dict:
    """The defaults that depend on other options: adapters take larger steps."""
    return {"learning_rate": 5e-5} if parsed.lora else {}


def check(arguments: Arguments, args: PreferenceArguments) -> None:
    """Raise an error for options that do not fit together, before anything is read."""
    check_launch(args)
    check_training_arguments(args, metrics=METRICS)
    if arguments.data is None:
        raise ValueError("--data is missing: give files of pairs or a data set of the Hub.")
    if min(arguments.validation, arguments.test) <= 0 or arguments.validation + arguments.test >= 1:
        raise ValueError(
            f"validation is {arguments.validation:g} and test is {arguments.test:g}; both must be above 0 and their "
            "sum below 1, so that pairs are left for training."
        )
    if args.beta <= 0:
        raise ValueError(f"beta is {args.beta:g} but must be above 0.")
    if args.loss_type != ["sigmoid"]:
        raise ValueError(f"--loss_type is {' '.join(args.loss_type)}, but only sigmoid, the loss of DPO, is measured.")
    for name in ("lora_rank", "lora_alpha", "max_new_tokens"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"{name} is {getattr(arguments, name)} but must be at least 1.")
    for name in {"lora_rank", "lora_alpha", "merge"} & given_options(arguments):
        if not arguments.lora:
            raise ValueError(f"--{name} is for adapters: add --lora, or leave it out.")
    if arguments.lora:
        check_installed("peft", needed_for="--lora")
    is_adapter = Path(arguments.model, "adapter_config.json").is_file()
    if is_adapter and arguments.lora and not arguments.merge:
        raise ValueError(f"{arguments.model} is an adapter, and an adapter on top of it would be lost: add --merge.")
    check_push(args, base_of_adapter=arguments.model if arguments.lora and not arguments.merge else None)


def load_start(name: str) -> PreTrainedModel:
    """The model to start from in float32, with its adapter merged if it has one."""
    model = load_evaluated(name)
    if hasattr(model, "merge_and_unload"):
        model = model.merge_and_unload().float().requires_grad_(True)  # an adapter leaves its base frozen
    return model


def read_parts(
    arguments: Arguments, args: PreferenceArguments, tokenizer: PreTrainedTokenizerBase, n_positions: int
) -> tuple[tuple[list[Preference], ...], list, int]:
    """The pairs for training, validation and test, their ids, and how many did not fit."""
    if args.max_length is not None and not 1 <= args.max_length <= n_positions:
        raise ValueError(f"max_length is {args.max_length}, but the model reads 1 to {n_positions} tokens.")
    args.max_length = args.max_length or n_positions
    pairs = read_preferences(arguments.data, max_rows=arguments.max_rows)
    fitting, _ = fitting_pairs(tokenizer, pairs, args.max_length)
    if not fitting:
        raise ValueError(f"No pair has at most max_length {args.max_length} tokens; choose a larger value.")
    fractions = (1 - arguments.validation - arguments.test, arguments.validation, arguments.test)
    parts = split(fitting, seed=args.seed, fractions=fractions)
    return parts, [fitting_pairs(tokenizer, part, args.max_length)[1] for part in parts], len(pairs) - len(fitting)


def make_trainer(arguments: Arguments, args, model, tokenizer, parts: tuple[list[Preference], ...], evaluated: list):
    config = None
    if arguments.lora:
        from scratch_gpt2.training.adapters import lora_config  # needs peft

        config = lora_config("CAUSAL_LM", rank=arguments.lora_rank, alpha=arguments.lora_alpha)
    trainer = PreferenceTrainer(
        model,
        args,
        evaluated=evaluated,
        train_dataset=as_dataset(parts[0]),
        eval_dataset=as_dataset(parts[1]),  # without it, Trainer refuses to evaluate
        processing_class=tokenizer,
        callbacks=[LogCallback()],
        peft_config=config,
    )
    trainer.run = {"arguments": (arguments, args), "base": arguments.model, "data": arguments.data}
    return trainer


def check_same_run(trainer: PreferenceTrainer, arguments: Arguments, checkpoint: str | None, parts) -> list[str]:
    """The changes of a resumed run that take effect. Raises ValueError for those that cannot."""
    args = trainer.args
    if checkpoint is not None:
        check_fits_checkpoint(trainer.model, checkpoint, advice="--model, --lora and --lora_rank")
    return check_identity(
        args,
        checkpoint,
        **{name: getattr(arguments, name) for name in ("validation", "test", "lora", "lora_alpha")},
        **{name: getattr(args, name) for name in ("beta", "max_length")},
        model=same_path(arguments.model),
        data=fingerprint([[(pair.chosen.messages, pair.rejected.output) for pair in part] for part in parts]),
    )


def save(trainer: PreferenceTrainer, tokenizer: PreTrainedTokenizerBase, merge: bool) -> None:
    folder = str(trainer.args.output_dir)
    if not merge:
        trainer.save_model()
        return
    trainer.save_model(str(Path(folder, "adapter")))
    if trainer.is_world_process_zero():
        trainer.model.merge_and_unload().save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def evaluate_only(arguments: Arguments, args: PreferenceArguments) -> None:
    """Measure `--model` on the pairs held out; train nothing."""
    check_evaluation(args, inputs=(arguments.model, *arguments.data))
    tokenizer, model = load_tokenizer(arguments.tokenizer or arguments.model), load_evaluated(arguments.model)
    _, (_, _, test), _ = read_parts(arguments, args, tokenizer, n_positions=model.config.n_positions)
    scores = answer_log_probabilities(model.to(args.device), test, args.per_device_eval_batch_size)
    measured = preference_metrics(scores, scores, args.beta)
    metrics = {name: measured[name] for name in ("accuracy", "margin")}
    write_evaluation(args, model=arguments.model, data=arguments.data, split="test", metrics=metrics)


def judge_answers(
    trainer: PreferenceTrainer, tokenizer: PreTrainedTokenizerBase, pairs: list[Preference], arguments, endpoint, when
) -> list[int | None]:
    """The judge's scores of the answers of the model as it is; every process answers, the first one asks."""
    if endpoint is None:
        return []
    rows = answers(trainer.model, tokenizer, pairs, arguments.max_new_tokens)
    if not trainer.is_world_process_zero():
        return []
    return judged(rows, endpoint, Path(str(trainer.args.output_dir), f"judged_{when}.jsonl"))


def report(before: dict, after: dict, folder: str) -> None:
    """Write and print the numbers of the pairs held out, before and after."""
    write_json(Path(folder, "preferences.json"), {"before": before, "after": after})
    print(f"\n{'pairs held out':<18}{'before':>10}{'after':>10}")
    for name in after:
        print(f"{name:<18}{before[name]:>10.4f}{after[name]:>10.4f}" if name in before else f"{name}: {after[name]}")


def main() -> None:
    arguments, args = parse_arguments(Arguments, PreferenceArguments, description=__doc__, defaults=recipe)
    check(arguments, args)
    if evaluates_only(args):
        return evaluate_only(arguments, args)
    keep_freed_memory()
    key = os.environ.get("OPENAI_API_KEY", "").strip() or None
    endpoint = Endpoint(arguments.judge, arguments.base_url, api_key=key) if arguments.judge else None
    inputs = (arguments.model, arguments.tokenizer, *arguments.data)
    checkpoint, overwrite = open_output_dir(args, resume=arguments.resume, inputs=inputs)
    set_seed(args.seed)
    tokenizer, model = load_tokenizer(arguments.tokenizer or arguments.model), load_start(arguments.model)
    fit_to_tokenizer(model, tokenizer)
    tokenizer.model_max_length = model.config.n_positions
    parts, (_, validation, test_ids), too_long = read_parts(arguments, args, tokenizer, model.config.n_positions)
    check_row_count(args, rows=len(parts[0]))
    trainer = make_trainer(arguments, args, model, tokenizer, parts, evaluated=validation)
    if args.process_index == 0:
        remove_results(args.output_dir, overwrite=overwrite)
    changes = check_same_run(trainer, arguments, checkpoint, parts)
    if trainer.is_world_process_zero():
        sizes = ", ".join(f"{len(p):,} {n}" for p, n in zip(parts, ("training", "validation", "test"), strict=True))
        data = f"{sizes} pairs; {too_long:,} longer than {args.max_length} tokens are left out"
        print("\n".join([describe(trainer, checkpoint, model=arguments.model, data=data), *changes]), flush=True)
    reference = trainer.scores(test_ids)
    earlier = judge_answers(trainer, tokenizer, parts[2], arguments, endpoint, "before")
    trainer.train(resume_from_checkpoint=checkpoint)
    metrics = {name.removeprefix("eval_"): value for name, value in trainer.evaluate().items()}
    before, after = (preference_metrics(s, reference, args.beta) for s in (reference, trainer.scores(test_ids)))
    if trainer.is_world_process_zero():
        record_run(args.output_dir, **trainer.run, metrics=metrics, loss_per="pair of answers")
    later = judge_answers(trainer, tokenizer, parts[2], arguments, endpoint, "after")
    save(trainer, tokenizer, merge=arguments.merge)
    if trainer.is_world_process_zero():
        if endpoint:
            after["win_rate"], after["judged_pairs"] = win_rate(earlier, later)
        report(before, after, args.output_dir)
        print(f"written to {args.output_dir}")
    if args.push_to_hub:
        trainer.push_to_hub()
    trainer.accelerator.end_training()


if __name__ == "__main__":
    run_main(main)
