"""GGUF files: language models for llama.cpp, and for programs based on it, such as Ollama and LM Studio.

llama.cpp supports GPT-2 with OpenAI's options only. Other scales of the attention scores are folded into the query
weights; everything else raises an error. The fields: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import json
import math
import os
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .evaluation.models import load_causal_lm, load_tokenizer_of
from .files import check_outputs, write_atomically
from .modeling_scratch_gpt2 import ScratchGPT2ForCausalLM
from .openai_weights import FUSED, SAME, to_gpt2_state_dict, to_own_names
from .tokenization import CHAT_TEMPLATE

# llama.cpp's file types (llama.h, `llama_ftype`).
FILE_TYPES = {"f32": 0, "f16": 1, "q8_0": 7, "q4_0": 2}
QUANTIZED_BLOCK = 32  # adjacent weights of a row that share a scale
# llama.cpp computes GELU's tanh approximation, from a table in float16. The exact function, nanoGPT's, differs from it
# by at most 5e-4, as much as the table.
ACTIVATIONS = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu")
SAMPLING = {"temperature": "temperature", "top_k": "top_k", "top_p": "top_p", "repetition_penalty": "repeat_penalty"}
# CHAT_TEMPLATE in the language of Ollama's templates, https://docs.ollama.com/template
OLLAMA_TEMPLATE = (
    "{{ if .System }}{{ .System }}{{ else }}Below is an instruction that describes a task. Write a response that "
    'appropriately completes the request.{{ end }}{{ range .Messages }}{{ if eq .Role "user" }}\n\n### Instruction:\n'
    '{{ .Content }}{{ else if eq .Role "assistant" }}\n\n### Response:\n{{ .Content }}%s{{ end }}{{ end }}'
    "\n\n### Response:\n"
)


def export_gguf(
    model: PreTrainedModel | str | os.PathLike,
    file: str | os.PathLike,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: str = "f16",
    overwrite: bool = False,
) -> tuple[Path, Path]:
    """Write a language model and its tokenizer to a GGUF file, and an Ollama Modelfile next to it.

    Args:
        model: a model, or the folder or Hub id of a GPT-2 of any origin or of a PEFT adapter, which is merged.
        file: such as `model.gguf`; the Modelfile is `model.Modelfile`.
        tokenizer: by default the one saved with the model.
        dtype: of the matrices: `f32`, `f16`, or the blocks of 32 weights `q8_0` (9 bits each) and `q4_0` (5 bits each,
            the embeddings 9). Biases, norms and position embeddings are always float32.
        overwrite: replace files that exist.

    Returns the two files. Raises ValueError for a model or tokenizer for which llama.cpp would compute something else,
    FileExistsError for a file that exists, and ImportError without the package gguf.
    """
    file = Path(file)
    modelfile = file.with_suffix(".Modelfile")
    if dtype not in FILE_TYPES:
        raise ValueError(f"dtype is {dtype!r}; choose one of {', '.join(FILE_TYPES)}.")
    check_outputs([file, modelfile], overwrite=overwrite)
    try:
        import gguf  # noqa: F401 - its functions below import it again
    except ImportError as error:
        raise ImportError("GGUF files need the package gguf: pip install gguf.") from error
    if isinstance(model, str | os.PathLike):
        name, model = os.fspath(model), read_model(os.fspath(model))
    else:
        name = model.name_or_path
    tokenizer = tokenizer or load_tokenizer_of(name)
    check_model(model, dtype)
    vocabulary = check_tokenizer(tokenizer, model.config.vocab_size)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, lambda opened: write_gguf(opened.name, model, tokenizer, vocabulary, dtype))
    text = make_modelfile(file.name, model, tokenizer)
    write_atomically(modelfile, lambda opened: opened.write(text.encode()))
    return file, modelfile


def read_model(name: str) -> ScratchGPT2ForCausalLM:
    """Our language model of a checkpoint of any origin; adapters are merged in float32."""
    model = load_causal_lm(name)
    if hasattr(model, "merge_and_unload"):
        model = model.float().merge_and_unload()
    if model.config.model_type == "gpt2":  # the base of an adapter that was trained on transformers' GPT-2
        model = ScratchGPT2ForCausalLM.from_pretrained(None, config=model.config, state_dict=model.state_dict())
    return model


def check_model(model: PreTrainedModel, dtype: str) -> None:
    """Raise ValueError for what llama.cpp's GPT-2 cannot compute."""
    if type(model).__name__ != ScratchGPT2ForCausalLM.__name__:
        raise ValueError(f"{type(model).__name__} cannot be exported to GGUF; give a ScratchGPT2ForCausalLM.")
    config = model.config
    if config.activation_function not in ACTIVATIONS:
        raise ValueError(
            f"activation_function is {config.activation_function!r}, but llama.cpp's GPT-2 computes gelu_new only."
        )
    narrow = [width for width in (config.n_embd, config.inner_width) if width % QUANTIZED_BLOCK]
    if dtype.startswith("q") and narrow:
        raise ValueError(
            f"{dtype} needs widths that are multiples of {QUANTIZED_BLOCK}, but the model has {narrow[0]}: choose f16."
        )


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> dict:
    """The parts of tokenizer.json, where llama.cpp would encode every text alike. Raises ValueError otherwise."""
    if not tokenizer.is_fast:
        raise ValueError(f"{type(tokenizer).__name__} has no tokenizer.json; load it with load_tokenizer.")
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    bpe, split = parts["model"], parts["pre_tokenizer"] or {}
    splits_as_gpt2 = (split.get("type"), split.get("use_regex")) == ("ByteLevel", True)
    changes = [name for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix") if bpe.get(name)]
    changes += [name for name in ("byte_fallback", "ignore_merges") if bpe.get(name)]
    if bpe["type"] != "BPE" or not splits_as_gpt2 or split.get("add_prefix_space") or parts["normalizer"] or changes:
        raise ValueError(
            "The tokenizer is not GPT-2's byte-level BPE without added spaces and normalization, the only one that is "
            "exported: train one with train_tokenizer."
        )
    if len(tokenizer) > vocab_size:
        raise ValueError(
            f"The tokenizer has {len(tokenizer)} tokens but the model only {vocab_size}; use the tokenizer that the "
            "model was trained with."
        )
    return parts


def write_gguf(
    file: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, vocabulary: dict, dtype: str
) -> None:
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.GPT2])
    writer.add_block_count(config.n_layer)
    writer.add_context_length(config.n_positions)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(config.inner_width)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
    writer.add_file_type(FILE_TYPES[dtype])
    add_vocabulary(writer, model, tokenizer, vocabulary)
    add_tensors(writer, model, dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_vocabulary(writer, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, parts: dict) -> None:
    from gguf import TokenType

    # Rows of the embedding that belong to no token, as in padded vocabularies, have names too.
    tokens = [f"[PAD{i}]" for i in range(model.config.vocab_size)]
    kinds = [TokenType.UNUSED] * len(tokens)
    for token, i in parts["model"]["vocab"].items():
        tokens[i], kinds[i] = token, TokenType.NORMAL
    for added in parts["added_tokens"]:
        tokens[added["id"]] = added["content"]
        kinds[added["id"]] = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in parts["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    eos = stop_tokens(model, tokenizer)
    writer.add_eos_token_id(eos[0])
    if eos[1:]:
        writer.add_eot_token_id(eos[1])
    if tokenizer.bos_token_id is not None:
        writer.add_bos_token_id(tokenizer.bos_token_id)
    if tokenizer.pad_token_id is not None:
        writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_add_bos_token(tokenizer("a").input_ids[0] == tokenizer.bos_token_id)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def stop_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens at which `generate` stops; GGUF can name two. Raises ValueError for more."""
    eos = model.generation_config.eos_token_id
    eos = [tokenizer.eos_token_id] if eos is None else eos if isinstance(eos, list) else [eos]
    if len(eos) > 2:
        raise ValueError(f"generation_config.eos_token_id names {len(eos)} tokens, but GGUF only two: keep two.")
    return eos


def add_tensors(writer, model: PreTrainedModel, dtype: str) -> None:
    import gguf

    config = model.config
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, config.n_layer)
    state_dict = to_gpt2_state_dict(model)
    if config.tie_word_embeddings:
        del state_dict["lm_head.weight"]
    for name in list(state_dict):
        own_names, layout = to_own_names(name)
        tensor = state_dict.pop(name).detach().to("cpu", torch.float32)
        if layout == FUSED and (factor := query_factor(model, own_names[0])) != 1.0:
            query, others = tensor.split([config.n_embd, 2 * config.n_embd], dim=-1)
            tensor = torch.cat([query * factor, others], dim=-1)
        tensor = tensor if layout == SAME else tensor.t()
        gguf_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        kind = gguf.GGMLQuantizationType[tensor_type(gguf_name, tensor, dtype).upper()]
        writer.add_tensor(gguf_name, gguf.quantize(tensor.contiguous().numpy(), kind), raw_dtype=kind)


def query_factor(model: PreTrainedModel, own_name: str) -> float:
    """What the queries are multiplied by, because llama.cpp always divides the scores by the root of the head's width.

    `own_name` is the name of a tensor of q_proj."""
    attention = model.get_submodule(own_name.rpartition(".q_proj.")[0])
    factor = attention.scaling * math.sqrt(attention.head_dim)
    return 1.0 if math.isclose(factor, 1.0) else factor


def tensor_type(gguf_name: str, tensor: torch.Tensor, dtype: str) -> str:
    if tensor.ndim == 1 or gguf_name.startswith("position_embd"):  # as llama.cpp's own converter has it
        return "f32"
    if dtype == "q4_0" and gguf_name.startswith(("token_embd", "output")):  # they decide the logits
        return "q8_0"
    return dtype


def make_modelfile(file_name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    """Ollama's description of a model, https://docs.ollama.com/modelfile"""
    lines = [f"FROM ./{file_name}", f"PARAMETER num_ctx {model.config.n_positions}"]
    stops = [tokenizer.convert_ids_to_tokens(token) for token in stop_tokens(model, tokenizer)]
    lines += [f"PARAMETER stop {json.dumps(stop)}" for stop in stops]
    generation = model.generation_config
    for name, ollama_name in SAMPLING.items():
        if (value := getattr(generation, name)) is not None:
            lines.append(f"PARAMETER {ollama_name} {value}")
    if tokenizer.chat_template == CHAT_TEMPLATE:
        lines.append(f'TEMPLATE """{OLLAMA_TEMPLATE % tokenizer.eos_token}"""')
    return "\n".join(lines) + "\n"
