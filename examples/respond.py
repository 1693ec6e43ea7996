"""Answer the instructions of a test set with a language model, and compare the answers with the references.

    python examples/respond.py --model runs/assistant --data runs/assistant/test.json --output responses.json
    python examples/respond.py --model openai-community/gpt2 --data test.json --output base.json --max_new_tokens 64
    python examples/respond.py --model runs/lora --data test.json --output sampled.json --temperature 0.7

`--model` is a folder or Hub id of any causal language model or of a PEFT adapter. Rows are {"instruction", "input",
"output"}, {"prompt", "completion"} or {"messages"}, in .json or .jsonl files or on the Hub. `--output` is a list of
objects with instruction, input, output (the reference) and response, for examples/judge.py; the instruction of a
longer conversation is its last question. The same command continues a stopped run.
"""

if __name__ == "__main__":  # --help and mistyped options are answered before the imports below, which take seconds
    import os
    import runpy

    runpy.run_path(os.path.join(os.path.dirname(os.path.abspath(__file__)), "_quick.py"))

import sys
from dataclasses import dataclass, field
from pathlib import Path

from accelerate import PartialState
from tqdm.auto import tqdm
from transformers import set_seed

from scratch_gpt2.cli import parse_arguments, run_main
from scratch_gpt2.cpu_inference import optimize_if_faster
from scratch_gpt2.data.instructions import Conversation, read_instructions
from scratch_gpt2.evaluation.models import is_first_process, load_causal_lm, load_tokenizer_of
from scratch_gpt2.evaluation.progress import ProgressFile, digest
from scratch_gpt2.evaluation.responses import (
    BLEU_WORDS,
    check_metric_packages,
    reference_loss,
    reference_metrics,
    short_responses,
)
from scratch_gpt2.files import check_outputs, write_json
from scratch_gpt2.prediction import batches_by_length, encode_prompts, respond
from scratch_gpt2.tokenization import load_tokenizer


@dataclass
class Arguments:
    model: str = field(metadata={"help": "Folder or Hub id of a causal language model or an adapter."})
    data: list[str] = field(metadata={"help": ".json or .jsonl files, or Hub data sets."})
    tokenizer: str | None = field(
        default=None, metadata={"help": "Folder, Hub id or tiktoken:gpt2; by default the model's."}
    )
    output: str = field(
        default="responses.json", metadata={"help": "File to write the answers to, ending with .json."}
    )
    overwrite: bool = field(default=False, metadata={"help": "Replace the output file if it exists."})
    max_rows: int | None = field(default=None, metadata={"help": "Answer the first N rows only."})
    max_new_tokens: int = field(default=256, metadata={"help": "Maximum length of an answer, in tokens."})
    batch_size: int = field(default=16, metadata={"help": "Answers generated per batch."})
    temperature: float = field(default=0.0, metadata={"help": "Sampling temperature; 0: greedy decoding."})
    top_k: int = field(default=50, metadata={"help": "Sample from the K most likely tokens; 0: from all."})
    top_p: float = field(
        default=1.0, metadata={"help": "Sample from the most likely tokens with this total probability."}
    )
    seed: int = field(default=0, metadata={"help": "Seed for sampling."})
    no_optimize: bool = field(
        default=False,
        metadata={"help": "On a CPU, keep the kernels of the model as loaded, even if others are faster."},
    )


def main() -> None:
    (arguments,) = parse_arguments(Arguments, description=__doc__)
    if not is_first_process():
        return
    check(arguments)
    conversations = read_instructions(arguments.data, arguments.max_rows)
    tokenizer = load_tokenizer(arguments.tokenizer) if arguments.tokenizer else load_tokenizer_of(arguments.model)
    model = load_causal_lm(arguments.model).to(PartialState().device)
    if not arguments.no_optimize:
        print(optimize_if_faster(model), file=sys.stderr)
    fitting, prompts = fit(model, tokenizer, conversations, arguments.max_new_tokens)
    try:
        loss = reference_loss(model, tokenizer, fitting)
    except ValueError as error:
        loss = None
        print(f"no perplexity: {error}")

    progress = ProgressFile(f"{arguments.output}.unfinished.jsonl", settings(arguments, model, prompts))
    answers = answer_all(model, tokenizer, prompts, arguments, progress)
    write(fitting, answers, Path(arguments.output))
    report(fitting, answers, loss)
    progress.file.unlink()


