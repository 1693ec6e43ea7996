"""The Space's spam filter over several seeds, compared with TF-IDF with logistic regression on the same messages.

    python tests/benchmarks/spam_filter.py --sms SMSSpamCollection --india india.tsv --json spam_filter.json
    python tests/benchmarks/spam_filter.py --sms SMSSpamCollection --india india.tsv --train_on sms
    python tests/benchmarks/spam_filter.py ... --options="--train lora --learning_rate 1e-3"     # not all weights

Each seed uses its own split of both corpora and trains with the recipe of space/make_checkpoints.py, from the base in
space/checkpoints.
The checkpoint with the highest F1 on the validation messages is tested, once, on held-out messages of both corpora: as
they were sent, without digits, without links, in upper and in lower case. `validation_...` are the same metrics on the
validation messages; recipes are chosen by them. With `--train_on`, one corpus is trained on and both are tested.
"""

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "space"))

import torch
from make_checkpoints import spam_probabilities, train_filter
from make_messages import filter_metrics, fit_tfidf, join_corpora, spam_probabilities_of

from scratch_gpt2 import ScratchGPT2ForSequenceClassification, load_tokenizer
from scratch_gpt2.files import write_json

TRAIN_ON = {"both": ("sms", "india"), "sms": ("sms",), "india": ("india",)}


def measure(args, seed: int) -> dict[str, dict[str, float]]:
    """The metrics of the filter and of the baseline."""
    data = join_corpora(args.sms, args.india, seed, TRAIN_ON[args.train_on])
    with tempfile.TemporaryDirectory() as folder:
        run = train_filter(data, Path(folder), options=f"--seed {seed} {args.options}")
        model = ScratchGPT2ForSequenceClassification.from_pretrained(run).eval()
        model = model.to("cuda" if torch.cuda.is_available() else "cpu")
        tokenizer = load_tokenizer(run)
    classifiers = {
        "scratch_gpt2": lambda texts: spam_probabilities(model, tokenizer, texts),
        "tfidf": spam_probabilities_of(fit_tfidf(data)),
    }
    return {
        name: {
            **{f"validation_{key}": value for key, value in filter_metrics(find, data.splits["validation"]).items()},
            **filter_metrics(find, data.splits["test"]),
        }
        for name, find in classifiers.items()
    }


def report(runs: list[dict[str, dict[str, float]]]) -> None:
    print(f"\n{'mean ± standard deviation':<38}{'scratch_gpt2':>18}{'tfidf':>18}   seeds won")
    for metric in runs[0]["tfidf"]:
        values = {name: [run[name][metric] for run in runs] for name in ("scratch_gpt2", "tfidf")}
        won = sum(ours > theirs for ours, theirs in zip(values["scratch_gpt2"], values["tfidf"], strict=True))
        cells = (f"{statistics.mean(v):.4f} ± {statistics.stdev(v) if len(v) > 1 else 0:.4f}" for v in values.values())
        print(f"{metric:<38}" + "".join(f"{cell:>18}" for cell in cells) + f"   {won} of {len(runs)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sms", required=True, help="the SMS Spam Collection, label<TAB>text")
    parser.add_argument("--india", required=True, help="the Indian messages, label<TAB>text")
    parser.add_argument("--train_on", choices=list(TRAIN_ON), default="both", help="default: %(default)s")
    parser.add_argument("--options", default="", help="more options of examples/classify.py")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44, 45, 46], help="default: %(default)s")
    parser.add_argument("--json", type=Path, help="file for the results of every seed")
    args = parser.parse_args()
    runs = [measure(args, seed) for seed in args.seeds]
    report(runs)
    if args.json:
        settings = {"train_on": args.train_on, "options": args.options}
        write_json(args.json, {**settings, "runs": dict(zip(map(str, args.seeds), runs, strict=True))})


if __name__ == "__main__":
    main()
