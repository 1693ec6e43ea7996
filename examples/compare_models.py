"""A report on one or several models, side by side: a table, a JSON file and a plot.

    python examples/compare_models.py --model checkpoints/my-gpt2 --text book.txt
    python examples/compare_models.py --model checkpoints/step-100 checkpoints/step-200 openai-community/gpt2 \\
        --text book.txt news.txt --hellaswag hellaswag_val.jsonl --output report
    python examples/compare_models.py --model checkpoints/spam --classification data/spam --output report
    python examples/compare_models.py --model checkpoints/my-gpt2 --smoke

Language models are evaluated by perplexity and bits per byte on each text, HellaSwag, and the speed and memory of
generation; classifiers by the test split of a folder from examples/prepare_classification.py. Each model runs in a
process of its own, one after the other. GPT-2 checkpoints of any origin are computed with our model, other
architectures, and with `--reference` GPT-2 too, with transformers' own. `--output report` writes report/report.json
and report/report.png. A model that cannot be evaluated is left out of the report, and the exit code is 1.
"""

if __name__ == "__main__":  # --help and mistyped options are answered before the imports below, which take seconds
    import os
    import runpy

    runpy.run_path(os.path.join(os.path.dirname(os.path.abspath(__file__)), "_quick.py"))

from dataclasses import dataclass, field
from pathlib import Path

from scratch_gpt2.cli import parse_arguments, run_main
from scratch_gpt2.data.text_classification import load_prepared
from scratch_gpt2.data.text_sources import parse_separator, read_whole_text
from scratch_gpt2.evaluation.hellaswag import PROTOCOLS, read_hellaswag
from scratch_gpt2.evaluation.models import is_first_process
from scratch_gpt2.evaluation.report import Plan, measure_all, plot, table, versions
from scratch_gpt2.files import check_outputs, check_plotting, write_json
from scratch_gpt2.tokenization import END_OF_TEXT

SMOKE_TEXT = "The cat sat on the mat. Where is the rat? The rat is under the hat of the cat, and that is where it sat."


@dataclass
class Arguments:
    model: list[str] = field(metadata={"help": "Folders or Hub ids of language models, adapters and classifiers."})
    tokenizer: str | None = field(
        default=None, metadata={"help": "Folder, Hub id or tiktoken:gpt2 for all models; by default each model's own."}
    )
    text: list[str] = field(default_factory=list, metadata={"help": "Text files in UTF-8, each evaluated separately."})
    context: int | None = field(
        default=None, metadata={"help": "Tokens in a window over a text; by default the model's number of positions."}
    )
    stride: int | None = field(
        default=None, metadata={"help": "Tokens by which the window advances; by default half a window."}
    )
    document_separator: str = field(
        default=END_OF_TEXT, metadata={"help": "Document separator in the texts; '' for none."}
    )
    hellaswag: str | None = field(default=None, metadata={"help": "HellaSwag's validation data in its original form."})
    hellaswag_limit: int | None = field(default=None, metadata={"help": "Use the first N examples only."})
    protocol: str = field(
        default="lm-eval",
        metadata={"help": "Protocol for HellaSwag; see examples/hellaswag.py.", "choices": list(PROTOCOLS)},
    )
    classification: str | None = field(
        default=None, metadata={"help": "Folder of prepared labeled texts, for classifiers."}
    )
    new_tokens: int = field(default=64, metadata={"help": "Tokens to generate for measuring the speed; 0: none."})
    batch_size: int = field(
        default=4, metadata={"help": "Windows, examples or texts per batch; affects speed and memory only."}
    )
    reference: bool = field(
        default=False, metadata={"help": "Compute GPT-2 checkpoints with transformers' GPT-2 instead of ours."}
    )
    no_optimize: bool = field(
        default=False,
        metadata={"help": "On a CPU, keep the kernels of the models as loaded, even if others are faster."},
    )
    output: str | None = field(default=None, metadata={"help": "Folder for report.json and report.png."})
    overwrite: bool = field(default=False, metadata={"help": "Replace a report in the output folder."})
    smoke: bool = field(default=False, metadata={"help": "Evaluate on one short sentence."})


def main() -> None:
    (arguments,) = parse_arguments(Arguments, description=__doc__)
    if not is_first_process():
        return
    if arguments.output:
        report_file, plot_file = Path(arguments.output, "report.json"), Path(arguments.output, "report.png")
        sources = [*arguments.text, arguments.hellaswag or "", *arguments.model]
        check_outputs([report_file, plot_file], inputs=sources, overwrite=arguments.overwrite)
        check_plotting()
    plan = make_plan(arguments)
    results, failures = measure_all(arguments.model, arguments.tokenizer, plan)
    if not results:
        raise next(iter(failures.values()))
    print(table(results))
    if arguments.output:
        settings = {"context": arguments.context, "stride": arguments.stride, "new_tokens": plan.new_tokens}
        write_json(report_file, {"versions": versions(), "settings": settings, "models": results})
        plot(results, plot_file)
        print(f"\n{report_file}\n{plot_file}")
    if failures:
        raise ValueError(f"Not evaluated, for the reasons above: {', '.join(failures)}.")


def make_plan(arguments: Arguments) -> Plan:
    if arguments.new_tokens < 0:
        raise ValueError(f"new_tokens is {arguments.new_tokens} but must be at least 0.")
    if arguments.hellaswag_limit is not None and arguments.hellaswag_limit < 1:
        raise ValueError(f"hellaswag_limit is {arguments.hellaswag_limit} but must be at least 1.")
    texts = {path: read_whole_text(path) for path in arguments.text}
    return Plan(
        texts=texts | ({"smoke": SMOKE_TEXT} if arguments.smoke else {}),
        context=arguments.context,
        stride=arguments.stride,
        separator=parse_separator(arguments.document_separator),
        hellaswag=read_hellaswag(arguments.hellaswag)[: arguments.hellaswag_limit] if arguments.hellaswag else [],
        protocol=arguments.protocol,
        classification=load_prepared(arguments.classification) if arguments.classification else None,
        new_tokens=min(arguments.new_tokens, 8) if arguments.smoke else arguments.new_tokens,
        batch_size=arguments.batch_size,
        reference=arguments.reference,
        optimize=not arguments.no_optimize,
    )


if __name__ == "__main__":
    run_main(main)
