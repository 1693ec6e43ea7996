"""The model cards of the embedded models, generated from their configuration, their run.json and the texts below."""

import json
from pathlib import Path

from huggingface_hub import ModelCardData

from scratch_gpt2.hub.card import read_kind, render_card

JOB = {
    "base": "It continues children's stories. Start it with a prompt such as `Once upon a time`.",
    "assistant": """It writes a short story on request (with a given name, given words, or a happy or sad ending) and
continues stories. It greets and says what it is, and declines all other requests in one sentence. It knows no facts,
and it does not always use the requested words and names; see the results.""",
    "spam": """It detects spam in short English messages from Britain, Singapore and India. Its probabilities are
calibrated on the validation messages. Treat a label with a probability below `unsure_below` in config.json as
unsure.""",
}
DATA = {
    "base": """- TinyStories (Eldan and Li 2023, arXiv:2305.07759; CDLA-Sharing-1.0): 11,162 stories, three times.
- Fairy tales, fables, chapters of children's books and short stories in the public domain (FairytaleQA's stories,
  Apache-2.0; LCATS; Project Gutenberg): those with simple words, 15 MB.
- Dialogues of the Schema-Guided Dialogue dataset (Rastogi et al. 2020; CC BY-SA 4.0): 8 MB.
- English sentences of Tatoeba (tatoeba.org; CC BY 2.0 FR): 27,000, in groups of 20.

Documents are separated by the end-of-text token. Held out: the validation file of TinyStories, The Princess and Curdie
and 18 fairy tales, and the dialogues' dev set. None of the data is in this repository.""",
    "assistant": """Made by `space/make_instructions.py` from TinyStories (CDLA-Sharing-1.0); and, only as questions to
decline, the instruction data of "Build a Large Language Model (From Scratch)" (Raschka, Apache-2.0),
databricks-dolly-15k (CC BY-SA 3.0), the tasks of Self-Instruct (Apache-2.0), sums of `erikhyrkas/snakes` (MIT),
CommonsenseQA (MIT), OpenBookQA (Apache-2.0) and ARC (CC BY-SA 4.0). The test asks for stories of TinyStories'
validation file and for names that no story has. None of the data is in this repository.""",
    "spam": """The SMS Spam Collection v.1 (Almeida, Gómez Hidalgo and Yamakami, DocEng 2011), provided by its authors
free and without warranty, and half of the messages of `junioralive/india-spam-sms-classification` (MIT). Duplicates
were removed before the split (seed 42). Each training message is read five times, each time as it was sent,
without digits, without links or without both. The tokenizer lowercases its input. The network is the first
four blocks of `base`, first trained on as a language model on the training messages. None of the data is in this
repository.""",
}


def write_card(folder: Path, *commands: str) -> None:
    config, task, auto_class = read_kind(folder)
    run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    about = ModelCardData(license="mit", library_name="transformers", pipeline_tag=task, tags=["scratch_gpt2"])
    steps = "\n".join(f"python examples/{command}" for command in commands)
    notes = [
        JOB[folder.name] + " The weights are stored in bfloat16 and released under the MIT license.",
        f"## Data\n\n{DATA[folder.name]}",
        f"## Commands\n\nAs run by `space/make_checkpoints.py`, without file names; seed 42:\n\n```bash\n{steps}\n```",
        *comparison(run),
    ]
    plots = sorted(file.stem for file in folder.glob("*.png"))
    card = render_card(
        about,
        name=folder.name,
        config=config,
        run=run,
        plots=plots,
        notes="\n\n" + "\n\n".join(notes),
        repo_id=f"space/checkpoints/{folder.name}",
        auto_class=auto_class,
        with_code=False,
    )
    card.save(folder / "README.md")


def comparison(run: dict) -> list[str]:
    """A table for each model in `compared` of run.json, evaluated on the same data."""
    tables = []
    for name, metrics in run.get("compared", {}).items():
        rows = "\n".join(
            f"| {metric} | {run['metrics'][metric]:.4f} | {value:.4f} |" for metric, value in metrics.items()
        )
        tables.append(f"Compared with {name}:\n\n| metric | this model | {name} |\n| --- | ---: | ---: |\n{rows}")
    return ["## Compared\n\n" + "\n\n".join(tables)] if tables else []
