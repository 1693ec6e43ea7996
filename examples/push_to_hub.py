"""Push a trained model or adapter to the Hugging Face Hub, with a model card, and check what has arrived.

    hf auth login
    python examples/push_to_hub.py --folder runs/assistant --repo_id assistant --license mit
    python examples/push_to_hub.py --folder runs/lora --repo_id me/lora --base me/gpt2 --private
    python examples/push_to_hub.py --folder runs/assistant --repo_id me/assistant --show     # the card; pushes nothing

`--folder` is what a training script left behind, or any saved model of this package. Pushed are the model, its code,
tokenizer with chat template, generation configuration, plots and numbers, in one commit; data, checkpoints, optimizer
states and training_args.bin stay here. The card is written from the run.json of the training script.

Afterwards another process loads the model by its id and has to compute the same outputs. It cannot see this package,
unless it needs the package for the base of an adapter.
"""

import argparse
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import constants
from transformers import HfArgumentParser

from scratch_gpt2.cli import run_main
from scratch_gpt2.hub.card import model_card
from scratch_gpt2.hub.push import check_pushed, files_to_push, push


@dataclass
class Arguments:
    folder: str = field(metadata={"help": "Folder of the model or adapter."})
    repo_id: str = field(metadata={"help": "user/name, or a name under the user who is logged in."})
    private: bool = field(default=False, metadata={"help": "Only you can see a repository that is created now."})
    base: str | None = field(default=None, metadata={"help": "Hub id of an adapter's base that was a local folder."})
    license: str | None = field(default=None, metadata={"help": "The Hub's name of a license, such as mit."})
    message: str = field(default="Push model", metadata={"help": "Message of the commit."})
    show: bool = field(default=False, metadata={"help": "Show the card and the list of files, and push nothing."})


def main() -> None:
    parser = HfArgumentParser(Arguments, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    (arguments,) = parser.parse_args_into_dataclasses()
    if arguments.show:
        files = files_to_push(Path(arguments.folder), arguments.base)
        print(model_card(arguments.folder, arguments.repo_id, arguments.license, arguments.base))
        print("files:", ", ".join(["README.md", *files]))
        return
    commit = push(
        arguments.folder,
        arguments.repo_id,
        private=arguments.private or None,
        base=arguments.base,
        license=arguments.license,
        message=arguments.message,
    )
    repo_id = commit.repo_url.repo_id
    difference = check_pushed(arguments.folder, repo_id, commit.oid, arguments.base)
    print(f"pushed {constants.ENDPOINT}/{repo_id}, commit {commit.oid[:8]}")
    print(f"loaded from there: outputs differ by {difference:g}")


if __name__ == "__main__":
    run_main(main)
