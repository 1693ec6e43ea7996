"""Put the Space on the Hugging Face Hub: this folder's files, its models and the package, and nothing else.

hf auth login
python space/deploy.py --repo you/scratch-gpt2            shows the list of files and asks
python space/deploy.py --repo you/scratch-gpt2 --private --yes
"""

import argparse
import re
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi

from scratch_gpt2.cli import run_main

SPACE = Path(__file__).resolve().parent
PACKAGE = SPACE.parent / "scratch_gpt2"
PAGE = ["README.md", "requirements.txt", "sample.csv", "style.css"]
MODULES = ["app", "classifier", "controls", "generation", "handlers", "limits", "markup", "models", "page", "table"]
MODULES += ["turns", "views", "walk"]
MODEL_SUFFIXES = {".jinja", ".json", ".md", ".png", ".safetensors"}
PACKAGE_SUFFIXES = {".py", ".md", ".typed"}
SECRET_NAMES = re.compile(r"^\.|credential|secret|\.(pem|key|p12|pfx)$|^id_(rsa|ed25519)|^token$", re.IGNORECASE)
SECRETS = re.compile(
    rb"\b(hf_[A-Za-z0-9]{30,}|sk-[A-Za-z0-9_-]{20,}|gh[opsu]_[A-Za-z0-9]{30,}|AKIA[0-9A-Z]{16})\b"
    rb"|BEGIN [A-Z ]*PRIVATE KEY"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repo", required=True, help="owner/name of the Space; created if it does not exist.")
    parser.add_argument("--private", action="store_true", help="Make a new Space visible to you alone.")
    parser.add_argument("--yes", action="store_true", help="Upload without asking.")
    options = parser.parse_args()
    files = files_to_upload()
    for name, file in files.items():
        print(f"{file.stat().st_size:>12,}  {name}")
    size = sum(file.stat().st_size for file in files.values())
    print(f"{size:>12,}  bytes in {len(files)} files")
    if not options.yes and input(f"Upload them to {options.repo}? [y/N] ").strip().lower() not in ("y", "yes"):
        print("Nothing was uploaded.")
        return
    print(deploy(HfApi(), options.repo, options.private, files))


def deploy(api: HfApi, repo: str, private: bool, files: dict[str, Path]) -> str:
    """Upload in one commit; return the address.

    Raises ConnectionError where the Hub cannot be reached or refuses.
    """
    try:
        api.create_repo(repo, repo_type="space", space_sdk="gradio", private=private, exist_ok=True)
        operations = [CommitOperationAdd(name, file) for name, file in files.items()]
        api.create_commit(repo, operations, repo_type="space", commit_message="Deploy the Space")
    except ValueError:  # an invalid name
        raise
    except Exception as error:  # httpx's and huggingface_hub's
        raise ConnectionError(
            f"The Space {repo!r} could not be written ({str(error).splitlines()[0]}); log in with `hf auth login`, "
            "check the network, and unset HF_HUB_OFFLINE."
        ) from error
    return f"{api.endpoint}/spaces/{repo}"


def files_to_upload() -> dict[str, Path]:
    """By their paths in the Space: the page, its models, and the package, to which the Space is the parent folder.

    Raises FileNotFoundError for a file of the page that is missing, and ValueError for one that looks like a secret.
    """
    files = {name: SPACE / name for name in [*PAGE, *(f"{module}.py" for module in MODULES)]}
    files |= below(SPACE / "checkpoints", MODEL_SUFFIXES) | below(PACKAGE, PACKAGE_SUFFIXES)
    for name, file in files.items():
        if file.is_symlink() or looks_like_a_secret(file):
            raise ValueError(f"{name} looks like a secret or is a link; remove it from the folder before you deploy.")
    return dict(sorted(files.items()))


def below(folder: Path, suffixes: set[str]) -> dict[str, Path]:
    """Files with one of `suffixes`, by their path from the folder's parent; nothing in hidden folders."""
    paths = {path.relative_to(folder.parent): path for path in folder.rglob("*") if path.suffix in suffixes}
    hidden = {path for path in paths if any(part.startswith(".") for part in path.parts[:-1])}
    return {path.as_posix(): paths[path] for path in paths if path not in hidden and paths[path].is_file()}


def looks_like_a_secret(file: Path) -> bool:
    """By its name or, for everything but weights and pictures, its content."""
    if SECRET_NAMES.search(file.name):
        return True
    return file.suffix not in (".safetensors", ".png") and bool(SECRETS.search(file.read_bytes()))


if __name__ == "__main__":
    run_main(main)
