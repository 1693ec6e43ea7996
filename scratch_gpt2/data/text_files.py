"""Text from files and standard input: compressed or not, with or without a byte order mark."""

import bz2
import gzip
import io
import lzma
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TextIO

STDIN = "-"


def open_zstd(file: str, mode: str) -> io.BufferedReader:
    import pyarrow

    return io.BufferedReader(pyarrow.input_stream(file, compression="zstd"))


OPENERS: dict[str, Callable[[str, str], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": open_zstd,
}


def kind_of(file: str) -> str:
    """The suffix that says what a file holds, in lower case: `.jsonl` for `Rows.JSONL.gz`."""
    path = Path(file)
    return (path.with_suffix("") if is_compressed(file) else path).suffix.lower()


def is_compressed(file: str) -> bool:
    return Path(file).suffix.lower() in OPENERS


def open_binary(file: str) -> IO[bytes]:
    """The bytes of a file, decompressed where its suffix is one of `OPENERS`."""
    return OPENERS.get(Path(file).suffix.lower(), open)(file, "rb")


@contextmanager
def open_text(file: str, newline: str | None = "") -> Iterator[TextIO]:
    """Text in UTF-8 without its byte order mark; `-` is standard input. `newline` is that of `open`.

    Inside the `with` block, raises ValueError for text that is not UTF-8 and for damaged compressed data.
    """
    with readable(file):
        if file == STDIN:
            if isinstance(sys.stdin, io.TextIOWrapper):
                sys.stdin.reconfigure(encoding="utf-8-sig", newline=newline)
            yield sys.stdin
        else:
            with open_binary(file) as opened:
                check_not_utf16(opened, file)
                yield io.TextIOWrapper(opened, encoding="utf-8-sig", newline=newline)


def read_stdin() -> str:
    """All of standard input, line breaks as line feeds."""
    with open_text(STDIN, newline=None) as opened:
        return opened.read()


@contextmanager
def readable(file: str) -> Iterator[None]:
    """Turn what reading a file can raise into one sentence that names it."""
    name = "standard input" if file == STDIN else file
    try:
        yield
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise ValueError(f"{name} is not UTF-8 (byte {byte:#04x}); convert it, e.g. with iconv.") from error
    except (EOFError, OSError, lzma.LZMAError, zlib.error) as error:
        if isinstance(error, OSError) and error.errno is not None:  # the system's own, which names the file
            raise
        raise ValueError(f"{name} is damaged, or not compressed as its suffix says: {error}.") from error


def check_not_utf16(opened: IO[bytes], file: str) -> None:
    """Raise ValueError for UTF-16, which without a byte order mark would pass for UTF-8 with a NUL in every pair."""
    start = opened.peek(2)[:1024]  # type: ignore[attr-defined]
    if start[:2] in (b"\xff\xfe", b"\xfe\xff") or start.count(0) > len(start) // 3:
        raise ValueError(
            f"{file} is not UTF-8 but UTF-16 or a binary file; convert text with: iconv -f UTF-16 -t UTF-8."
        )
