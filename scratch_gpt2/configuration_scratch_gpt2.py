"""Everything that decides the shape and behaviour of a GPT-2, under the names that GPT-2 itself uses."""

import json
import os
import pickle
from contextlib import contextmanager

from huggingface_hub import ResolvedRevision
from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig
from transformers.utils.hub import cached_file, get_checkpoint_shard_files, resolve_revision

# OpenAI's four sizes (Radford et al. 2019, table 2) and one for tests and laptops.
PRESETS = {
    "tiny": {"n_layer": 4, "n_head": 4, "n_embd": 128, "n_positions": 256},
    "gpt2": {"n_layer": 12, "n_head": 12, "n_embd": 768},
    "gpt2-medium": {"n_layer": 24, "n_head": 16, "n_embd": 1024},
    "gpt2-large": {"n_layer": 36, "n_head": 20, "n_embd": 1280},
    "gpt2-xl": {"n_layer": 48, "n_head": 25, "n_embd": 1600},
}

# Where `trust_remote_code` finds each class. All heads are listed in every checkpoint, so that a language model saved
# to the Hub can be loaded as a classifier too.
AUTO_MAP = {
    "AutoConfig": "configuration_scratch_gpt2.ScratchGPT2Config",
    "AutoModel": "modeling_scratch_gpt2.ScratchGPT2Model",
    "AutoModelForCausalLM": "modeling_scratch_gpt2.ScratchGPT2ForCausalLM",
    "AutoModelForSequenceClassification": "modeling_scratch_gpt2.ScratchGPT2ForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_scratch_gpt2.ScratchGPT2ForTokenClassification",
    "AutoModelForQuestionAnswering": "modeling_scratch_gpt2.ScratchGPT2ForQuestionAnswering",
}

# Beyond any GPT-2, and what a computer can still count: each costs memory before a weight is read.
MOST_BLOCKS, MOST_LABELS = 1_000, 100_000
# So many may be missing from a checkpoint, and are then made anew: what a small model lacks costs little.
FEW_WEIGHTS = 10_000_000
LOOKUP_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


