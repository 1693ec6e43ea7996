"""Put the Space on the Hugging Face Hub: this folder, and the package beside it.

hf auth login
python space/deploy.py --repo you/scratch-gpt2
python space/deploy.py --repo you/scratch-gpt2 --private
"""

import argparse
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi

from scratch_gpt2.cli import run_main

SPACE = Path(__file__).resolve().parent
PACKAGE = SPACE.parent / "scratch_gpt2"
LEFT_OUT = {"__pycache__", ".ruff_cache"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repo", required=True, help="owner/name of the Space; made if it does not exist.")
    parser.add_argument("--private", action="store_true", help="Visible to you alone, if it is new.")
    arguments = parser.parse_args()
    print(deploy(HfApi(), arguments.repo, arguments.private))


def deploy(api: HfApi, repo: str, private: bool) -> str:
    """Upload in one commit; return the address.

    Raises ConnectionError where the Hub cannot be reached or refuses.
    """
    files = files_to_upload()
    try:
        api.create_repo(repo, repo_type="space", space_sdk="gradio", private=private, exist_ok=True)
        operations = [CommitOperationAdd(name, file) for name, file in files.items()]
        api.create_commit(repo, operations, repo_type="space", commit_message="Deploy the Space")
    except ValueError:  # a name that is none
        raise
    except Exception as error:  # httpx's and huggingface_hub's
        raise ConnectionError(
            f"The Space {repo!r} could not be written ({str(error).splitlines()[0]}); log in with `hf auth login`, "
            "and see that the network is there and HF_HUB_OFFLINE is not set."
        ) from error
    return f"{api.endpoint}/spaces/{repo}"


def files_to_upload() -> dict[str, Path]:
    """By their paths in the Space: what this folder holds, and the package, of which the Space is the parent."""
    files = {file.relative_to(SPACE).as_posix(): file for file in SPACE.rglob("*") if file.is_file()}
    files |= {f"scratch_gpt2/{file.relative_to(PACKAGE).as_posix()}": file for file in PACKAGE.rglob("*.py")}
    return {name: file for name, file in sorted(files.items()) if not LEFT_OUT & set(Path(name).parts)}


if __name__ == "__main__":
    run_main(main)
