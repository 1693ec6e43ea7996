"""Train the models of the Space and write checkpoints/: a base, an assistant and a spam filter.

    python space/make_checkpoints.py --data data data/more

`--data` names the folders with the data sets that make_data.py, make_instructions.py and make_messages.py read. Made
for a GPU; on two CPU cores, give fewer `--base_steps`. Started again, it continues where it was stopped; with fewer
`--base_steps` than before, the learning rate of the base falls to zero in what remains. Needs examples/ beside this
folder.
"""

import argparse
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from cards import write_card
from make_data import SEPARATOR, documents, find
from make_messages import SPAM, filter_metrics, fit_tfidf, join_corpora, save_messages, spam_probabilities_of
from measures import answer_rows, assistant_metrics, bits_per_byte, most_likely_answers, stories
from models import Checkpoints
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.normalizers import Lowercase
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from scratch_gpt2 import ScratchGPT2ForCausalLM, ScratchGPT2ForSequenceClassification, load_tokenizer
from scratch_gpt2.cli import run_main
from scratch_gpt2.data.text_classification import PreparedClassification
from scratch_gpt2.hardware import cpu_computes_bfloat16
from scratch_gpt2.prediction import classify_text

SPACE = Path(__file__).resolve().parent
EXAMPLES = SPACE.parent / "examples"
CHECKPOINTS = SPACE / "checkpoints"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
SMS, INDIA = "sms_spam_collection.tsv", "india_junioralive.tsv"

# The recipes. Nothing else is given to the scripts but files and folders, and --bf16 where the machine computes it.
SHARDS = f"--train_tokenizer 4096 --shard_tokens 100000 --document_separator '{SEPARATOR}'"
BASE = (
    "--preset tiny --n_layer 5 --n_embd 384 --n_head 4 --n_positions 512 --dropout 0.1 --optimizer muon "
    "--learning_rate 4e-3 --lr_scheduler_type warmup_stable_decay --warmup_steps 100 --tokens_per_step 16384 "
    "--per_device_train_batch_size 32 --per_device_eval_batch_size 64 --eval_tokens 65536 --eval_steps 200 "
    "--save_steps 500 --save_total_limit 2 --sample_steps 0"
)
BASE_STEPS, DECAYING = 5000, 0.4
ASSISTANT = (
    "--pack --per_device_train_batch_size 32 --gradient_accumulation_steps 1 --per_device_eval_batch_size 32 "
    "--learning_rate 1e-3 --num_train_epochs 2 --dropout 0.1 --validation 0.02 --test 0 --eval_steps 0.1 "
    "--save_steps 0.1 --samples 0"
)
# The filter is a part of the base, so that the three models together stay small.
FILTER_LAYERS, FILTER_VOCABULARY = 4, 2560
ADAPTED = (
    "--dropout 0.1 --learning_rate 1e-3 --max_steps 250 --tokens_per_step 4096 --per_device_train_batch_size 8 "
    "--eval_steps 50 --save_steps 50 --save_total_limit 1 --sample_steps 0"
)
FILTER = (
    "--train all --dropout 0.1 --learning_rate 2e-4 --per_device_train_batch_size 16 --num_train_epochs 1 "
    "--eval_strategy steps --eval_steps 0.1 --save_strategy steps --save_steps 0.1 --max_length 128 "
    "--metric_for_best_model f1 --train_sampling_strategy group_by_length"
)
# A label is shown as unsure below the lowest of these at which 99% of the validation messages above are right.
CONFIDENCES, WANTED_ACCURACY = (0.6, 0.7, 0.8, 0.9, 0.95, 0.99), 0.99

