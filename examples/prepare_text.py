"""Turn text into token shards for examples/pretrain.py.

    python examples/prepare_text.py --input books/*.txt --output shards/books --train_tokenizer 8192
    python examples/prepare_text.py --hub HuggingFaceFW/fineweb-edu --hub_config sample-10BT --output shards/fineweb
    cat notes.txt | python examples/prepare_text.py --input - --output shards/notes --tokenizer runs/quickstart
    python examples/prepare_text.py --output shards/books --check

Stopped at any point, even by kill -9 or a full disk, the same command goes on where it was, except for standard input.
What is finished is read once more for that, which from the Hub means downloaded, but not tokenized. The first shard is
for validation, of a small text a tenth; the tokenizer is kept in OUTPUT/tokenizer.

On several machines, each takes a part of the same input into a folder that all of them see, and one merges:

    python examples/prepare_text.py --hub ... --output shards/fineweb --part 0/2     # on the first machine
    python examples/prepare_text.py --hub ... --output shards/fineweb --part 1/2     # on the second
    python examples/prepare_text.py --output shards/fineweb --merge

A cluster's engine only has to start these commands, one a task: with Slurm, `sbatch --array=0-15` on a script that
says `--part $SLURM_ARRAY_TASK_ID/16`, then `sbatch --dependency=afterok:JOB` for the merge. A part that fails is
started again and goes on. From the Hub a part downloads its own files only, if N divides their number; take such an N.
With datatrove a function is a step of the pipeline, for its Slurm and Ray executors too; save the tokenizer beside:

    def write_part(documents, rank, world_size):
        pieces = ((document.text, True) for document in documents)
        folder = f"shards/web/part_{rank:05d}"
        write_token_shards(pieces, load_tokenizer("shards/web/tokenizer"), folder, "web", part=(rank, world_size))
    LocalPipelineExecutor([ParquetReader("web"), write_part], tasks=2, workers=2).run()
"""

import contextlib
import itertools
import os
import shutil
import sys
import uuid
from dataclasses import dataclass, field
from pathlib import Path

from transformers import HfArgumentParser

from scratch_gpt2.cli import offline_unless_hub_answers, run_main
from scratch_gpt2.data.encoding import tokenizer_fingerprint
from scratch_gpt2.data.text_sources import find_files, read_files, read_hub, take_part
from scratch_gpt2.data.token_shards import INDEX, SHARD_TOKENS, merge_parts, verify, write_token_shards
from scratch_gpt2.tokenization import load_tokenizer, train_tokenizer


@dataclass
class Arguments:
    output: str = field(metadata={"help": "folder for the shards"})
    input: list[str] = field(
        default_factory=list, metadata={"help": "files or globs: .txt, .jsonl, .parquet; - is standard input"}
    )
    hub: str | None = field(default=None, metadata={"help": "data set on the Hugging Face Hub, streamed"})
    hub_config: str | None = field(default=None, metadata={"help": "its configuration, such as sample-10BT"})
    hub_split: str = field(default="train", metadata={"help": "its split"})
    text_column: str = field(
        default="text", metadata={"help": "column with the text in .jsonl, .parquet and Hub data"}
    )
    document_separator: str | None = field(
        default=None, metadata={"help": "what stands between the documents of a .txt file; without it a file is one"}
    )
    tokenizer: str = field(default="tiktoken:gpt2", metadata={"help": "tokenizer: folder, Hub id or tiktoken:gpt2"})
    train_tokenizer: int | None = field(
        default=None, metadata={"help": "train a new BPE of this vocabulary size on the first 100 MB of the input"}
    )
    shard_tokens: int | None = field(
        default=None,
        metadata={"help": "tokens a shard; default 100 million, or about a twentieth of smaller local input"},
    )
    part: str = field(default="0/1", metadata={"help": "I/N: tokenize every N-th document from document I on"})
    merge: bool = field(default=False, metadata={"help": "join the parts in OUTPUT into one set"})
    check: bool = field(default=False, metadata={"help": "compare the shards in OUTPUT with their checksums"})