@strict
class ScratchGPT2Config(PreTrainedConfig):
    """Configuration of a GPT-2.

    Args:
        vocab_size: number of token ids.
        n_positions: longest sequence, in tokens; there is one learned embedding per position.
        n_embd: width C of the residual stream.
        n_layer: number of blocks.
        n_head: attention heads per block; must divide `n_embd`.
        n_inner: width of the feed-forward layer; `None` means 4 * `n_embd`.
        activation_function: `gelu_new` (OpenAI's, the tanh approximation of GELU), or a name of `ACT2FN`.
        resid_pdrop, embd_pdrop, attn_pdrop: dropout probabilities after each sub-layer, after the embeddings, and on
            the attention weights.
        layer_norm_epsilon: added to the variance in every LayerNorm.
        initializer_range: standard deviation of the initial weights.
        scale_attn_weights: divide the attention scores by the square root of the head's width.
        scale_attn_by_inverse_layer_idx: divide them by (layer index + 1) as well.
        use_cache: return the keys and values for fast generation (never by default while training).
        classifier_dropout: dropout before the token classification head.
        summary_first_dropout: dropout before the multiple-choice head.

    Raises:
        ValueError: for sizes that do not fit together, and for options of transformers' GPT-2 that do not exist here.
    """

    model_type = "scratch_gpt2"
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = {
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    }
    base_model_tp_plan = {
        "layers.*.attn.q_proj": "colwise",
        "layers.*.attn.k_proj": "colwise",
        "layers.*.attn.v_proj": "colwise",
        "layers.*.attn.out_proj": "rowwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None
    activation_function: str = "gelu_new"
    resid_pdrop: float | int = 0.1
    embd_pdrop: float | int = 0.1
    attn_pdrop: float | int = 0.1
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    use_cache: bool = True
    bos_token_id: int | None = 50256
    eos_token_id: int | list[int] | None = 50256
    # GPT-2 has no pad token: the end-of-text token pads, and attention masks say which is which.
    pad_token_id: int | None = 50256
    tie_word_embeddings: bool = True
    classifier_dropout: float | int = 0.1
    summary_first_dropout: float | int = 0.1
    # The remaining options of transformers' GPT-2, accepted only at the value that every OpenAI checkpoint has.
    reorder_and_upcast_attn: bool = False
    add_cross_attention: bool = False
    summary_type: str = "cls_index"
    summary_use_proj: bool = True
    summary_activation: str | None = None
    summary_proj_to_labels: bool = True

    def __post_init__(self, **kwargs):
        kwargs["auto_map"] = {**AUTO_MAP, **(kwargs.get("auto_map") or {})}
        if isinstance(labels := kwargs.get("num_labels"), int) and labels > MOST_LABELS:
            raise ValueError(f"num_labels is {labels} but can be {MOST_LABELS} at most.")
        super().__post_init__(**kwargs)
        self.validate_architecture()  # here a plain ValueError; `@strict` would wrap it in an exception of its own

    @classmethod
    def from_preset(cls, name: str, **overrides) -> "ScratchGPT2Config":
        """The configuration of `tiny`, `gpt2`, `gpt2-medium`, `gpt2-large` or `gpt2-xl`, with `overrides` on top."""
        if name not in PRESETS:
            raise ValueError(f"Unknown preset {name!r}: choose one of {', '.join(PRESETS)}.")
        return cls(**{**PRESETS[name], **overrides})

    def validate_architecture(self):
        """Checked when a configuration is built, and by `@strict` when it is saved."""
        for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)} but must be at least 1.")
        if self.n_layer > MOST_BLOCKS:
            raise ValueError(f"n_layer is {self.n_layer} but can be {MOST_BLOCKS} at most.")
        if self.n_embd % self.n_head != 0:
            raise ValueError(
                f"n_embd ({self.n_embd}) is not divisible by n_head ({self.n_head}): every head needs the same width."
            )
        for name in (
            "resid_pdrop",
            "embd_pdrop",
            "attn_pdrop",
            "classifier_dropout",
            "summary_first_dropout",
        ):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)} but a dropout probability lies between 0 and 1.")
        if self.activation_function not in ACT2FN:
            raise ValueError(
                f"Unknown activation_function {self.activation_function!r}: GPT-2 uses 'gelu_new'; "
                "transformers.activations.ACT2FN lists the others."
            )
        not_implemented = {
            "reorder_and_upcast_attn": False,
            "add_cross_attention": False,
            "summary_type": "cls_index",
            "summary_use_proj": True,
            "summary_activation": None,
            "summary_proj_to_labels": True,
        }
        for name, only_value in not_implemented.items():
            if getattr(self, name) != only_value:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is not implemented: scratch_gpt2 supports only {only_value!r} "
                    "(use transformers' own GPT-2 for the rest)."
                )


def pin_revision(name_or_path, hub_kwargs: dict) -> dict:
    """`hub_kwargs` with the exact commit, so that all files of one load are of one state; or, where the Hub does not
    answer at once, with `local_files_only`, because huggingface_hub would try again for most of a minute."""
    if name_or_path is None or os.path.exists(name_or_path):
        return hub_kwargs
    about_hub = {name: hub_kwargs[name] for name in ("token", "local_files_only", "cache_dir") if name in hub_kwargs}
    revision = resolve_revision(name_or_path, hub_kwargs.get("revision"), **about_hub)
    if isinstance(revision, ResolvedRevision):
        return {**hub_kwargs, "revision": revision}
    return {**hub_kwargs, "local_files_only": True}