def check(arguments: Arguments) -> None:
    if not arguments.output.endswith(".json"):
        raise ValueError(f"--output is {arguments.output!r} but must end with .json.")
    check_outputs([arguments.output], inputs=[*arguments.data, arguments.model], overwrite=arguments.overwrite)
    check_metric_packages()
    for name, least in (("max_new_tokens", 1), ("batch_size", 1), ("temperature", 0)):
        if getattr(arguments, name) < least:
            raise ValueError(f"{name} is {getattr(arguments, name)} but must be at least {least}.")


def fit(model, tokenizer, conversations: list[Conversation], max_new_tokens: int):
    """The conversations whose prompt leaves room for an answer of maximum length, and the ids of their prompts."""
    positions = getattr(model.config, "max_position_embeddings", None)
    longest = None if positions is None else positions - max_new_tokens
    fitting, prompts = encode_prompts(tokenizer, conversations, longest)
    if len(fitting) < len(conversations):
        sentence = (
            f"{len(conversations) - len(fitting)} of {len(conversations)} prompts leave fewer than {max_new_tokens} "
            f"of the model's {positions} positions for the answer"
        )
        if not fitting:
            raise ValueError(f"{sentence}; choose a smaller --max_new_tokens.")
        print(f"{sentence}: skipped")
    highest = max(map(max, prompts))
    if highest >= model.config.vocab_size:
        raise ValueError(
            f"The tokenizer gives id {highest} but the model's vocab_size is {model.config.vocab_size}: use the "
            "tokenizer that the model was trained with."
        )
    return fitting, prompts


def settings(arguments: Arguments, model, prompts: list[list[int]]) -> dict:
    """What the answers depend on. Of each weight the first numbers suffice: training changes some of them."""
    names = ("model", "max_new_tokens", "batch_size", "temperature", "top_k", "top_p", "seed")
    weights = [parameter.detach().flatten()[:16].tolist() for parameter in model.parameters()]
    return {name: getattr(arguments, name) for name in names} | {"weights": digest(weights), "rows": digest(prompts)}


def answer_all(model, tokenizer, prompts: list[list[int]], arguments: Arguments, progress: ProgressFile) -> list[dict]:
    """A record with text and stopped for each prompt; `progress` holds those of an earlier run."""
    options = {"max_new_tokens": arguments.max_new_tokens, "do_sample": arguments.temperature > 0}
    if arguments.temperature > 0:
        options |= {name: getattr(arguments, name) for name in ("temperature", "top_k", "top_p")}
    answers = {record["row"]: record for record in progress.records}
    with tqdm(total=len(prompts), desc="Answering", unit=" rows") as bar:
        for batch in batches_by_length([len(ids) for ids in prompts], arguments.batch_size):
            if not answers.keys() >= set(batch):
                set_seed(arguments.seed + batch[0])  # a continued run then draws the same samples
                responses = respond(model, tokenizer, [prompts[row] for row in batch], **options)
                records = [
                    {"row": row, "text": response.text, "stopped": response.stopped}
                    for row, response in zip(batch, responses, strict=True)
                ]
                progress.append(records)
                answers |= {record["row"]: record for record in records}
            bar.update(len(batch))
    return [answers[row] for row in range(len(prompts))]


def write(conversations: list[Conversation], answers: list[dict], output: Path) -> None:
    rows = [
        {"instruction": row.instruction, "input": row.input, "output": row.output, "response": answer["text"]}
        for row, answer in zip(conversations, answers, strict=True)
    ]
    write_json(output, rows)


def report(conversations: list[Conversation], answers: list[dict], loss) -> None:
    texts = [answer["text"] for answer in answers]
    metrics = reference_metrics(texts, [row.output for row in conversations])
    stopped = sum(answer["stopped"] for answer in answers)
    print(f"{count(len(answers), 'answer')}, {stopped} ended by the model, {len(answers) - stopped} cut off")
    print(f"ROUGE-L       {metrics['rouge_l']:8.2f}")
    short = short_responses(texts)
    note = f"; {count(short, 'answer')} with fewer than {BLEU_WORDS} words, which BLEU expects" if short else ""
    print(f"BLEU          {metrics['bleu']:8.2f} of the whole set{note}")
    print(f"exact match   {metrics['exact_match']:8.2f} %")
    if loss is not None:
        note = (
            f", without {count(loss.too_long, 'conversation')} of more tokens than the model has positions"
            if loss.too_long
            else ""
        )
        print(f"perplexity    {loss.perplexity:8.2f} of the references ({loss.tokens:,} tokens{note})")


def count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


if __name__ == "__main__":
    run_main(main)