def main() -> None:
    (args,) = HfArgumentParser(Arguments, description=__doc__.split("\n")[0]).parse_args_into_dataclasses()
    if args.merge:
        report(merge_parts(args.output), args.output)
    if args.check:
        print(f"{verify(args.output)} shards are as they were written.")
    if args.merge or args.check:
        return
    if bool(args.input) == bool(args.hub):
        raise ValueError("Say where the text is: either --input with files or --hub with a data set.")
    if args.hub:
        offline_unless_hub_answers(args.hub)
    files = find_files(args.input)
    part = parse_part(args.part)
    folder = Path(args.output) if part[1] == 1 else Path(args.output, f"part_{part[0]:05d}")
    if "-" in files and (folder / INDEX).is_file():
        raise ValueError(f"{folder} has shards, and standard input cannot be read again to go on; delete it.")
    tokenizer = make_tokenizer(args, files)
    new = not Path(args.output, "tokenizer").is_dir()
    try:
        save_once(tokenizer, Path(args.output, "tokenizer"))
        pieces = read(args, files, part)
        index = write_token_shards(pieces, tokenizer, folder, describe(args, files), shard_size(args, files), part)
    except (ValueError, OSError):
        remove_if_nothing_was_written(Path(args.output), folder, with_tokenizer=new and part[1] == 1)
        raise
    report(index, folder)
    if part[1] > 1:
        print(
            f"Part {args.part} is done; when all are: python examples/prepare_text.py --output {args.output} --merge"
        )


def read(args: Arguments, files: list[str], part: tuple[int, int] = (0, 1)):
    if args.hub:
        return read_hub(args.hub, args.hub_config, args.hub_split, args.text_column, part)
    return take_part(read_files(files, args.text_column, args.document_separator), part)


def describe(args: Arguments, files: list[str]) -> str:
    """All that decides which text is read, for the index: shards of other text must not be mixed with it."""
    if args.hub:
        origin = f"{args.hub}, configuration {args.hub_config}, split {args.hub_split}"
    else:
        origin = ", ".join(f"{file} ({size_of(file)} bytes)" if file != "-" else "stdin" for file in files)
    return f"{origin}; column {args.text_column}, separator {args.document_separator!r}"


def make_tokenizer(args: Arguments, files: list[str]):
    saved = Path(args.output, "tokenizer")
    if args.train_tokenizer is None:
        return load_tokenizer(args.tokenizer)
    if saved.is_dir():
        return load_tokenizer(saved)
    if "-" in files:
        raise ValueError("Standard input can be read only once: train the tokenizer on files, or choose one.")
    characters = itertools.accumulate(len(text) for text, _ in read(args, files))
    enough = sum(1 for _ in itertools.takewhile(lambda total: total < 100_000_000, characters)) + 1
    texts = (text for text, _ in itertools.islice(read(args, files), enough))
    print(f"Training a tokenizer of {args.train_tokenizer} tokens ...", file=sys.stderr)
    return train_tokenizer(texts, args.train_tokenizer)


def save_once(tokenizer, folder: Path) -> None:
    """Save under another name and rename, because another part may be doing the same; the first one wins."""
    if not folder.is_dir():
        unfinished = folder.with_name(f".tokenizer-{uuid.uuid4().hex}")
        tokenizer.save_pretrained(unfinished)
        try:
            os.rename(unfinished, folder)
        except OSError:  # another part was faster
            shutil.rmtree(unfinished)
    if tokenizer_fingerprint(load_tokenizer(folder)) != tokenizer_fingerprint(tokenizer):
        raise ValueError(f"{folder} is another tokenizer; use it, delete it or choose another output.")


def remove_if_nothing_was_written(output: Path, folder: Path, with_tokenizer: bool) -> None:
    if not (folder / INDEX).is_file():
        if with_tokenizer:
            shutil.rmtree(output / "tokenizer", ignore_errors=True)
        for empty in (folder, output):
            with contextlib.suppress(OSError):
                empty.rmdir()


def parse_part(text: str) -> tuple[int, int]:
    which, _, parts = text.partition("/")
    if not (which.isdigit() and parts.isdigit() and int(which) < int(parts)):
        raise ValueError(f"--part {text} is not I/N with 0 <= I < N, such as 0/2.")
    return int(which), int(parts)


def shard_size(args: Arguments, files: list[str]) -> int:
    if args.shard_tokens is not None:
        if args.shard_tokens < 1:
            raise ValueError(f"--shard_tokens is {args.shard_tokens} but must be at least 1.")
        return args.shard_tokens
    if args.hub or "-" in files:
        return SHARD_TOKENS
    tokens = sum(map(size_of, files)) // 4  # English has about 4 bytes a token, a parquet file packs more into them
    return min(SHARD_TOKENS, max(1, tokens // 20))


def size_of(file: str) -> int:
    return Path(file).stat().st_size


def report(index: dict, folder) -> None:
    for split in ("train", "validation"):
        shards = [shard for shard in index["shards"] if shard["split"] == split]
        print(f"{folder}: {sum(shard['tokens'] for shard in shards):,} {split} tokens in {len(shards)} shards")


if __name__ == "__main__":
    run_main(main)