SHOWN_STORIES = 3
SHOWN_INSTRUCTIONS = (
    "Hello!",
    "Who are you?",
    "Tell me a short story about a dog named Max.",
    "Write a story with the words boat and happy.",
    "Tell me a story about Priya with a sad ending.",
    "Please write a story with the words kite, tree and help.",
    "How do you spell garden?",
    "What is the capital of France?",
)
MESSAGES = (
    "Congratulations! You have won a £1000 prize. Call 09061701461 now to claim.",
    "Are you coming home for dinner tonight?",
    "Dear customer, you won 25 lakh rupees in the KBC lottery. WhatsApp us your bank details today.",
    "I sent the 500 rupees for the bus tickets, please check your account.",
    "Hi dad, I lost my phone. This is my new number, please text me.",
    "Get 1.5GB data per day for 28 days at Rs 199. Recharge now!",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", type=Path, required=True, help="folders with the data sets")
    parser.add_argument("--work", type=Path, default=Path("runs/space"), help="folder for data and runs")
    parser.add_argument("--base_steps", type=int, default=BASE_STEPS, help="steps of the base (default: %(default)s)")
    parser.add_argument(
        "--only", choices=["base", "assistant", "spam"], help="make this one, from a base that is there"
    )
    arguments = parser.parse_args()
    if arguments.only in (None, "base"):
        make_base(arguments.data, arguments.work, arguments.base_steps)
    if arguments.only in (None, "assistant"):
        make_assistant(arguments.data, arguments.work)
    if arguments.only in (None, "spam"):
        make_spam(arguments.data, arguments.work)


def make_base(data: list[Path], work: Path, steps: int) -> None:
    texts, run, target = work / "data", work / "base", CHECKPOINTS / "base"
    if not (texts / "train.txt").is_file():
        run_script(SPACE / "make_data.py", "", "--data", *data, "--output", texts)
    files = ("--input", texts / "validation.txt", texts / "train.txt", "--output", work / "shards")
    run_script(EXAMPLES / "prepare_text.py", SHARDS, *files)
    schedule = f"--max_steps {steps} --lr_scheduler_kwargs '{{\"num_decay_steps\": {int(DECAYING * steps)}}}'"
    train("pretrain.py", f"{BASE} {schedule}", run, "--data", work / "shards")
    keep_model(run, target, "curves.png", "generation_config.json")
    model, tokenizer = Checkpoints(CHECKPOINTS).load("base", ScratchGPT2ForCausalLM)
    metrics, samples = base_results(model, tokenizer, texts)
    record(target, split="held-out", metrics=metrics, samples=samples)
    write_card(target, f"prepare_text.py {SHARDS}", f"pretrain.py {BASE} {schedule}")


def make_assistant(data: list[Path], work: Path) -> None:
    rows, run, target = work / "instructions", work / "assistant", CHECKPOINTS / "assistant"
    run_script(SPACE / "make_instructions.py", "", "--data", *data, "--output", rows)
    train("sft.py", ASSISTANT, run, "--model", CHECKPOINTS / "base", "--data", rows / "train.json")
    keep_model(run, target, "curves.png", "generation_config.json")
    model, tokenizer = Checkpoints(CHECKPOINTS).load("assistant", ScratchGPT2ForCausalLM)
    answered = answer_rows(model, tokenizer, json.loads((rows / "test.json").read_text(encoding="utf-8")))
    samples = most_likely_answers(model, tokenizer, SHOWN_INSTRUCTIONS)
    record(target, split="test", metrics=assistant_metrics(answered), samples=samples)
    write_card(target, f"sft.py {ASSISTANT}")


def make_spam(data: list[Path], work: Path) -> None:
    target = CHECKPOINTS / "spam"
    joined = join_corpora(*(str(find(data, name)) for name in (SMS, INDIA)))
    run = train_filter(joined, work / "filter")
    keep_model(run, target, "epochs.png", "confusion_matrix.png")
    model, tokenizer = calibrated(target, joined.splits["validation"])
    metrics, samples = spam_results(model, tokenizer, joined.splits["test"])
    tfidf = filter_metrics(spam_probabilities_of(fit_tfidf(joined)), joined.splits["test"])
    record(target, split="test", metrics=metrics, samples=samples, compared={"TF-IDF and logistic regression": tfidf})
    write_card(target, f"pretrain.py {ADAPTED}", f"classify.py {FILTER}")


def train_filter(data: PreparedClassification, work: Path, options: str = "") -> Path:
    """The folder of the trained filter. `options` are added to those of both recipes' scripts, after them.

    Before it classifies, the first blocks of the base are trained on as a language model on the training messages
    (ULMFiT's second stage, Howard and Ruder 2018, arXiv:1801.06146, section 3.2). Its tokenizer reads capitals as
    small letters: capital letters alone do not make a message spam, and spam is not always in capitals.
    """
    messages, first, adapted, run = (work / name for name in ("messages", "first_blocks", "adapted", "spam"))
    if not messages.is_dir():
        save_messages(data, messages)
    if not first.is_dir():
        save_part_of_base(first)
    shards = f"--document_separator '{SEPARATOR}'"
    files = ("--input", messages / "messages.txt", "--tokenizer", first, "--output", work / "shards")
    run_script(EXAMPLES / "prepare_text.py", shards, *files)
    train("pretrain.py", ADAPTED, adapted, "--model", first, "--data", work / "shards")
    train("classify.py", f"{FILTER} {options}", run, "--model", adapted, "--data", messages)
    return run


def save_part_of_base(folder: Path) -> None:
    """The first FILTER_LAYERS blocks of the base, with the FILTER_VOCABULARY of `without_capitals`."""
    model, tokenizer = (
        ScratchGPT2ForCausalLM.from_pretrained(CHECKPOINTS / "base"),
        load_tokenizer(CHECKPOINTS / "base"),
    )
    small, kept = without_capitals(tokenizer, FILTER_VOCABULARY)
    embedded = model.get_input_embeddings().weight.detach()[kept]
    model.set_input_embeddings(torch.nn.Embedding.from_pretrained(embedded, freeze=False))
    model.tie_weights()
    model.model.layers = model.model.layers[:FILTER_LAYERS]
    changed = {"n_layer": FILTER_LAYERS, "vocab_size": FILTER_VOCABULARY}
    model.config.update(changed | dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), small.eos_token_id))
    model.generation_config = GenerationConfig.from_model_config(model.config)
    small.save_pretrained(folder)
    model.save_pretrained(folder)


