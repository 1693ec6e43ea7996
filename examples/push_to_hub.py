"""Push a trained model or adapter to the Hugging Face Hub, with a model card, and verify the pushed model.

    hf auth login
    python examples/push_to_hub.py --folder runs/assistant --repo_id assistant --license mit
    python examples/push_to_hub.py --folder runs/lora --repo_id me/lora --base me/gpt2 --private
    python examples/push_to_hub.py --folder runs/assistant --repo_id me/assistant --show     # the card; pushes nothing

`--folder` is the output folder of a training script, or any saved model of this package. One commit contains the
model, its code, the tokenizer with its chat template, the generation configuration, plots and numbers. Data,
checkpoints, optimizer states and training_args.bin are not pushed. The card is written from the run.json of the
training script.

Afterwards another process loads the model by its id and must compute the same outputs. It cannot import this package,
unless the base of an adapter needs it.
"""

if __name__ == "__main__":  # --help and mistyped options are answered before the imports below, which take seconds
    import os
    import runpy

    runpy.run_path(os.path.join(os.path.dirname(os.path.abspath(__file__)), "_quick.py"))

from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import constants

from scratch_gpt2.cli import parse_arguments, run_main
from scratch_gpt2.hub.card import model_card
from scratch_gpt2.hub.push import check_pushed, files_to_push, local_outputs, push


@dataclass
class Arguments:
    folder: str = field(metadata={"help": "Folder of the model or adapter."})
    repo_id: str = field(metadata={"help": "user/name, or a name in the account that is logged in."})
    private: bool = field(default=False, metadata={"help": "Create the repository as a private one."})
    base: str | None = field(default=None, metadata={"help": "Hub id of an adapter's base that was a local folder."})
    license: str | None = field(default=None, metadata={"help": "License, by the Hub's name for it, such as mit."})
    message: str = field(default="Push model", metadata={"help": "Commit message."})
    show: bool = field(default=False, metadata={"help": "Show the model card and the list of files; push nothing."})


def main() -> None:
    (arguments,) = parse_arguments(Arguments, description=__doc__)
    files = files_to_push(Path(arguments.folder), arguments.base)
    if arguments.show:
        print(model_card(arguments.folder, arguments.repo_id, arguments.license, arguments.base))
        print("files:", ", ".join(["README.md", *files]))
        return
    local_outputs(arguments.folder, arguments.base)  # raises for a model that could not be loaded from the Hub either
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
