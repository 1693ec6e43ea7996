"""Train the models of the Space and write checkpoints/: a base, and a spam classifier and an assistant as adapters.

python space/make_checkpoints.py --text books/*.txt --sms SMSSpamCollection --instructions instruction-data.json

About two hours on one core; started again, it goes on where it was stopped. Needs examples/ beside this folder.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from huggingface_hub import ModelCardData
from models import Checkpoints
from safetensors.torch import load_file, save_file
from transformers import set_seed

from scratch_gpt2 import ScratchGPT2ForCausalLM, ScratchGPT2ForSequenceClassification
from scratch_gpt2.cli import run_main
from scratch_gpt2.data.instructions import read_instructions
from scratch_gpt2.evaluation.metrics import classification_metrics
from scratch_gpt2.evaluation.responses import reference_loss, reference_metrics
from scratch_gpt2.hub.card import render_card
from scratch_gpt2.prediction import batches_by_length, classify_text, encode_prompts, respond

SPACE = Path(__file__).resolve().parent
EXAMPLES = SPACE.parent / "examples"
CHECKPOINTS = SPACE / "checkpoints"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")

# The recipes. Nothing else is given to the scripts but files and folders.
SHARDS = "--train_tokenizer 8192"
BASE = (
    "--preset tiny --n_layer 6 --n_embd 320 --n_head 5 --n_positions 512 --optimizer muon --learning_rate 4e-3 "
    "--max_steps 1000 --tokens_per_step 4096 --per_device_train_batch_size 8 --eval_tokens 32768 --eval_steps 100 "
    "--save_steps 100 --save_total_limit 1 --sample_steps 500 --use_cpu"
)
MESSAGES_RECIPE = "--unescape --seed 42"
SPAM = (
    "--train lora --lora_rank 32 --lora_alpha 64 --learning_rate 1e-3 --num_train_epochs 5 --max_length 128 "
    "--train_sampling_strategy group_by_length --use_cpu"
)
ASSISTANT = "--lora --lora_rank 128 --lora_alpha 256 --pack --learning_rate 1e-3 --num_train_epochs 6 --use_cpu"

DATA = {
    "base": """Text in the public domain: Shakespeare's plays (`tiny_shakespeare`) and books by Austen and others from
Project Gutenberg. A sample of TinyStories (Eldan and Li 2023, CDLA-Sharing-1.0). WikiText-2's test text (Merity et al.
2016, CC BY-SA 3.0 and GFDL). None of it is in this repository. The stories are divided by `<|endoftext|>` as ordinary
text, so the model writes that too.""",
    "spam": """The SMS Spam Collection v.1 (Almeida, Gómez Hidalgo and Yamakami, DocEng 2011), provided by its authors
free and without warranty. Duplicates were removed before it was split (seed 42): 3,619 messages to train on, 517 to
choose the epoch, 1,035 to test. None of it is in this repository.""",
    "assistant": """The 1,100 instructions of "Build a Large Language Model (From Scratch)" (Raschka, Apache-2.0): 935