def without_capitals(tokenizer: PreTrainedTokenizerBase, size: int) -> tuple[PreTrainedTokenizerFast, list[int]]:
    """A tokenizer that reads capitals as small letters, and which of `tokenizer`'s ids its `size` tokens had.

    Besides the bytes and the end-of-text token it has the tokens of the first merges without capitals; none of their
    parts has a capital either. Its class is not GPT2Tokenizer, which drops the normalizer of a tokenizer.json when it
    reads it.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    ids, merges = state["model"]["vocab"], state["model"]["merges"]
    merged = {"".join(merge): merge for merge in merges if not re.search("[A-Z]", "".join(merge))}
    tokens = [*(token for token in ids if len(token) == 1), *list(merged)[: size - 257], tokenizer.eos_token]
    state["model"] |= {"vocab": {token: number for number, token in enumerate(tokens)}}
    state["model"] |= {"merges": [merged[token] for token in tokens if token in merged]}
    state["added_tokens"][0]["id"] = size - 1
    backend = Tokenizer.from_str(json.dumps(state))
    backend.normalizer = Lowercase()
    names = ("bos_token", "eos_token", "pad_token", "unk_token", "chat_template", "model_max_length")
    kept = {name: getattr(tokenizer, name) for name in names}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **kept), [ids[token] for token in tokens]


def train(script: str, recipe: str, run: Path, *files: str | Path) -> None:
    """With --resume where it was stopped; not again where it is finished."""
    if not (run / "run.json").is_file():
        options = ["--resume"] if list(run.glob("checkpoint-*")) else []
        options += ["--bf16"] if torch.cuda.is_available() or cpu_computes_bfloat16() else []
        run_script(EXAMPLES / script, recipe, *files, "--output_dir", run, *options)


def run_script(script: Path, recipe: str, *arguments: str | Path) -> None:
    """Raises ChildProcessError where it fails; what it says has been printed."""
    command = [sys.executable, str(script), *shlex.split(recipe), *map(str, arguments)]
    if subprocess.run(command, check=False).returncode != 0:
        raise ChildProcessError(f"{script.name} failed: see above, and start this script again to go on.")


def keep_model(run: Path, target: Path, *names: str) -> None:
    """The finished model in bfloat16, its tokenizer, run.json and the files called `names`; what was there goes."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for name in (*TOKENIZER, "run.json", *names):
        shutil.copyfile(run / name, target / name)
    compact = json.dumps(json.loads((run / TOKENIZER[0]).read_bytes()), ensure_ascii=False, separators=(",", ":"))
    (target / TOKENIZER[0]).write_text(compact + "\n", encoding="utf-8")
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(run / "model.safetensors").items()}
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    change_config(target, json.loads((run / "config.json").read_text()) | {"dtype": "bfloat16"})


