"""Models to evaluate: loading them by name, fingerprinting their weights, timing their generation."""

import hashlib
import os
import statistics
import sys
import time
import warnings
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..checkpoint_files import adapter_fault, base_in, find_file, is_foreign_checkpoint, pin_revision, read_json_object
from ..modeling_scratch_gpt2 import ScratchGPT2ForCausalLM
from ..tokenization import load_tokenizer

PROMPT_LENGTH = 16
Model = TypeVar("Model", bound=torch.nn.Module)
GPT2_LAYERS = ("c_attn", "c_proj", "c_fc")  # what transformers' GPT-2 calls the layers that adapters are put on


def is_first_process() -> bool:
    """Whether this process does the work. Evaluation runs in one process; the others that a launcher such as torchrun
    has started would repeat the work and write to the same files. Call this before anything of accelerate."""
    if os.environ.get("RANK", "0") != "0":
        return False
    os.environ.pop("LOCAL_RANK", None)  # otherwise accelerate would wait for the other processes
    return True


def load_model(name: str, *, reference: bool = False) -> PreTrainedModel:
    """Load a classifier if the checkpoint is one, otherwise a language model as `load_causal_lm` does."""
    hub = find_revision(name)
    if is_classifier(name, hub):
        return check_finite(AutoModelForSequenceClassification.from_pretrained(name, **hub), name).eval()
    return load_causal_lm(name, reference=reference)


def load_causal_lm(name: str, *, reference: bool = False) -> PreTrainedModel:
    """Load any causal language model, in evaluation mode.

    GPT-2 checkpoints of any origin become our model, unless `reference` is set or the model is an adapter that was
    trained on transformers' own GPT-2.

    Args:
        name: folder or Hub id of a model or of a PEFT adapter, or nanoGPT's ckpt.pt.
        reference: compute GPT-2 checkpoints with transformers' GPT-2 instead of ours, to compare the two.

    Raises:
        ValueError: the checkpoint is a classifier.
        OSError: there is no such checkpoint.
    """
    hub = find_revision(name)
    if (adapter := adapter_config(name, hub)) is not None:
        targets = str(adapter.get("target_modules"))
        reference = reference or any(layer in targets for layer in GPT2_LAYERS)
        base = load_causal_lm(base_in(adapter, name), reference=reference)
        return check_finite(put_adapter_on(base, name, **hub), name).eval()
    if is_classifier(name, hub):
        raise ValueError(f"{name} is a classifier; give a language model.")
    if is_foreign_checkpoint(name, hub) and not reference:
        return check_finite(ScratchGPT2ForCausalLM.from_pretrained(name, **hub), name).eval()
    if os.path.isdir(name) and not Path(name, "config.json").is_file():
        raise FileNotFoundError(f"{name} has no config.json; give the folder of a whole checkpoint.")
    return check_finite(AutoModelForCausalLM.from_pretrained(name, **hub), name).eval()


def put_adapter_on(base: PreTrainedModel, name: str, **hub):
    """PEFT's adapter `name` on its base. Raises ValueError if it is damaged or incomplete, or does not fit."""
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        try:
            return PeftModel.from_pretrained(base, name, **hub)
        except (RuntimeError, LookupError, TypeError, ValueError, SafetensorError, UserWarning) as error:
            raise ValueError(adapter_fault(name, error)) from error


def check_finite(model: Model, name: str) -> Model:
    """Return the model, or raise ValueError if a weight is infinite or not a number, as after a run that diverged."""
    for weight, tensor in model.named_parameters():
        if not tensor.is_meta and not torch.isfinite(tensor.detach().sum(dtype=torch.float32)):
            raise ValueError(f"{name} has weights that are not finite ({weight}); use an earlier checkpoint.")
    return model


def find_revision(name: str) -> dict:
    """The options of `from_pretrained` that all files of a checkpoint are read with."""
    return pin_revision(name, {})


def is_classifier(name: str, hub: dict) -> bool:
    if os.path.exists(name) and not Path(name, "config.json").is_file():
        return False  # nanoGPT's and OpenAI's formats hold language models only
    if not find_file(name, "config.json", hub):
        return False
    architectures = AutoConfig.from_pretrained(name, **hub).architectures or []
    return any(architecture.endswith("ForSequenceClassification") for architecture in architectures)


def adapter_config(name: str, hub: dict) -> dict | None:
    """The configuration of a PEFT adapter; None for anything else."""
    if os.path.isfile(name):
        return None
    file = find_file(name, "adapter_config.json", hub)
    return None if file is None else read_json_object(file)


def load_tokenizer_of(model_name: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer saved with a model; for an adapter without one, that of its base."""
    try:
        return load_tokenizer(model_name)
    except FileNotFoundError:
        adapter = adapter_config(model_name, find_revision(model_name))
        if adapter is None:
            raise
        return load_tokenizer(base_in(adapter, model_name))


def input_device(model) -> torch.device:
    """Where the model expects its inputs. Weights that accelerate offloads are on no device between the calls of their
    modules; its hooks move the inputs."""
    return torch.device("cpu") if model.device.type == "meta" else model.device


def weights_digest(model: torch.nn.Module) -> str:
    """A short fingerprint of all weights, their names, shapes and dtypes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def measure_generation(model: PreTrainedModel, new_tokens: int, repeats: int = 3) -> dict[str, float]:
    """Speed and memory of greedy generation with the cache: one row, a prompt of 16 tokens.

    `tokens_per_second` is the median of the repeats after one warm-up. `peak_mb` is the peak memory of the process
    meanwhile, including weights and libraries; on a GPU, the peak of torch's allocations. NaN where the system does
    not report it.

    Raises ValueError if prompt and new tokens exceed the model's positions.
    """
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and PROMPT_LENGTH + new_tokens > positions:
        raise ValueError(
            f"{new_tokens} new tokens after a prompt of {PROMPT_LENGTH} are more than the model's {positions} "
            "positions; generate fewer."
        )
    ids = torch.arange(PROMPT_LENGTH, device=model.device)[None] % model.config.vocab_size
    reset_peak(model.device)
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
            do_sample=False,
            use_cache=True,
            pad_token_id=0,
        )
        output.tolist()  # waits for the GPU
        seconds.append(time.perf_counter() - start)
    return {"tokens_per_second": new_tokens / statistics.median(seconds[1:]), "peak_mb": peak_mb(model.device)}


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")


def peak_mb(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if sys.platform != "linux":
        return float("nan")
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024
