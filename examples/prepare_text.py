"""Turn text into token shards for examples/pretrain.py.

    python examples/prepare_text.py --input books/*.txt --output shards/books --train_tokenizer 8192
    python examples/prepare_text.py --hub HuggingFaceFW/fineweb-edu --hub_config sample-10BT --output shards/fineweb
    cat notes.txt | python examples/prepare_text.py --input - --output shards/notes --tokenizer runs/quickstart
    python examples/prepare_text.py --output shards/books --check

Documents are the rows of tables, and in text files what stands between separators, by default `<|endoftext|>`; each
is followed by the end-of-text id. The first shard, or a tenth of a small text, is for validation. The tokenizer is
saved in OUTPUT/tokenizer.

If the script is stopped, even by kill -9 or a full disk, the same command continues where it was, except from standard
input. The finished part of the text is read again for that, which from the Hub means downloaded, but not tokenized.
Shards of text that has changed since then are refused.

On several machines, each writes a part of the same input into a folder on a shared disk, and one of them merges:

    python examples/prepare_text.py --hub ... --output shards/fineweb --part 0/2     # on the first machine
    python examples/prepare_text.py --hub ... --output shards/fineweb --part 1/2     # on the second
    python examples/prepare_text.py --output shards/fineweb --merge

A cluster's scheduler only has to start these commands, one per task: with Slurm, `sbatch --array=0-15` on a script
with `--part $SLURM_ARRAY_TASK_ID/16`, then `sbatch --dependency=afterok:JOB` for the merge. A part that fails is
started again and continues. A part downloads only its own files from the Hub if their number is divisible by N.
With datatrove, a function is a step of the pipeline, for its Slurm and Ray executors too; save the tokenizer first:

    def write_part(documents, rank, world_size):
        pieces = ((document.text, True) for document in documents)
        folder = f"shards/web/part_{rank:05d}"
        write_token_shards(pieces, load_tokenizer("shards/web/tokenizer"), folder, "web", part=(rank, world_size))
    LocalPipelineExecutor([ParquetReader("web"), write_part], tasks=2, workers=2).run()
"""

if __name__ == "__main__":  # --help and mistyped options are answered before the imports below, which take seconds
    import os
    import runpy

    runpy.run_path(os.path.join(os.path.dirname(os.path.abspath(__file__)), "_quick.py"))

from dataclasses import dataclass, field

from scratch_gpt2.cli import parse_arguments, run_main
from scratch_gpt2.data.text_sources import find_files, parse_separator
from scratch_gpt2.data.text_to_shards import TextSource, text_to_shards
from scratch_gpt2.data.token_shards import merge_parts, verify
from scratch_gpt2.tokenization import END_OF_TEXT


@dataclass
class Arguments:
    output: str = field(metadata={"help": "Folder for the shards."})
    input: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Files or globs: .txt, .jsonl, .json, .csv, .tsv, .parquet, also as .gz, .bz2, .xz or .zst; - is "
            "standard input."
        },
    )
    hub: str | None = field(default=None, metadata={"help": "Data set on the Hugging Face Hub, streamed."})
    hub_config: str | None = field(default=None, metadata={"help": "Its configuration, such as sample-10BT."})
    hub_split: str = field(default="train", metadata={"help": "Its split."})
    text_column: str | None = field(
        default=None,
        metadata={
            "help": "Column with the text in tables and Hub data; by default text. With it, standard input is read as "
            "JSON lines."
        },
    )
    document_separator: str = field(
        default=END_OF_TEXT,
        metadata={
            "help": r"What stands between documents, such as '\n\n'; it becomes the end-of-text id. '' switches it "
            "off.",
        },
    )
    tokenizer: str = field(default="tiktoken:gpt2", metadata={"help": "Tokenizer: folder, Hub id or tiktoken:gpt2."})
    train_tokenizer: int | None = field(
        default=None,
        metadata={"help": "Train a new BPE of this vocabulary size on the first 100 million characters instead."},
    )
    shard_tokens: int | None = field(
        default=None,
        metadata={"help": "Tokens per shard; by default 100 million, or about a twentieth of smaller local input."},
    )
    part: str = field(default="0/1", metadata={"help": "I/N: tokenize every N-th document from document I on."})
    merge: bool = field(default=False, metadata={"help": "Join the parts in OUTPUT into one set."})
    check: bool = field(default=False, metadata={"help": "Compare the shards in OUTPUT with their checksums."})


def main() -> None:
    (args,) = parse_arguments(Arguments, description=__doc__)
    if args.merge:
        report(merge_parts(args.output), args.output)
    if args.check:
        print(f"Shards that match their checksums: {verify(args.output)}.")
    if args.merge or args.check:
        return
    part = parse_part(args.part)
    _, index = text_to_shards(
        text_source(args),
        args.output,
        tokenizer=args.tokenizer,
        vocab_size=args.train_tokenizer,
        shard_tokens=args.shard_tokens,
        part=part,
    )
    if part[1] == 1:
        report(index, args.output)
    else:
        report(index, f"{args.output}, part {args.part}")
        command = f"python examples/prepare_text.py --output {args.output} --merge"
        print(f"Part {args.part} is done. When all parts are done, run: {command}")


def text_source(args: Arguments) -> TextSource:
    if bool(args.input) == bool(args.hub):
        raise ValueError("Say where the text is: either --input with files or --hub with a data set.")
    return TextSource(
        files=tuple(find_files(args.input)),
        hub=args.hub,
        config=args.hub_config,
        split=args.hub_split,
        text_column=args.text_column,
        separator=parse_separator(args.document_separator),
    )


def parse_part(text: str) -> tuple[int, int]:
    which, _, parts = text.partition("/")
    if not (which.isdigit() and parts.isdigit() and int(which) < int(parts)):
        raise ValueError(f"--part {text} is not I/N with 0 <= I < N, such as 0/2.")
    return int(which), int(parts)


def report(index: dict, name: str) -> None:
    for split in ("train", "validation"):
        shards = [shard for shard in index["shards"] if shard["split"] == split]
        print(f"{name}: {sum(shard['tokens'] for shard in shards):,} {split} tokens in {len(shards)} shard(s)")


if __name__ == "__main__":
    run_main(main)
