"""Configuration of the model: its sizes and options, under the names that GPT-2 itself uses."""

import transformers

OLDEST_TRANSFORMERS = "5.10"
# Before the other imports, as an older version may lack them.
if [*map(int, transformers.__version__.split(".")[:2])] < [*map(int, OLDEST_TRANSFORMERS.split("."))]:
    raise ImportError(
        f"scratch_gpt2 needs transformers {OLDEST_TRANSFORMERS} or newer, but {transformers.__version__} is "
        "installed: pip install -U transformers"
    )

from huggingface_hub.dataclasses import strict
from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig

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
    "AutoModelForSequenceClassification": "heads_scratch_gpt2.ScratchGPT2ForSequenceClassification",
    "AutoModelForTokenClassification": "heads_scratch_gpt2.ScratchGPT2ForTokenClassification",
    "AutoModelForQuestionAnswering": "heads_scratch_gpt2.ScratchGPT2ForQuestionAnswering",
}

# Far beyond any GPT-2. Larger values would take memory before a weight is read.
MAX_BLOCKS, MAX_LABELS = 1_000, 100_000


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
    keys_to_ignore_at_inference = ["past_key_values", "cache"]
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
        # Checkpoints of version 0.1 name other files; ours replace them. An entry with `--` names a repository, which
        # has its own files.
        stored = kwargs.get("auto_map") or {}
        kwargs["auto_map"] = AUTO_MAP | {
            auto_class: place
            for auto_class, place in stored.items()
            if auto_class not in AUTO_MAP or "--" in str(place)
        }
        if isinstance(labels := kwargs.get("num_labels"), int) and labels > MAX_LABELS:
            raise ValueError(f"num_labels is {labels} but must be at most {MAX_LABELS}.")
        super().__post_init__(**kwargs)
        self.validate_architecture()  # here a plain ValueError; `@strict` would wrap it in an exception of its own

    @property
    def head_dim(self) -> int:
        """Width D of one attention head."""
        return self.n_embd // self.n_head

    @property
    def inner_width(self) -> int:
        """Width of the feed-forward layer."""
        return self.n_inner if self.n_inner is not None else 4 * self.n_embd

    @property
    def matrix_parameters(self) -> int:
        """Weights of the matrices in all blocks: four of attention and two of the feed-forward layer in each."""
        return self.n_layer * (4 * self.n_embd**2 + 2 * self.n_embd * self.inner_width)

    @property
    def n_parameters(self) -> int:
        """Parameters of the network with its embeddings; of the language model too, where its output layer is tied."""
        embeddings = (self.vocab_size + self.n_positions) * self.n_embd
        biases = self.n_layer * (5 * self.n_embd + self.inner_width)
        norms = (2 * self.n_layer + 1) * 2 * self.n_embd
        return embeddings + self.matrix_parameters + biases + norms

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
        if self.n_layer > MAX_BLOCKS:
            raise ValueError(f"n_layer is {self.n_layer} but must be at most {MAX_BLOCKS}.")
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
