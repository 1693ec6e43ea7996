"""Continue a text with a language model, word by word as it is written.

    python examples/generate.py --model runs/quickstart --prompt "The statement"
    python examples/generate.py --model openai-community/gpt2 --prompt "Alan Turing was" --greedy
    python examples/generate.py --model ckpt.pt --tokenizer tiktoken:gpt2 --prompt - < prompt.txt

`--model` is a folder with a checkpoint of ours or of transformers' GPT-2, OpenAI's TensorFlow folder, nanoGPT's
`ckpt.pt`, or a Hub id. The device is the one that accelerate chooses.
"""

from dataclasses import dataclass, field
from pathlib import Path

from accelerate import PartialState
from transformers import HfArgumentParser, TextStreamer, set_seed

from scratch_gpt2 import ScratchGPT2ForCausalLM
from scratch_gpt2.cli import offline_unless_hub_answers, run_main
from scratch_gpt2.data.text_files import read_stdin
from scratch_gpt2.tokenization import check_text, load_tokenizer


@dataclass
class Arguments:
    model: str = field(metadata={"help": "Folder, nanoGPT's ckpt.pt, or Hub id such as openai-community/gpt2."})
    prompt: str = field(metadata={"help": "Text to continue; - reads it from standard input."})
    tokenizer: str | None = field(
        default=None, metadata={"help": "Folder, Hub id or tiktoken:gpt2; by default the model's."}
    )
    max_new_tokens: int = field(default=100, metadata={"help": "At most so many; the model's context may end before."})
    greedy: bool = field(default=False, metadata={"help": "Always take the likeliest token instead of sampling."})
    temperature: float = field(default=0.8, metadata={"help": "Below 1 safer, above 1 wilder."})
    top_k: int = field(default=50, metadata={"help": "Sample among so many of the likeliest tokens; 0: all."})
    top_p: float = field(
        default=1.0, metadata={"help": "Sample among the likeliest tokens of this joint probability."}
    )
    repetition_penalty: float = field(
        default=1.0, metadata={"help": "Above 1: tokens already used become less likely."}
    )
    seed: int = field(default=0, metadata={"help": "The same seed writes the same text."})


def main():
    (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    prompt = read_stdin().removesuffix("\n") if arguments.prompt == "-" else arguments.prompt
    check_text(prompt)
    model, tokenizer = load(arguments.model, arguments.tokenizer or arguments.model)

    inputs = tokenizer(prompt or tokenizer.eos_token, return_tensors="pt", verbose=False).to(model.device)
    length = inputs.input_ids.shape[1]
    room = model.config.n_positions - length
    if room < 1:
        raise ValueError(
            f"The prompt has {length} tokens, but the model's context is {model.config.n_positions}; shorten it."
        )
    sampling = {
        "do_sample": True,
        "temperature": arguments.temperature,
        "top_k": arguments.top_k,
        "top_p": arguments.top_p,
    }
    set_seed(arguments.seed)
    model.generate(
        **inputs,
        streamer=TextStreamer(tokenizer, skip_special_tokens=True),
        max_new_tokens=min(arguments.max_new_tokens, room),
        repetition_penalty=arguments.repetition_penalty,
        pad_token_id=tokenizer.pad_token_id,
        **({"do_sample": False} if arguments.greedy else sampling),
    )


def load(model_name: str, tokenizer_name: str):
    offline_unless_hub_answers(model_name)
    try:
        model = ScratchGPT2ForCausalLM.from_pretrained(model_name)
    except OSError as error:
        if Path(model_name).exists():
            raise  # the sentence says which file is missing or cannot be read
        raise FileNotFoundError(
            f"{model_name!r} is no checkpoint on this machine, nor could it be had from the Hugging Face Hub; "
            "without a network give a folder, such as runs/quickstart, which `make quickstart` writes."
        ) from error
    return model.to(PartialState().device), load_tokenizer(tokenizer_name)


if __name__ == "__main__":
    run_main(main)
