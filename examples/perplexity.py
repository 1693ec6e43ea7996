"""Perplexity and bits per byte of a language model on text files.

    python examples/perplexity.py --model checkpoints/my-gpt2 --text book.txt
    python examples/perplexity.py --model openai-community/gpt2 --text *.txt --stride 1024 --json perplexity.json
    accelerate launch --cpu examples/perplexity.py --model ckpt.pt --tokenizer tiktoken:gpt2 --text book.txt

Each file is one text, over which a window of `--context` tokens slides in steps of `--stride`; see
`scratch_gpt2/evaluation/perplexity.py`. GPT-2 checkpoints of any origin are computed with our model, other
architectures with transformers' own classes. The device is the one that accelerate chooses.

Published GPT-2 figures on WikiText-2 are for the rows of the Hub's data set with a blank line between them, 287,644
tokens; the file `wiki.test.raw` as it is has 286,221. This writes the former:

    python -c "from datasets import load_dataset as load; \\
        rows = load('Salesforce/wikitext', 'wikitext-2-raw-v1', split='test')['text']; \\
        open('wikitext2.txt', 'w', encoding='utf-8', newline='').write('\\n\\n'.join(rows))"
"""

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

from accelerate import PartialState
from transformers import HfArgumentParser

from scratch_gpt2.cli import run_main
from scratch_gpt2.data.text_sources import parse_separator, read_whole_text
from scratch_gpt2.evaluation.models import load_causal_lm
from scratch_gpt2.evaluation.perplexity import perplexity
from scratch_gpt2.tokenization import END_OF_TEXT, load_tokenizer


@dataclass
class Arguments:
    model: str = field(metadata={"help": "Folder or Hub id of a causal language model, or nanoGPT's ckpt.pt."})
    text: list[str] = field(metadata={"help": "Text files in UTF-8, each measured by itself."})
    tokenizer: str | None = field(
        default=None, metadata={"help": "Folder, Hub id or tiktoken:gpt2; by default the model's."}
    )
    context: int | None = field(
        default=None, metadata={"help": "Tokens in a window; by default as many as the model has positions."}
    )
    stride: int | None = field(
        default=None, metadata={"help": "Tokens by which the window moves on; by default half a window."}
    )
    batch_size: int = field(default=4, metadata={"help": "Windows computed together; changes speed and memory only."})
    document_separator: str = field(
        default=END_OF_TEXT,
        metadata={"help": "What stands between documents of a text; '' switches it off."},
    )
    json: str | None = field(default=None, metadata={"help": "File to write the figures and their protocol to."})


def main() -> None:
    (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    texts = {path: read_whole_text(path) for path in arguments.text}
    if arguments.json and not Path(arguments.json).absolute().parent.is_dir():
        raise FileNotFoundError(f"The folder for {arguments.json!r} does not exist; create it first.")
    tokenizer = load_tokenizer(arguments.tokenizer or arguments.model)
    model = load_causal_lm(arguments.model).to(PartialState().device)

    results = {
        path: perplexity(
            model,
            tokenizer,
            text,
            context_length=arguments.context,
            stride=arguments.stride,
            batch_size=arguments.batch_size,
            separator=parse_separator(arguments.document_separator),
        )
        for path, text in texts.items()
    }
    print_table(results)
    if arguments.json:
        write_json(arguments, str(model.dtype).removeprefix("torch."), results)


def print_table(results) -> None:
    protocol = next(iter(results.values()))
    start_token = "a start token" if protocol.start_token else "no start token"
    print(f"windows of {protocol.context_length} tokens, stride {protocol.stride}, {start_token}, mean over tokens")
    print(f"{'perplexity':>12} {'bits/byte':>10} {'loss':>8} {'scored':>11} {'tokens':>11} {'bytes':>12}  text")
    for path, result in results.items():
        print(
            f"{result.perplexity:12.4f} {result.bits_per_byte:10.4f} {result.loss:8.4f} {result.scored_tokens:11,} "
            f"{result.tokens:11,} {result.bytes:12,}  {path}"
        )


def write_json(arguments: Arguments, dtype: str, results) -> None:
    report = {
        "model": arguments.model,
        "tokenizer": arguments.tokenizer or arguments.model,
        "dtype": dtype,
        "results": [{"text": path} | asdict(result) for path, result in results.items()],
    }
    unfinished = f"{arguments.json}.tmp"
    Path(unfinished).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    os.replace(unfinished, arguments.json)


if __name__ == "__main__":
    run_main(main)
