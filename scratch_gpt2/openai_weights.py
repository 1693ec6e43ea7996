"""Reading and writing GPT-2 weights in other formats: the only module that knows OpenAI's names for the tensors.

It reads transformers' GPT-2 repositories and folders, OpenAI's TensorFlow folders and nanoGPT's `ckpt.pt`. For each
format, a reader yields tensors with GPT-2's names and layout, and `KEYS` translates them. `export_gpt2` does the
reverse.
"""

import copy
import json
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import safe_open
from transformers import GenerationConfig, GPT2Config, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.initialization import no_init_weights

from .checkpoint_files import (
    LOOKUP_ARGUMENTS,
    WEIGHT_FILES,
    find_weight_files,
    listed,
    load_pickle,
    pin_revision,
    reading,
)
from .configuration_scratch_gpt2 import ScratchGPT2Config

# How GPT-2 stores a tensor, compared with nn.Linear here. Its Conv1D stores weights as (in, out), nn.Linear as
# (out, in). The weights of q, k and v are concatenated to (in, 3 * out), their biases to (3 * out).
SAME, TRANSPOSED, FUSED, DROPPED = "same", "transposed", "q, k and v fused, then transposed", "ignored"

# GPT-2's name (without the prefix "transformer." that its heads put before the network's), the name here, the layout.
# fmt: off
KEYS = {
    "wte.weight":                            ("model.embed_tokens.weight", SAME),
    "wpe.weight":                            ("model.embed_positions.weight", SAME),
    "h.N.ln_1.weight":                       ("model.layers.N.attn_norm.weight", SAME),
    "h.N.ln_1.bias":                         ("model.layers.N.attn_norm.bias", SAME),
    "h.N.attn.c_attn.weight":                ("model.layers.N.attn.{q,k,v}_proj.weight", FUSED),
    "h.N.attn.c_attn.bias":                  ("model.layers.N.attn.{q,k,v}_proj.bias", FUSED),
    "h.N.attn.c_proj.weight":                ("model.layers.N.attn.out_proj.weight", TRANSPOSED),
    "h.N.attn.c_proj.bias":                  ("model.layers.N.attn.out_proj.bias", SAME),
    "h.N.attn.bias":                         (None, DROPPED),  # the causal mask, kept by old versions
    "h.N.attn.masked_bias":                  (None, DROPPED),  # what they filled it with, -1e4
    "h.N.ln_2.weight":                       ("model.layers.N.mlp_norm.weight", SAME),
    "h.N.ln_2.bias":                         ("model.layers.N.mlp_norm.bias", SAME),
    "h.N.mlp.c_fc.weight":                   ("model.layers.N.mlp.up_proj.weight", TRANSPOSED),
    "h.N.mlp.c_fc.bias":                     ("model.layers.N.mlp.up_proj.bias", SAME),
    "h.N.mlp.c_proj.weight":                 ("model.layers.N.mlp.down_proj.weight", TRANSPOSED),
    "h.N.mlp.c_proj.bias":                   ("model.layers.N.mlp.down_proj.bias", SAME),
    "ln_f.weight":                           ("model.norm.weight", SAME),
    "ln_f.bias":                             ("model.norm.bias", SAME),
    "lm_head.weight":                        ("lm_head.weight", SAME),
    "score.weight":                          ("score.weight", SAME),
    "classifier.weight":                     ("classifier.weight", SAME),
    "classifier.bias":                       ("classifier.bias", SAME),
    "qa_outputs.weight":                     ("qa_outputs.weight", SAME),
    "qa_outputs.bias":                       ("qa_outputs.bias", SAME),
    "multiple_choice_head.summary.weight":   ("multiple_choice_head.weight", SAME),
    "multiple_choice_head.summary.bias":     ("multiple_choice_head.bias", SAME),
}
GPT2_NAMES = {own_name: gpt2_name for gpt2_name, (own_name, layout) in KEYS.items() if layout != DROPPED}
ARCHITECTURES = {
    "ScratchGPT2Model":                      "GPT2Model",
    "ScratchGPT2ForCausalLM":                "GPT2LMHeadModel",
    "ScratchGPT2DoubleHeadsModel":           "GPT2DoubleHeadsModel",
    "ScratchGPT2ForSequenceClassification":  "GPT2ForSequenceClassification",
    "ScratchGPT2ForTokenClassification":     "GPT2ForTokenClassification",
    "ScratchGPT2ForQuestionAnswering":       "GPT2ForQuestionAnswering",
}
# fmt: on

