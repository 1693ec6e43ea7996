"""Have a language model score responses from 0 to 100 against their references.

    python examples/judge.py --responses responses.json --model llama3.2
    python examples/judge.py --responses responses.json --model gpt-4o-mini --base_url https://api.openai.com/v1
    python examples/judge.py --responses responses.json --model runs/judge --base_url http://localhost:8000/v1

The first asks Ollama at its default address, the second OpenAI with the key in the environment's OPENAI_API_KEY, the
third `transformers serve`. The responses are a list of objects with instruction, input, output (the reference) and
response, as examples/respond.py writes them. Each reply is kept in `--output` as soon as it has come: a stopped run
goes on from there. Beside it come the figures (.json) and their histogram (.png).
"""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path

from transformers import HfArgumentParser

from scratch_gpt2.cli import run_main
from scratch_gpt2.evaluation.judge import OLLAMA, Endpoint, judge, plot_scores, read_responses
from scratch_gpt2.files import write_atomically


@dataclass
class Arguments:
    responses: str = field(metadata={"help": "A .json or .jsonl file, such as examples/respond.py writes."})
    model: str = field(metadata={"help": "The judge's name at its server, such as llama3.2 or gpt-4o-mini."})
    base_url: str = field(default=OLLAMA, metadata={"help": "Address of a server with OpenAI's API."})
    api_key_env: str = field(
        default="OPENAI_API_KEY", metadata={"help": "Environment variable with the key; it may be unset."}
    )
    output: str = field(default="scores.jsonl", metadata={"help": "JSON lines: row, score, the judge's reply."})
    response_field: str = field(default="response", metadata={"help": "Field of a row with what is to be scored."})
    concurrency: int = field(default=4, metadata={"help": "Requests under way at once."})
    timeout: float = field(default=60.0, metadata={"help": "Seconds for one request."})
    retries: int = field(default=5, metadata={"help": "Further tries of one request, after 1, 2, 4 ... seconds."})
    max_tokens: int = field(
        default=16, metadata={"help": "Tokens of a reply; a longer one is no score. A judge that thinks needs more."}
    )


def main() -> None:
    (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    output = Path(arguments.output)
    if output.suffix != ".jsonl":
        raise ValueError(f"--output is {arguments.output!r} but must end with .jsonl.")
    rows = read_responses(arguments.responses, arguments.response_field)
    endpoint = Endpoint(
        model=arguments.model,
        base_url=arguments.base_url,
        api_key=os.environ.get(arguments.api_key_env, "").strip() or None,
        timeout=arguments.timeout,
        retries=arguments.retries,
        max_tokens=arguments.max_tokens,
    )
    result = judge(rows, endpoint, output, arguments.concurrency)

    summary = {"judge": arguments.model, "responses": arguments.responses} | result.summary()
    write_atomically(output.with_suffix(".json"), lambda file: file.write(json.dumps(summary, indent=1).encode()))
    plot_scores(summary, output.with_suffix(".png"))
    print_summary(summary)


def print_summary(summary: dict) -> None:
    mean, median = ("none" if summary[name] is None else f"{summary[name]:.1f}" for name in ("mean", "median"))
    print(f"mean {mean}, median {median}: {summary['scored']} of {summary['rows']} responses scored")
    print(f"{summary['unparsable']} replies were no score, {summary['failed']} requests failed")
    for reason, count in summary["failures"].items():
        print(f"  {count} times {reason}")
    if summary["failed"]:
        print("Run the same command again to ask for these once more.")


if __name__ == "__main__":
    run_main(main)