def is_foreign_checkpoint(name_or_path, hub_kwargs: dict) -> bool:
    """Whether `name_or_path` is a GPT-2 checkpoint in somebody else's format. `hub_kwargs` come from `pin_revision`.

    Raises FileNotFoundError for what is neither here nor on the Hub.
    """
    if name_or_path is None or hub_kwargs.get("state_dict") is not None:
        return False
    path = os.fspath(name_or_path)
    if path.endswith(".pt") or any(os.path.isfile(os.path.join(path, name)) for name in ("hparams.json", "ckpt.pt")):
        return True
    try:
        config, _ = PreTrainedConfig.get_config_dict(path, **hub_kwargs)
    except OSError as error:
        if os.path.exists(path) or not hub_kwargs.get("local_files_only"):
            return False  # an adapter, or nothing: the library knows what to do or say
        raise FileNotFoundError(
            f"{path!r} is no folder here, not in the local cache, and could not be had from the Hugging Face Hub (no "
            "network, no such repository, or no access); give the folder of a checkpoint instead."
        ) from error
    return config.get("model_type") == "gpt2"


@contextmanager
def reading_checkpoint(name_or_path, hub_kwargs: dict):
    """Refuse a checkpoint that would run code or fill the memory, and say in one sentence which one is damaged, where
    the libraries speak of headers and pickles. `hub_kwargs` come from `pin_revision`."""
    if name_or_path is not None and hub_kwargs.get("state_dict") is None:
        check_checkpoint(os.fspath(name_or_path), hub_kwargs)
    try:
        yield
    except (SafetensorError, pickle.UnpicklingError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"The checkpoint {name_or_path} is damaged ({reason}); copy or download it again.") from error


def check_checkpoint(name: str, hub_kwargs: dict) -> None:
    """Raise ValueError where the weights are a pickle, lie outside the checkpoint, or are far fewer than announced."""
    lookup = {key: hub_kwargs[key] for key in LOOKUP_ARGUMENTS if key in hub_kwargs}
    suffix = f"{hub_kwargs['variant']}.safetensors" if hub_kwargs.get("variant") else "safetensors"
    files = []
    if hub_kwargs.get("use_safetensors") is not False:
        if file := find_file(name, f"model.{suffix}", lookup):
            files = [file]
        elif index := find_file(name, f"model.{suffix}.index.json", lookup):
            check_index(index)
            files, _ = get_checkpoint_shard_files(name, index, **lookup)
    for pickled in ("pytorch_model.bin", "pytorch_model.bin.index.json"):
        if not files and find_file(name, pickled, lookup):
            raise ValueError(
                f"{name} has no model.safetensors, only a pickle, which could run code; ask for the former."
            )
    if files and (config := find_file(name, "config.json", lookup)):
        with open(config, encoding="utf-8") as opened:
            check_size(json.load(opened), files, name)


def find_file(name: str, file: str, lookup: dict) -> str | None:
    optional = dict.fromkeys(("missing_entries", "gated_repo", "connection_errors"), False)
    return cached_file(name, file, **{f"_raise_exceptions_for_{what}": no for what, no in optional.items()}, **lookup)


def check_index(index: str) -> None:
    """Raise ValueError for an index of weights that names other files than those beside it."""
    try:
        with open(index, encoding="utf-8") as opened:
            names = set(json.load(opened)["weight_map"].values())
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} cannot be read ({error}): it is damaged or incomplete; copy it again.") from error
    for name in names:
        if not isinstance(name, str) or name != os.path.basename(name) or "\\" in name or ".." in name:
            raise ValueError(f"{index} names {name!r} as a part of the weights, which is no file beside it.")


def check_size(fields: dict, files: list[str], origin: str) -> None:
    """Raise ValueError where config.json's `fields` describe more weights than `files` have room for, at half a byte
    each: the library would allocate them all before it found them missing. Few weights may be missing."""
    try:
        config = ScratchGPT2Config.from_dict(fields)
    except (StrictDataclassError, ValueError, TypeError):
        return  # the library will say so
    inner = config.n_inner if config.n_inner is not None else 4 * config.n_embd
    blocks = config.n_layer * (4 * config.n_embd**2 + 2 * config.n_embd * inner)
    parameters = blocks + (config.vocab_size + config.n_positions) * config.n_embd
    stored = sum(map(os.path.getsize, files))
    if parameters > max(2 * stored, FEW_WEIGHTS):
        raise ValueError(
            f"The configuration of {origin} describes {parameters:,} weights, but its files have {stored:,} bytes: "
            "one of them is damaged or of another model, so copy both again."
        )