OPENAI_VOCABULARY, NANOGPT_VOCABULARY = 50257, 50304
NANOGPT_FIELDS = {"block_size": "n_positions"} | {name: name for name in ("n_layer", "n_head", "n_embd", "vocab_size")}
# What a configuration says about its own class rather than about the network.
OWN_CONFIG_FIELDS = {"model_type", "architectures", "auto_map", "transformers_version", "n_ctx"}
Tensors = Iterator[tuple[str, torch.Tensor]]  # GPT-2's names, GPT-2's layout
Shapes = dict[str, torch.Size]


def read_checkpoint(model_class: type[PreTrainedModel], name_or_path, kwargs: dict):
    """Read a GPT-2 checkpoint that `is_foreign_checkpoint` recognizes, for `model_class.from_pretrained`.

    `kwargs` are those of `from_pretrained`: configuration fields override the checkpoint's, `config` replaces them,
    and `dtype` converts tensor by tensor, so that the original is never in memory as a whole.

    A vocabulary that nanoGPT padded from 50257 to 50304 is truncated to 50257, because the added rows belong to no
    token and sampling could choose one. `vocab_size=50304` keeps them.

    Returns the ScratchGPT2Config, the state dict under the names used here, and the remaining kwargs. A head that the
    checkpoint lacks is left out of the state dict.

    Raises ValueError for an unknown or missing key, a wrong shape, an option not implemented here or a damaged file;
    FileNotFoundError if there are no weights; ImportError for OpenAI's TensorFlow format without TensorFlow.
    """
    path, kwargs = os.fspath(name_or_path or "state_dict"), dict(kwargs)
    lookup = {name: kwargs.pop(name) for name in LOOKUP_ARGUMENTS if name in kwargs}
    format_options = {name: kwargs.pop(name) for name in ("use_safetensors", "variant") if name in kwargs}
    dtype = kwargs.pop("dtype", None) or kwargs.pop("torch_dtype", None) or "auto"
    given, keep = kwargs.pop("state_dict", None), False
    if given is not None:
        fields, tensors = {}, iter(given.items())
    elif os.path.isfile(os.path.join(path, "hparams.json")):
        fields, tensors = read_tensorflow(path)
    elif path.endswith(".pt") or os.path.isfile(os.path.join(path, "ckpt.pt")):
        file = path if path.endswith(".pt") else os.path.join(path, "ckpt.pt")
        fields, tensors = read_nanogpt(file, kwargs.get("vocab_size", OPENAI_VOCABULARY))
    else:
        lookup = pin_revision(path, lookup)
        fields, tensors, keep = read_transformers(
            path, lookup | format_options, has_config=kwargs.get("config") is None
        )
        if model_class.can_generate() and kwargs.get("generation_config") is None:
            kwargs["generation_config"] = read_generation_config(path, lookup)

    config, kwargs = make_config(fields, kwargs, origin=path)
    shapes = model_shapes(model_class, config)
    state_dict = to_own_state_dict(
        tensors, shapes, path, target_dtype(dtype, config), kwargs.get("ignore_mismatched_sizes", False), keep
    )
    check_complete(state_dict, shapes, path)
    generation_config = kwargs.get("generation_config")
    if generation_config is not None and generation_config.pad_token_id is None:
        generation_config.pad_token_id = config.pad_token_id
    return config, state_dict, {**kwargs, "dtype": dtype}


def export_gpt2(
    model: PreTrainedModel, folder: str | os.PathLike, tokenizer: PreTrainedTokenizerBase | None = None
) -> None:
    """Save `model`, and a `tokenizer`, as an equivalent checkpoint of transformers' GPT-2.

    A language model's tensors have the names of OpenAI's own repositories, without "transformer.", which mlx-lm asks
    for, unless its head has weights of its own. Files with the same names in `folder` are replaced atomically,
    `config.json` last.

    Raises ValueError for a model of another package, and for a model with adapters or quantized layers.
    """
    architecture = ARCHITECTURES.get(type(model).__name__)
    if architecture is None:
        raise ValueError(
            f"{type(model).__name__} has no counterpart in GPT-2: export one of {', '.join(ARCHITECTURES)}, "
            "after merging adapters into it."
        )
    fields = model.config.to_dict()
    known = GPT2Config().to_dict().keys() | {"classifier_dropout", "problem_type"}
    config = GPT2Config(**{name: fields[name] for name in known - OWN_CONFIG_FIELDS if name in fields})
    config.n_ctx = config.n_positions  # llama.cpp's converter asks for it by this name
    with torch.device("meta"), no_init_weights():
        gpt2 = getattr(transformers, architecture)(config)
    gpt2.load_state_dict(to_gpt2_state_dict(model), assign=True)
    gpt2.tie_weights()
    if model.can_generate():
        gpt2.generation_config = copy.deepcopy(model.generation_config)
    is_network_alone = architecture == "GPT2LMHeadModel" and config.tie_word_embeddings
    state_dict = gpt2.base_model.state_dict() if is_network_alone else None

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".export-") as unfinished:
        if tokenizer is not None:
            tokenizer.save_pretrained(unfinished)
        gpt2.save_pretrained(unfinished, state_dict=state_dict)
        for file in sorted(Path(unfinished).iterdir(), key=lambda file: file.name == "config.json"):
            os.replace(file, folder / file.name)