to train on, 55 to choose the epoch, 110 kept back. None of it is in this repository. No data with a non-commercial
licence was used.""",
}
PROMPTS = ("Once upon a time", "The king said to the queen that", "She was a young woman of")
MESSAGES = (
    "Congratulations! You have won a £1000 prize. Call 09061701461 now to claim.",
    "Are you coming home for dinner tonight?",
    "Dear customer, you won 25 lakh rupees in the KBC lottery. WhatsApp us your bank details today.",
    "I sent the 500 rupees for the bus tickets, please check your account.",
)
SHOWN_ANSWERS, ANSWER_TOKENS = 6, 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", nargs="+", required=True, help="files for the base")
    parser.add_argument("--sms", required=True, help="the SMS Spam Collection, label<TAB>text")
    parser.add_argument("--instructions", required=True, help="the instruction data, JSON")
    parser.add_argument("--work", type=Path, default=Path("runs/space"), help="folder for data and runs")
    arguments = parser.parse_args()
    make_base(arguments.text, arguments.work)
    make_spam(arguments.sms, arguments.work)
    make_assistant(arguments.instructions, arguments.work)


def make_base(text: list[str], work: Path) -> None:
    run_example("prepare_text.py", SHARDS, "--input", *text, "--output", work / "shards")
    run, target = work / "base", CHECKPOINTS / "base"
    run_example("pretrain.py", BASE, "--data", work / "shards", "--output_dir", run, *resume(run))
    copy(run, target, *TOKENIZER, "run.json", "curves.png", "generation_config.json")
    shrink(run / "model.safetensors", target / "model.safetensors")
    copy_config(run / "config.json", target / "config.json", dtype="bfloat16")
    model, tokenizer = Checkpoints(CHECKPOINTS).load("base", ScratchGPT2ForCausalLM)
    record(target, samples=base_samples(model, tokenizer))
    write_card(target, f"prepare_text.py {SHARDS}", f"pretrain.py {BASE}")


def make_spam(sms: str, work: Path) -> None:
    data, run, target = work / "sms", work / "spam", CHECKPOINTS / "spam"
    if not data.is_dir():
        run_example("prepare_classification.py", MESSAGES_RECIPE, "--input", sms, "--output", data)
    files = ("--model", CHECKPOINTS / "base", "--data", data, "--output_dir", run)
    run_example("classify.py", SPAM, *files, *resume(run))
    copy(run, target, *TOKENIZER, "run.json", "epochs.png", "confusion_matrix.png")
    copy_adapter(run / "adapter", target)
    copy_config(run / "config.json", target / "config.json")
    model, tokenizer = Checkpoints(CHECKPOINTS).load("spam", ScratchGPT2ForSequenceClassification)
    metrics, samples = spam_results(model, tokenizer, data / "test.jsonl")
    record(target, split="test", metrics=metrics, samples=samples)
    write_card(target, f"prepare_classification.py {MESSAGES_RECIPE}", f"classify.py {SPAM}")


def make_assistant(instructions: str, work: Path) -> None:
    run, target = work / "assistant", CHECKPOINTS / "assistant"
    files = ("--model", CHECKPOINTS / "base", "--data", instructions, "--output_dir", run)
    run_example("sft.py", ASSISTANT, *files, *resume(run))
    copy(run, target, *TOKENIZER, "run.json", "curves.png")
    copy_adapter(run, target)
    model, tokenizer = Checkpoints(CHECKPOINTS).load("assistant", ScratchGPT2ForCausalLM)
    metrics, samples = assistant_results(model, tokenizer, run / "test.json")
    record(target, split="test", metrics=metrics, samples=samples)
    write_card(target, f"sft.py {ASSISTANT}")


def run_example(script: str, recipe: str, *arguments: str | Path) -> None:
    """Raises ChildProcessError where it fails; what it says has been printed."""
    command = [sys.executable, str(EXAMPLES / script), *recipe.split(), *map(str, arguments)]
    if subprocess.run(command, check=False).returncode != 0:
        raise ChildProcessError(f"{script} failed: see above, and start this script again to go on.")


def resume(run: Path) -> list[str]:
    return ["--resume"] if list(run.glob("checkpoint-*")) else []


def copy(source: Path, target: Path, *names: str) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for name in names:
        shutil.copyfile(source / name, target / name)


def shrink(source: Path, target: Path) -> None:
    """Copy safetensors in bfloat16."""
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(source).items()}
    save_file(tensors, target, metadata={"format": "pt"})


def copy_config(source: Path, target: Path, **changes: object) -> None:
    """Without `auto_map`: the package stands beside the Space, so that there is no second copy of its code."""
    config = json.loads(source.read_text()) | changes
    del config["auto_map"]
    target.write_text(json.dumps(config, indent=2) + "\n")


def copy_adapter(source: Path, target: Path) -> None:
    shrink(source / "adapter_model.safetensors", target / "adapter_model.safetensors")
    config = json.loads((source / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "checkpoints/base"
    (target / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def base_samples(model, tokenizer) -> list[tuple[str, str]]:
    samples = []
    for prompt in PROMPTS:
        set_seed(0)
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        output = model.generate(ids, do_sample=True, top_k=50, temperature=0.8, max_new_tokens=60)
        samples.append((prompt, tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)))
    return samples


def spam_results(model, tokenizer, test: Path) -> tuple[dict, list[tuple[str, str]]]:
    """Metrics on the test messages, and samples."""
    rows = [json.loads(line) for line in test.read_text(encoding="utf-8").split("\n") if line]
    names = list(model.config.label2id)
    scores = [[found[name] for name in names] for found in classify_text(model, tokenizer, [r["text"] for r in rows])]
    predictions = torch.tensor(scores).argmax(-1)
    references = [names.index(row["label"]) for row in rows]
    metrics = classification_metrics(predictions, references, scores, label_names=names)
    del metrics["confusion_matrix"]
    answers = [next(iter(found.items())) for found in classify_text(model, tokenizer, MESSAGES)]
    return metrics, list(zip(MESSAGES, [f"{label} {probability:.3f}" for label, probability in answers], strict=True))


def assistant_results(model, tokenizer, test: Path) -> tuple[dict, list[tuple[str, str]]]:
    """Metrics of the greedy answers to the instructions kept back, and the first of these answers."""
    longest = model.config.n_positions - ANSWER_TOKENS
    conversations, prompts = encode_prompts(tokenizer, read_instructions([str(test)]), longest)
    answers = {}
    for batch in batches_by_length([len(ids) for ids in prompts], 16):
        responses = respond(
            model, tokenizer, [prompts[row] for row in batch], max_new_tokens=ANSWER_TOKENS, do_sample=False
        )
        answers |= dict(zip(batch, responses, strict=True))
    texts = [answers[row].text for row in range(len(prompts))]
    metrics = reference_metrics(texts, [conversation.output for conversation in conversations])
    metrics["perplexity_of_references"] = reference_loss(model, tokenizer, conversations).perplexity
    metrics["answers_that_end"] = sum(answer.stopped for answer in answers.values()) / len(answers)
    shown = conversations[:SHOWN_ANSWERS]
    questions = [row.instruction + (f"\n{row.input}" if row.input else "") for row in shown]
    return metrics, list(zip(questions, texts[:SHOWN_ANSWERS], strict=True))


def record(target: Path, **results: object) -> None:
    """Put what the Space's own copy of a model does into its run.json, in place of what was measured in training."""
    file = target / "run.json"
    run = json.loads(file.read_text()) | results
    file.write_text(json.dumps(run, indent=1, ensure_ascii=False) + "\n")


def write_card(folder: Path, *commands: str) -> None:
    is_adapter = (folder / "adapter_config.json").is_file()
    config = json.loads((folder / ("adapter_config.json" if is_adapter else "config.json")).read_text())
    run = json.loads((folder / "run.json").read_text())
    about = ModelCardData(license="mit", library_name="peft" if is_adapter else "transformers", tags=["scratch_gpt2"])
    steps = "\n".join(f"python examples/{command}" for command in commands)
    notes = (
        " The weights are stored in bfloat16, and are under this project's licence, MIT.\n\n"
        f"## Data\n\n{DATA[folder.name]}\n\n"
        f"## Commands\n\nFrom `space/make_checkpoints.py`, without the files; seed 42:\n\n```bash\n{steps}\n```"
    )
    plots = sorted(file.stem for file in folder.glob("*.png"))
    card = render_card(about, name=folder.name, config=config, run=run, plots=plots, notes=notes)
    card.save(folder / "README.md")


if __name__ == "__main__":
    run_main(main)
