"""Perplexity and bits per byte of a language model on text files.

    python examples/perplexity.py --model checkpoints/my-gpt2 --text book.txt
    python examples/perplexity.py --model openai-community/gpt2 --text *.txt --stride 1024 --json perplexity.json
    accelerate launch --cpu examples/perplexity.py --model ckpt.pt --tokenizer tiktoken:gpt2 --text book.txt

A window of `--context` tokens slides over each file in steps of `--stride` tokens; see
`scratch_gpt2/evaluation/perplexity.py`. GPT-2 checkpoints of any origin are computed with our model, other
architectures with transformers' own classes. accelerate chooses the device.

Published GPT-2 results on WikiText-2 are for the rows of the Hub's dataset with a blank line between them, 287,644
tokens; the file `wiki.test.raw` itself has 286,221. This command writes the former:

    python -c "from datasets import load_dataset as load; \\
        rows = load('Salesforce/wikitext', 'wikitext-2-raw-v1', split='test')['text']; \\
        open('wikitext2.txt', 'w', encoding='utf-8', newline='').write('\\n\\n'.join(rows))"
"""

if __name__ == "__main__":  # --help and mistyped options are answered before the imports below, which take seconds
    import os
    import runpy

    runpy.run_path(os.path.join(os.path.dirname(os.path.abspath(__file__)), "_quick.py"))

from dataclasses import asdict, dataclass, field
from pathlib import Path

from accelerate import PartialState

from scratch_gpt2.cli import parse_arguments, run_main
from scratch_gpt2.data.text_sources import parse_separator, read_whole_text
from scratch_gpt2.evaluation.models import is_first_process, load_causal_lm, load_tokenizer_of
from scratch_gpt2.evaluation.perplexity import PerplexityResult, perplexity
from scratch_gpt2.files import check_outputs, write_json
from scratch_gpt2.tokenization import END_OF_TEXT, load_tokenizer


@dataclass
class Arguments:
    model: str = field(
        metadata={"help": "Folder or Hub id of a causal language model or an adapter, or nanoGPT's ckpt.pt."}
    )
    text: list[str] = field(metadata={"help": "Text files in UTF-8, each evaluated separately."})
    tokenizer: str | None = field(
        default=None, metadata={"help": "Folder, Hub id or tiktoken:gpt2; by default the model's."}
    )
    context: int | None = field(
        default=None, metadata={"help": "Tokens in a window; by default the model's number of positions."}
    )
    stride: int | None = field(
        default=None, metadata={"help": "Tokens by which the window advances; by default half a window."}
    )
    batch_size: int = field(default=4, metadata={"help": "Windows per batch; affects speed and memory only."})
    document_separator: str = field(
        default=END_OF_TEXT, metadata={"help": "Document separator in the texts; '' for none."}
    )
    json: str | None = field(default=None, metadata={"help": "File to write the results and their protocol to."})
    overwrite: bool = field(default=False, metadata={"help": "Replace the file of --json if it exists."})


def main() -> None:
    (arguments,) = parse_arguments(Arguments, description=__doc__)
    if not is_first_process():
        return
    if arguments.json:
        if not Path(arguments.json).absolute().parent.is_dir():
            raise FileNotFoundError(f"The folder for {arguments.json!r} does not exist; create it first.")
        check_outputs([arguments.json], inputs=[*arguments.text, arguments.model], overwrite=arguments.overwrite)
    texts = {path: read_whole_text(path) for path in arguments.text}
    tokenizer = load_tokenizer(arguments.tokenizer) if arguments.tokenizer else load_tokenizer_of(arguments.model)
    model = load_causal_lm(arguments.model).to(PartialState().device)

    results = {}
    for path, text in texts.items():
        results[path] = perplexity(
            model,
            tokenizer,
            text,
            context_length=arguments.context,
            stride=arguments.stride,
            batch_size=arguments.batch_size,
            separator=parse_separator(arguments.document_separator),
        )
    print_table(results, arguments.document_separator)
    if arguments.json:
        report = {
            "model": arguments.model,
            "tokenizer": arguments.tokenizer or arguments.model,
            "dtype": str(model.dtype).removeprefix("torch."),
            "results": [{"text": path} | asdict(result) for path, result in results.items()],
        }
        write_json(arguments.json, report)


def print_table(results: dict[str, PerplexityResult], separator: str) -> None:
    protocol = next(iter(results.values()))
    start_token = "a start token" if protocol.start_token else "no start token"
    print(f"windows of {protocol.context_length} tokens, stride {protocol.stride}, {start_token}, mean over tokens")
    print(f"{'perplexity':>12} {'bits/byte':>10} {'loss':>8} {'scored':>11} {'tokens':>11} {'bytes':>12}  text")
    for path, result in results.items():
        print(
            f"{result.perplexity:12.4f} {result.bits_per_byte:10.4f} {result.loss:8.4f} {result.scored_tokens:11,} "
            f"{result.tokens:11,} {result.bytes:12,}  {path}"
        )
    for path, result in results.items():
        if result.document_ends:
            print(f"{path}: {result.document_ends:,} x {separator}, each read as one end-of-text token, not as bytes")


if __name__ == "__main__":
    run_main(main)