# The translation, in both directions


def to_own_names(gpt2_name: str) -> tuple[list[str], str]:
    """Names here of one of GPT-2's tensors (three where q, k and v are fused, none if ignored), and its layout.
    Raises KeyError for a name that is not in `KEYS`."""
    name = gpt2_name.removeprefix("transformer.")
    block = re.match(r"h\.(\d+)\.", name)
    own, layout = KEYS[f"h.N.{name[block.end() :]}" if block else name]
    if own is None:  # ignored
        return [], layout
    own = own.replace("layers.N.", f"layers.{block[1]}.") if block else own
    return [own.replace("{q,k,v}", letter) for letter in "qkv"] if layout == FUSED else [own], layout


def to_gpt2_name(own_name: str) -> str:
    """GPT-2's name, without "transformer.", of the tensor that holds `own_name`. Raises KeyError for other names."""
    block = re.match(r"model\.layers\.(\d+)\.", own_name)
    pattern = f"model.layers.N.{own_name[block.end() :]}" if block else own_name
    gpt2_name = GPT2_NAMES[re.sub(r"\b[qkv]_proj", "{q,k,v}_proj", pattern)]
    return gpt2_name.replace("h.N.", f"h.{block[1]}.") if block else gpt2_name


def to_own_state_dict(
    tensors: Tensors, shapes: Shapes, origin: str, dtype=None, ignore_mismatched_sizes=False, keep=False
) -> dict[str, torch.Tensor]:
    """Translate tensor by tensor, and check every name and shape against `shapes`, those of the model to be loaded.

    Heads that the model does not have stay in the state dict for the library to report, except `lm_head`, which
    duplicates the token embedding. A `dtype` of `None` keeps each tensor's own. With `keep`, a tensor that needs no
    change is used as it is; all others are copied.
    """
    state_dict = {}
    for gpt2_name, tensor in tensors:
        try:
            own_names, layout = to_own_names(gpt2_name)
        except KeyError:
            raise ValueError(f"{origin}: unknown key {gpt2_name!r}, which is not part of GPT-2.") from None
        if layout == DROPPED:
            continue
        own_name = own_names[0]
        if own_name in state_dict:
            raise ValueError(f"{origin}: key {gpt2_name!r} occurs twice, with and without 'transformer.'.")
        if own_name in shapes:
            shape = stored_shape(shapes[own_name], layout)
            if tuple(tensor.shape) != shape and not ignore_mismatched_sizes:
                raise ValueError(
                    f"{origin}: {gpt2_name!r} has the shape {tuple(tensor.shape)}, the configuration says {shape}."
                )
        elif own_name.startswith("model."):
            raise ValueError(f"{origin}: unknown key {gpt2_name!r}, as the configuration has fewer blocks.")
        elif own_name == "lm_head.weight":
            continue
        if layout == SAME and keep and dtype in (None, tensor.dtype):
            state_dict[own_name] = tensor
            continue
        parts = tensor.chunk(3, dim=-1) if layout == FUSED else [tensor]
        for own_name, part in zip(own_names, parts, strict=True):
            # A copy, so that nothing keeps the file or the fused tensor in memory, and made directly, because a
            # temporary tensor would fragment the memory. Transposing does not change a bias.
            part = part if layout == SAME else part.t()
            state_dict[own_name] = torch.empty(part.shape, dtype=dtype or part.dtype, device=part.device).copy_(part)
    return state_dict


def stored_shape(own_shape: torch.Size, layout: str) -> tuple[int, ...]:
    """The shape in which GPT-2 stores a tensor, or three fused ones, of `own_shape`."""
    if layout == SAME:
        return tuple(own_shape)
    *rest, last = reversed(own_shape)
    return (*rest, 3 * last if layout == FUSED else last)


def check_complete(state_dict: dict, shapes: Shapes, origin: str) -> None:
    """Raise ValueError for missing keys, except those of a whole head: the library initialises and reports it."""
    present = {name.split(".")[0] for name in state_dict} | {"model"}
    missing = [name for name in shapes if name not in state_dict and name.split(".")[0] in present]
    if missing:
        names = list(dict.fromkeys(to_gpt2_name(name) for name in missing))
        raise ValueError(f"{origin}: missing key {listed(names)}.")


