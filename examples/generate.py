"""Continue a text with a language model; the text appears as it is generated.

    python examples/generate.py --model runs/quickstart --prompt "The statement"
    python examples/generate.py --model openai-community/gpt2 --prompt "Alan Turing was" --greedy
    python examples/generate.py --model ckpt.pt --tokenizer tiktoken:gpt2 --prompt - < prompt.txt

`--model` is a folder or Hub id of any causal language model or of a PEFT adapter, OpenAI's TensorFlow folder, or
nanoGPT's `ckpt.pt`. GPT-2 checkpoints of any origin are computed with our model. accelerate chooses the device.
"""

if __name__ == "__main__":  # --help and mistyped options are answered before the imports below, which take seconds
    import os
    import runpy

    runpy.run_path(os.path.join(os.path.dirname(os.path.abspath(__file__)), "_quick.py"))

import sys
from dataclasses import dataclass, field
from pathlib import Path

from accelerate import PartialState
from transformers import TextStreamer, set_seed

from scratch_gpt2.cli import parse_arguments, run_main
from scratch_gpt2.cpu_inference import optimize_if_faster
from scratch_gpt2.data.text_files import read_stdin
from scratch_gpt2.evaluation.models import is_first_process, load_causal_lm, load_tokenizer_of
from scratch_gpt2.tokenization import check_text, load_tokenizer


@dataclass
class Arguments:
    model: str = field(
        metadata={"help": "Folder or Hub id of a causal language model or an adapter, or nanoGPT's ckpt.pt."}
    )
    prompt: str = field(metadata={"help": "Text to continue; - reads it from standard input."})
    tokenizer: str | None = field(
        default=None, metadata={"help": "Folder, Hub id or tiktoken:gpt2; by default the model's."}
    )
    max_new_tokens: int = field(
        default=100, metadata={"help": "Maximum number of new tokens; the model's context may end before."}
    )
    greedy: bool = field(default=False, metadata={"help": "Use greedy decoding instead of sampling."})
    temperature: float = field(default=0.8, metadata={"help": "Sampling temperature; lower is more predictable."})
    top_k: int = field(default=50, metadata={"help": "Sample from the K most likely tokens; 0: from all."})
    top_p: float = field(
        default=1.0, metadata={"help": "Sample from the most likely tokens with this total probability."}
    )
    repetition_penalty: float = field(
        default=1.0, metadata={"help": "Above 1: make tokens that have occurred less likely."}
    )
    seed: int = field(default=0, metadata={"help": "Seed for sampling."})
    no_optimize: bool = field(
        default=False,
        metadata={"help": "On a CPU, keep the kernels of the model as loaded, even if others are faster."},
    )


def main() -> None:
    (arguments,) = parse_arguments(Arguments, description=__doc__)
    if not is_first_process():
        return
    prompt = read_stdin().removesuffix("\n") if arguments.prompt == "-" else arguments.prompt
    check_text(prompt)
    model, tokenizer = load(arguments.model, arguments.tokenizer)
    if not arguments.no_optimize:
        print(optimize_if_faster(model), file=sys.stderr)

    inputs = tokenizer(prompt or tokenizer.eos_token, return_tensors="pt", verbose=False).to(model.device)
    length = inputs.input_ids.shape[1]
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and length >= positions:
        raise ValueError(f"The prompt has {length} tokens, but the model's context is {positions}; shorten it.")
    sampling = {name: getattr(arguments, name) for name in ("temperature", "top_k", "top_p")}
    set_seed(arguments.seed)
    model.generate(
        **inputs,
        streamer=TextStreamer(tokenizer, skip_special_tokens=True),
        max_new_tokens=min(arguments.max_new_tokens, positions - length) if positions else arguments.max_new_tokens,
        repetition_penalty=arguments.repetition_penalty,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=not arguments.greedy,
        **({} if arguments.greedy else sampling),
    )


def load(model_name: str, tokenizer_name: str | None):
    try:
        model = load_causal_lm(model_name)
    except OSError as error:
        if Path(model_name).exists():
            raise  # the sentence says which file is missing or cannot be read
        raise FileNotFoundError(
            f"{model_name!r} is not a local checkpoint and could not be downloaded from the Hugging Face Hub; "
            "without a network give a folder, such as runs/quickstart, which `make quickstart` writes."
        ) from error
    tokenizer = load_tokenizer(tokenizer_name) if tokenizer_name else load_tokenizer_of(model_name)
    return model.to(PartialState().device), tokenizer


if __name__ == "__main__":
    run_main(main)
