"""Have a language model score responses from 0 to 100 against their references.

    python examples/judge.py --responses responses.json --model llama3.2
    python examples/judge.py --responses responses.json --model gpt-4o-mini --base_url https://api.openai.com/v1
    python examples/judge.py --responses responses.json --model runs/judge --base_url http://localhost:8000/v1

The first command asks Ollama at its default address, the second one OpenAI with the key in the environment variable
OPENAI_API_KEY, the third one `transformers serve`. The responses are a list of objects with instruction, input, output
(the reference) and response, as examples/respond.py writes them. Each reply is appended to `--output` as soon as it
arrives, so the same command continues a stopped run. The summary (.json) and the histogram of the scores (.png) are
written next to it.
"""

if __name__ == "__main__":  # --help and mistyped options are answered before the imports below, which take seconds
    import os
    import runpy

    runpy.run_path(os.path.join(os.path.dirname(os.path.abspath(__file__)), "_quick.py"))

import os
from dataclasses import dataclass, field
from pathlib import Path

from scratch_gpt2.cli import parse_arguments, run_main
from scratch_gpt2.evaluation.chat_client import OLLAMA, Endpoint
from scratch_gpt2.evaluation.judge import judge, plot_scores, read_responses
from scratch_gpt2.evaluation.models import is_first_process
from scratch_gpt2.files import check_outputs, check_plotting, write_json


@dataclass
class Arguments:
    responses: str = field(metadata={"help": "A .json or .jsonl file, such as examples/respond.py writes."})
    model: str = field(metadata={"help": "The judge's name on its server, such as llama3.2 or gpt-4o-mini."})
    base_url: str = field(default=OLLAMA, metadata={"help": "Address of a server with OpenAI's API."})
    api_key_env: str = field(
        default="OPENAI_API_KEY", metadata={"help": "Environment variable with the API key; it may be unset."}
    )
    output: str = field(default="scores.jsonl", metadata={"help": "JSON lines: row, score, the judge's reply."})
    overwrite: bool = field(
        default=False, metadata={"help": "Start again instead of continuing, replacing the files."}
    )
    response_field: str = field(default="response", metadata={"help": "Field of a row with the text to score."})
    concurrency: int = field(default=4, metadata={"help": "Number of requests in flight."})
    timeout: float = field(default=60.0, metadata={"help": "Seconds for one request."})
    retries: int = field(default=5, metadata={"help": "Retries of a failed request, after 1, 2, 4, ... seconds."})
    max_tokens: int = field(
        default=16,
        metadata={"help": "Maximum length of a reply; a longer one is not a score. A reasoning model needs more."},
    )


def main() -> None:
    (arguments,) = parse_arguments(Arguments, description=__doc__)
    if not is_first_process():
        return
    output = Path(arguments.output)
    if output.suffix != ".jsonl":
        raise ValueError(f"--output is {arguments.output!r} but must end with .jsonl.")
    summary_file, plot_file = output.with_suffix(".json"), output.with_suffix(".png")
    check_outputs(
        [output, summary_file, plot_file],
        inputs=[arguments.responses],
        overwrite=arguments.overwrite or output.exists(),  # scores.jsonl may be that of a stopped run
    )
    rows = read_responses(arguments.responses, arguments.response_field)
    endpoint = Endpoint(
        model=arguments.model,
        base_url=arguments.base_url,
        api_key=os.environ.get(arguments.api_key_env, "").strip() or None,
        timeout=arguments.timeout,
        retries=arguments.retries,
        max_tokens=arguments.max_tokens,
    )
    check_plotting()
    if arguments.overwrite:
        output.unlink(missing_ok=True)
    result = judge(rows, endpoint, output, arguments.concurrency)

    summary = {"judge": arguments.model, "responses": arguments.responses} | result.summary()
    write_json(summary_file, summary)
    plot_scores(summary, plot_file)
    print_summary(summary, arguments.max_tokens)


def print_summary(summary: dict, max_tokens: int) -> None:
    mean, median = ("none" if summary[name] is None else f"{summary[name]:.1f}" for name in ("mean", "median"))
    print(f"mean {mean}, median {median}: {summary['scored']} of {summary['rows']} responses scored")
    print(f"replies that are not a score: {summary['unparsable']}, failed requests: {summary['failed']}")
    if summary["cut_off"]:
        print(
            f"replies cut off after {max_tokens} tokens: {summary['cut_off']}; a reasoning model needs a larger "
            "--max_tokens (and --overwrite)"
        )
    for reason, count in summary["failures"].items():
        print(f"  {count} x {reason}")
    if summary["failed"]:
        print("Run the same command again to repeat the failed requests.")


if __name__ == "__main__":
    run_main(main)