def to_gpt2_state_dict(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The state dict of `model` under GPT-2's names and in its layout."""
    is_headless = not hasattr(model, model.base_model_prefix)
    own = {f"model.{name}" if is_headless else name: tensor for name, tensor in model.state_dict().items()}
    state_dict = {}
    for own_name, tensor in own.items():
        try:
            gpt2_name = to_gpt2_name(own_name)
        except KeyError:
            raise ValueError(f"{own_name!r} is not part of GPT-2: merge adapters and do not quantize.") from None
        own_names, layout = to_own_names(gpt2_name)
        if not is_headless and own_name.startswith("model."):
            gpt2_name = f"transformer.{gpt2_name}"
        if layout == FUSED:
            tensor = torch.cat([own[name].t() for name in own_names], dim=-1)
        elif layout == TRANSPOSED:
            tensor = tensor.t().contiguous()
        state_dict[gpt2_name] = tensor
    return state_dict


def model_shapes(model_class: type[PreTrainedModel], config: ScratchGPT2Config) -> Shapes:
    """Names and shapes of the model's tensors, from a copy without memory; the network's names begin with "model."."""
    with torch.device("meta"), no_init_weights():
        state_dict = model_class(copy.deepcopy(config)).state_dict()
    prefix = "" if any(name.startswith("model.") for name in state_dict) else "model."
    return {prefix + name: tensor.shape for name, tensor in state_dict.items()}


# The configuration


def make_config(fields: dict, kwargs: dict, origin: str) -> tuple[ScratchGPT2Config, dict]:
    """The configuration from GPT-2's `fields` or from `kwargs["config"]`, with overrides; and the kwargs left over."""
    given = kwargs.pop("config", None)
    if isinstance(given, PreTrainedConfig):
        fields = given.to_dict()
        kwargs = {"attn_implementation": given._attn_implementation, **kwargs}
    elif given is not None:
        fields, _ = PreTrainedConfig.get_config_dict(given)
    # GPT-2 has no pad token. A classifier dropout of None is GPT-2's way to say 0.1, the default.
    fields = {"pad_token_id": None} | {name: value for name, value in fields.items() if name not in OWN_CONFIG_FIELDS}
    if fields.get("classifier_dropout", 0.1) is None:
        del fields["classifier_dropout"]
    try:
        config, kwargs = ScratchGPT2Config.from_dict(fields, return_unused_kwargs=True, **kwargs)
        config.validate()
    except (StrictDataclassError, ValueError) as error:
        raise ValueError(f"{origin}: {error.__cause__ or error}") from error
    if config.pad_token_id is None:
        eos = config.eos_token_id
        config.pad_token_id = eos[0] if isinstance(eos, list) else eos
    return config, kwargs


def special_tokens(vocab_size: int) -> dict[str, int | None]:
    """GPT-2's end-of-text token, for formats that do not store it; a small vocabulary of characters has none."""
    end_of_text = OPENAI_VOCABULARY - 1 if vocab_size >= OPENAI_VOCABULARY else None
    return {"bos_token_id": end_of_text, "eos_token_id": end_of_text}


def target_dtype(dtype, config: ScratchGPT2Config) -> torch.dtype | None:
    """The dtype that the library will use for `dtype`; `None` if it depends on the tensors."""
    dtype = config.dtype if dtype == "auto" else dtype
    dtype = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    return dtype if isinstance(dtype, torch.dtype) else None


# The readers: each yields GPT-2's names and layout


def read_transformers(name: str, hub_kwargs: dict, has_config: bool):
    """Configuration and tensors of a repository or folder that transformers' GPT-2 could load; and whether the tensors
    may be kept, as those of safetensors, which are memory maps as in transformers. In a pickle they can share memory.
    """
    fields = PreTrainedConfig.get_config_dict(name, **hub_kwargs)[0] if has_config else {}
    if has_config and not fields:
        raise FileNotFoundError(f"{name} has no config.json; copy it too, or give a configuration with config=.")
    files = find_weight_files(name, hub_kwargs, fields)
    if not files:
        where = "in that folder" if os.path.isdir(name) else "in the local cache, nor on the Hub if it can be reached"
        raise FileNotFoundError(
            f"No GPT-2 weights for {name!r}: neither {' nor '.join(WEIGHT_FILES[::2])} is {where}; give a folder that "
            "has them."
        )
    tensors = (pair for file in files for pair in read_tensors(file))
    return fields, tensors, all(file.endswith(".safetensors") for file in files)


def read_tensors(file: str) -> Tensors:
    """The tensors of a safetensors or PyTorch file, one at a time."""
    if not file.endswith(".safetensors"):
        yield from load_pickle(file).items()
        return
    with reading(file), safe_open(file, framework="pt") as tensors:
        # The largest first, because it is in memory twice while it is copied.
        names = sorted(tensors.keys(), key=lambda name: not name.endswith("wte.weight"))
    for name in names:
        # One memory map per tensor, because pages that have been read count as used memory until the map is closed.
        with reading(file), safe_open(file, framework="pt") as tensors:
            yield name, tensors.get_tensor(name)


def read_generation_config(name: str, lookup: dict) -> GenerationConfig | None:
    try:
        return GenerationConfig.from_pretrained(name, **lookup)
    except OSError:
        return None  # old repositories have none; the library derives one from the configuration


def read_tensorflow(folder: str):
    """Configuration and tensors of an OpenAI folder (https://github.com/openai/gpt-2, download_model.py)."""
    try:
        import tensorflow as tf
    except ImportError as error:
        raise ImportError(
            f"{folder} contains a TensorFlow checkpoint; install TensorFlow to load it: pip install scratch_gpt2[tf]."
        ) from error
    file = os.path.join(folder, "hparams.json")
    with reading(file), open(file, encoding="utf-8") as opened:
        hparams = json.load(opened)
        sizes = {name: hparams[name] for name in ("n_layer", "n_head", "n_embd")}
        fields = {**sizes, "n_positions": hparams["n_ctx"], "vocab_size": hparams["n_vocab"]}

    def tensors() -> Tensors:
        prefix = tf.train.latest_checkpoint(folder) or os.path.join(folder, "model.ckpt")
        with reading(prefix, tf.errors.OpError):
            checkpoint = tf.train.load_checkpoint(prefix)
            for name in sorted(checkpoint.get_variable_to_shape_map()):
                tensor = torch.from_numpy(checkpoint.get_tensor(name))
                yield from_tensorflow_name(name), tensor.squeeze(0) if tensor.ndim == 3 else tensor  # (1, in, out)

    return fields | special_tokens(fields["vocab_size"]), tensors()


def from_tensorflow_name(name: str) -> str:
    """`model/h0/attn/c_attn/w` -> `h.0.attn.c_attn.weight`; a weight is called w, g (a gain) or, last, wte or wpe."""
    name = re.sub(r"^model/", "", name).replace("/", ".")
    name = re.sub(r"^h(\d+)\.", r"h.\1.", name)
    name = re.sub(r"^(wte|wpe)$", r"\1.weight", name)
    return re.sub(r"\.b$", ".bias", re.sub(r"\.[wg]$", ".weight", name))


def read_nanogpt(file: str, vocab_size: int):
    """Configuration, tensors and options of nanoGPT's ckpt.pt (https://github.com/karpathy/nanoGPT, train.py)."""
    checkpoint = load_pickle(file)
    if not {"model", "model_args"} <= checkpoint.keys():
        raise ValueError(f"{file} is not a checkpoint of nanoGPT, which contains 'model' and 'model_args'.")
    args = dict(checkpoint["model_args"])
    has_bias, dropout = args.pop("bias", True), args.pop("dropout", 0.0)
    with reading(file):
        fields = {name: args.pop(nanogpt_name) for nanogpt_name, name in NANOGPT_FIELDS.items()}
    if args:
        raise ValueError(f"{file}: {', '.join(sorted(args))} in model_args is not an option of nanoGPT's GPT.")
    fields |= {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout}
    fields["activation_function"] = "gelu"  # nanoGPT's nn.GELU() is the exact one, not OpenAI's approximation
    padded = fields["vocab_size"] == NANOGPT_VOCABULARY
    if padded:
        fields["vocab_size"] = OPENAI_VOCABULARY

    def tensors() -> Tensors:
        for name, tensor in checkpoint["model"].items():
            name = name.removeprefix("_orig_mod.")  # torch.compile's
            is_linear = re.search(r"\.c_(attn|fc|proj)\.weight$", name) is not None
            if padded and name in ("transformer.wte.weight", "lm_head.weight"):
                tensor = tensor[:vocab_size]
            yield name, tensor.t() if is_linear else tensor
            if not has_bias and (is_linear or re.search(r"\bln_\w+\.weight$", name)):
                yield name.removesuffix("weight") + "bias", tensor.new_zeros(tensor.shape[0])

    return fields | special_tokens(fields["vocab_size"]), tensors()