def change_config(target: Path, config: dict) -> None:
    """Without `auto_map`: the package is part of the Space, so that there is no second copy of its code."""
    config.pop("auto_map", None)
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def base_results(model, tokenizer, texts: Path) -> tuple[dict, list[tuple[str, str]]]:
    metrics = {
        f"{name}_bits_per_byte": bits_per_byte(model, tokenizer, documents([texts], f"{name}.txt"))
        for name in ("stories", "books", "dialogues")
    }
    written = stories(model, tokenizer, 100)
    metrics["stories_that_end"] = sum(story.stopped for story in written) / len(written)
    return metrics, [("Once upon a time", story.text) for story in written[:SHOWN_STORIES]]


def spam_probabilities(model, tokenizer, texts: list[str]) -> np.ndarray:
    return np.array([found[SPAM] for found in classify_text(model, tokenizer, texts, batch_size=64)])


def calibrated(target: Path, rows: list[dict]) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The filter with its head divided by the temperature at which the validation messages are most likely (Guo et al.
    2017, arXiv:1706.04599), and `unsure_below` in its configuration. Written to `target`, and returned as read."""
    model, tokenizer = Checkpoints(CHECKPOINTS).load(target.name, ScratchGPT2ForSequenceClassification)
    probabilities = spam_probabilities(model, tokenizer, [row["text"] for row in rows])
    is_spam = np.array([row["label"] == SPAM for row in rows])
    logits, truth = torch.logit(torch.tensor(probabilities), eps=1e-9), torch.tensor(is_spam, dtype=torch.float64)
    temperatures = torch.linspace(0.5, 5, 91).tolist()
    loss = torch.nn.functional.binary_cross_entropy_with_logits
    temperature = min(temperatures, key=lambda t: loss(logits / t, truth).item())
    tensors = load_file(target / "model.safetensors")
    tensors["score.weight"] = (tensors["score.weight"].float() / temperature).to(torch.bfloat16)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    unsure_below = confidence_wanted(torch.sigmoid(logits / temperature).numpy(), is_spam)
    config = json.loads((target / "config.json").read_text())
    change_config(target, config | {"temperature": round(temperature, 3), "unsure_below": unsure_below})
    return Checkpoints(CHECKPOINTS).load(target.name, ScratchGPT2ForSequenceClassification)


def confidence_wanted(probabilities: np.ndarray, is_spam: np.ndarray) -> float:
    confidence, is_right = np.maximum(probabilities, 1 - probabilities), (probabilities > 0.5) == is_spam
    enough = (c for c in CONFIDENCES if is_right[confidence >= c].mean() >= WANTED_ACCURACY)
    return next(enough, CONFIDENCES[-1])


def spam_results(model, tokenizer, rows: list[dict], **options) -> tuple[dict, list[tuple[str, str]]]:
    """Metrics on the test messages, with how many are unsure and how many of the others are right, and samples."""
    known: dict[str, float] = {}  # most variants of a message are the message itself

    def probabilities_of(texts: list[str]) -> np.ndarray:
        new = list(dict.fromkeys(text for text in texts if text not in known))
        known.update(zip(new, spam_probabilities(model, tokenizer, new).tolist(), strict=True))
        return np.array([known[text] for text in texts])

    metrics = filter_metrics(probabilities_of, rows, **options)
    probabilities = probabilities_of([row["text"] for row in rows])
    is_right = (probabilities > 0.5) == np.array([row["label"] == SPAM for row in rows])
    is_sure = np.maximum(probabilities, 1 - probabilities) >= model.config.unsure_below
    metrics |= {"unsure": float(1 - is_sure.mean()), "accuracy_where_sure": float(is_right[is_sure].mean())}
    samples = []
    for text, found in zip(MESSAGES, classify_text(model, tokenizer, MESSAGES), strict=True):
        label, probability = next(iter(found.items()))
        samples.append((text, f"{label if probability >= model.config.unsure_below else 'unsure'} {probability:.3f}"))
    return metrics, samples


def record(target: Path, **results: object) -> None:
    """Put what the Space's own copy of a model does into its run.json, in place of what was measured in training."""
    file = target / "run.json"
    run = json.loads(file.read_text()) | results
    file.write_text(json.dumps(run, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    run_main(main)
