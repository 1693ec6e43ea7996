"""GPT-2, from the attention of one head to the language model. Read it from top to bottom.

GPT-2 turns token ids into one vector per position, lets every block add to these vectors, and predicts from the vector
of each position the token that comes next:

    x = embed_tokens(ids) + embed_positions(0, 1, 2, ...)
    for block in layers:
        x = x + attn(attn_norm(x))      # positions exchange information
        x = x + mlp(mlp_norm(x))        # each position is transformed independently
    logits = lm_head(norm(x))

The file starts with plain functions, as in a textbook: layer norm, GELU, the causal mask, and attention with one head
and with many. The modules, the network and the language model follow. They call fused kernels that compute the same;
`tests/test_modeling.py` compares both. The functions at the end check and prepare the input: skip them on a first
reading.

Sources: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners" (GPT-2), section 2.3;
Radford et al. 2018 (GPT), section 3; Vaswani et al. 2017, "Attention Is All You Need", section 3.
`reference.py` in the project's repository computes the same network in plain tensor arithmetic.

Letters in shapes: B batch size, T sequence length, S sequence length including the cached positions, C = n_embd,
H = n_head, D = C / H, V = vocab_size.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.utils import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from .checkpoint_files import CheckpointReader
from .configuration_scratch_gpt2 import ScratchGPT2Config
from .linear_cross_entropy import cast_for_autocast, label_count, linear_cross_entropy, only_multiplies


def layer_norm(x, weight, bias, epsilon=1e-5):
    """Layer normalization (Ba et al. 2016): (..., C) -> (..., C). `nn.LayerNorm` computes the same in one kernel.

    Each vector is normalized to mean 0 and variance 1, so that the inputs of a layer have the same scale at any depth.
    The learned `weight` and `bias` (C,) then scale and shift each channel. `epsilon` avoids a division by zero for
    constant vectors.
    """
    centered = x - x.mean(dim=-1, keepdim=True)  # (..., C)
    variance = centered.square().mean(dim=-1, keepdim=True)  # (..., 1), the mean over C channels, not C - 1
    return centered / torch.sqrt(variance + epsilon) * weight + bias


def gelu(x):
    """x times the probability that a standard normal variable is below x: a smooth version of ReLU, which passes large
    positive x unchanged and maps large negative x to almost 0. OpenAI trained GPT-2 with this tanh approximation
    (Hendrycks & Gimpel 2016, section 2)."""
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def causal_mask(length: int) -> torch.Tensor:
    """(T, T), true where the position of the row may attend to the position of the column. It may not attend to later
    positions, because the model has to predict the tokens there.

    >>> causal_mask(4).int()
    tensor([[1, 0, 0, 0],
            [1, 1, 0, 0],
            [1, 1, 1, 0],
            [1, 1, 1, 1]], dtype=torch.int32)
    """
    return torch.ones(length, length, dtype=torch.bool).tril()


def one_head(query, key, value):
    """Causal attention of one head over one text (Vaswani et al. 2017, section 3.2.1): 3 * (T, D) -> (T, D).

    The score of a pair of positions is the dot product of the query of one position ("what am I looking for?") and the
    key of the other ("what do I contain?"). The softmax turns the scores of a position into weights that sum to 1. The
    output of the position is the average of the values, with these weights.

    Why divide by the square root of D? A score is a sum of D products. If the entries of query and key are independent
    with mean 0 and variance 1, each product has variance 1, and their sum has variance D. After the division by the
    square root of D, a score has variance 1 for any D. Larger scores would make the softmax nearly one-hot, and its
    gradient would vanish.
    """
    scores = query @ key.T / math.sqrt(query.shape[-1])  # (T, D) @ (D, T) -> (T, T)
    scores = scores.masked_fill(~causal_mask(len(query)), -math.inf)  # a weight of 0 after the softmax
    weights = scores.softmax(dim=-1)  # (T, T), each row sums to 1
    return weights @ value  # (T, T) @ (T, D) -> (T, D)


def eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """From one head to many: the same four lines for all H heads of all B rows. `@` multiplies the last two dimensions
    and treats the others as a batch, so all heads are computed in parallel. Each head has D of the C channels. Thus H
    heads cost as much as one head of width C, but each of them can attend to different positions.

    `attention_mask` (B, 1, T, S) contains the causal mask and the padding. It is added to the scores: 0 where a query
    may attend, a large negative number elsewhere. The faster attention functions of transformers (sdpa, flash, flex)
    take the same arguments.
    """
    scores = query @ key.transpose(-1, -2) * scaling  # (B, H, T, D) @ (B, H, D, S) -> (B, H, T, S)
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    output = weights @ value  # (B, H, T, S) @ (B, H, S, D) -> (B, H, T, D)
    return output.transpose(1, 2).contiguous(), weights  # (B, T, H, D)


class ScratchGPT2Attention(nn.Module):
    """Causal multi-head self-attention: each position gathers information from itself and the positions before it.

    Three matrices project the residual stream to queries, keys and values. A fourth one combines the heads' outputs.
    """

    def __init__(self, config: ScratchGPT2Config, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.scaling = self.head_dim**-0.5 if config.scale_attn_weights else 1.0
        if config.scale_attn_by_inverse_layer_idx:
            self.scaling /= layer_idx + 1
        self.is_causal = True

        self.q_proj = nn.Linear(config.n_embd, config.n_embd)
        self.k_proj = nn.Linear(config.n_embd, config.n_embd)
        self.v_proj = nn.Linear(config.n_embd, config.n_embd)
        self.out_proj = nn.Linear(config.n_embd, config.n_embd)
        self.out_proj.joins_residual = True  # for `_init_weights`
        self.resid_dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, hidden_states, attention_mask=None, past_key_values: Cache | None = None, **kwargs):
        batch_and_length = hidden_states.shape[:-1]
        query = self.split_heads(self.q_proj(hidden_states))  # (B, T, C) -> (B, H, T, D)
        key = self.split_heads(self.k_proj(hidden_states))
        value = self.split_heads(self.v_proj(hidden_states))
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)  # (B, H, S, D)

        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.config.attn_pdrop if self.training else 0.0
        output, weights = attention(
            self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )
        output = self.out_proj(output.reshape(*batch_and_length, -1).contiguous())  # (B, T, H, D) -> (B, T, C)
        return self.resid_dropout(output), weights

    def split_heads(self, projected):
        """Split C channels into H heads of width D: (B, T, C) -> (B, H, T, D)."""
        return projected.view(*projected.shape[:-1], -1, self.head_dim).transpose(1, 2)


class ScratchGPT2MLP(nn.Module):
    """Position-wise feed-forward network: up to a wider layer, a nonlinearity, and back to the width of the stream.

    Why 4C? It is the ratio of Vaswani et al. 2017 (section 3.3), a convention rather than a law: the two matrices then
    have 8 C^2 of a block's 12 C^2 weights, and the loss depends little on the ratio (Kaplan et al. 2020, figure 5).
    """

    def __init__(self, config: ScratchGPT2Config):
        super().__init__()
        self.up_proj = nn.Linear(config.n_embd, config.inner_width)
        # transformers' "gelu_new" computes `gelu` above in many small operations, "gelu_pytorch_tanh" in one kernel.
        fused = "gelu_pytorch_tanh" if config.activation_function == "gelu_new" else config.activation_function
        self.act = ACT2FN[fused]
        self.down_proj = nn.Linear(config.inner_width, config.n_embd)
        self.down_proj.joins_residual = True
        self.resid_dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, hidden_states):
        hidden_states = self.act(self.up_proj(hidden_states))  # (B, T, C) -> (B, T, 4C)
        return self.resid_dropout(self.down_proj(hidden_states))  # (B, T, C)


class ScratchGPT2Block(GradientCheckpointingLayer):
    """One block: attention and the feed-forward network, each of which adds to the residual stream.

    Why a residual stream? `x + f(x)` passes x on unchanged, and the gradient flows back through the sum unchanged as
    well. Therefore the first block learns as well as the last one (He et al. 2016), and a sub-layer only has to learn
    what to add.

    Why pre-norm? The norm is applied to the input of each sub-layer, so the stream itself is never normalized between
    blocks. If the norm is applied after the sum, as in Vaswani et al. 2017, the gradients near the output are large at
    initialization, and training needs a learning rate warm-up (Xiong et al. 2020).
    """

    def __init__(self, config: ScratchGPT2Config, layer_idx: int):
        super().__init__()
        self.attn_norm = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = ScratchGPT2Attention(config, layer_idx)
        self.mlp_norm = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = ScratchGPT2MLP(config)

    def forward(self, hidden_states, attention_mask=None, past_key_values: Cache | None = None, **kwargs):
        attn_output, _ = self.attn(
            cast_for_autocast(self.attn_norm(hidden_states)),
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            **kwargs,
        )
        hidden_states = hidden_states + attn_output  # (B, T, C)
        return hidden_states + self.mlp(self.mlp_norm(hidden_states))


class ScratchGPT2PreTrainedModel(CheckpointReader, PreTrainedModel):
    """Base class of the network and its heads: initialization, and the features of transformers that they support."""

    config: ScratchGPT2Config
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["ScratchGPT2Block"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": ScratchGPT2Block, "attentions": ScratchGPT2Attention}

    @torch.no_grad()
    def _init_weights(self, module):
        """Normal(0, initializer_range), zero biases; and "we scale the weights of residual layers at initialization
        by a factor of 1/sqrt(N) where N is the number of residual layers" (GPT-2, section 2.3), two in each block."""
        super()._init_weights(module)
        if getattr(module, "joins_residual", False):  # the library skips modules without parameters
            init.normal_(module.weight, std=self.config.initializer_range / math.sqrt(2 * self.config.n_layer))


class ScratchGPT2Model(ScratchGPT2PreTrainedModel):
    """The network without a head: token ids in, one vector per position out.

    Why position embeddings? Attention alone does not depend on the order of the earlier tokens: the same keys and
    values in another order give the same weighted average. A learned vector for each position makes the order visible.
    """

    def __init__(self, config: ScratchGPT2Config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.n_embd)
        self.embed_positions = nn.Embedding(config.n_positions, config.n_embd)
        self.embd_dropout = nn.Dropout(config.embd_pdrop)
        self.layers = nn.ModuleList([ScratchGPT2Block(config, layer_idx) for layer_idx in range(config.n_layer)])
        self.norm = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.gradient_checkpointing = False
        self.post_init()

    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """Args:
            input_ids: (B, T) token ids.
            attention_mask: (B, S) with 1 for tokens and 0 for padding, on either side; S includes the cached
                positions. Or a complete (B, 1, T, S) mask.
            position_ids: (B, T). By default they follow `attention_mask`, so left padding changes nothing. Documents
                packed into one row do not attend to each other if `position_ids` restart at 0 for each document and
                there is no `attention_mask`. With a mask, the row is one document.
            past_key_values: keys and values of earlier positions. `cache`, the name in transformers 5.24, is accepted
                with every version.
            inputs_embeds: (B, T, C) instead of `input_ids`.
            token_type_ids: (B, T); their token embeddings are added, as in transformers' GPT-2.
            use_cache: return `past_key_values`; by default `config.use_cache`, but False in training.

        Returns:
            `last_hidden_state` (B, T, C) and, if requested, `past_key_values`, `hidden_states` (n_layer + 1 times
            (B, T, C); the last is normalized) and `attentions` (n_layer times (B, H, T, S), eager attention only).

        Raises:
            ValueError: both or neither of `input_ids` and `inputs_embeds`, no rows or tokens, a sequence longer than
                `n_positions`, a mask of another shape, an id outside the vocabulary (on a GPU this ends in a
                device-side assertion), or an argument of transformers' GPT-2 that is not implemented here.
        """
        cache = kwargs.pop("cache", None)
        past_key_values = cache if past_key_values is None else past_key_values
        check_arguments(input_ids, inputs_embeds, kwargs)
        if input_ids is not None:
            inputs_embeds = look_up(self.embed_tokens, input_ids, "Token id")  # (B, T, C)
        mask, position_ids, past_key_values = self.prepare(
            inputs_embeds, attention_mask, position_ids, past_key_values, use_cache
        )

        hidden_states = inputs_embeds + look_up(self.embed_positions, position_ids, "Position")
        if token_type_ids is not None:
            hidden_states = hidden_states + look_up(self.embed_tokens, token_type_ids, "Token type id")
        hidden_states = self.embd_dropout(hidden_states)
        for block in self.layers:
            hidden_states = block(
                hidden_states, mask, past_key_values=past_key_values, position_ids=position_ids, **kwargs
            )
        hidden_states = self.norm(hidden_states)
        return BaseModelOutputWithPast(hidden_states, past_key_values)

    def prepare(self, inputs_embeds, attention_mask, position_ids, past_key_values: Cache | None, use_cache):
        """The mask for the attention function, the position of each token, and the cache."""
        past_length = past_key_values.get_seq_length() if past_key_values is not None else 0
        may_be_packed = attention_mask is None and past_key_values is None and not inputs_embeds.is_meta
        packed_positions = position_ids if may_be_packed else None
        check_length(self.config.n_positions, inputs_embeds, past_length, packed_positions)
        check_mask(attention_mask, inputs_embeds, past_length, past_key_values)

        # Make the mask before a cache: with one, even empty, the library does not look for packed documents.
        mask = create_causal_mask(self.config, inputs_embeds, attention_mask, past_key_values, packed_positions)
        if position_ids is None:
            position_ids = count_positions(inputs_embeds, attention_mask, past_length)  # (1 or B, T)
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        return mask, position_ids, past_key_values


class ScratchGPT2ForCausalLM(ScratchGPT2PreTrainedModel, GenerationMixin):
    """The language model: the network, and one score (logit) for each token of the vocabulary.

    Why tie the output layer to the token embedding? Both have one vector per token: the embedding of the token as an
    input, and the direction of the stream that predicts it as the next token. Sharing one matrix saves V * C weights
    (38.6 of 163 million for GPT-2 small), and rare tokens get a gradient from every prediction (Press & Wolf 2017).
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: ScratchGPT2Config):
        super().__init__(config)
        self.model = ScratchGPT2Model(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        skip_logits: bool | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Arguments as for `ScratchGPT2Model.forward`, and

        Args:
            labels: (B, T) token ids, usually `input_ids` itself, with -100 for positions without a loss. They are
                shifted by one position in the loss.
            logits_to_keep: return logits for the last N positions only (0: all), or for the given positions. All
                labels count in the loss regardless.
            skip_logits: compute the loss without the (B, T, V) logits, and return `None` for them. By default, this is
                done if the caller only reads the loss: in training with `input_ids`, `labels` and
                `num_items_in_batch`, which is how transformers' Trainer calls a model.

        Returns `loss`, a float32 scalar (mean over the labeled positions, or their sum over `num_items_in_batch`),
        `logits` (B, T, V), and what `ScratchGPT2Model` returns."""
        if labels is not None and use_cache is None:
            use_cache = False
        inputs = input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, token_type_ids, use_cache
        outputs = self.model(*inputs, **kwargs)
        hidden_states = outputs.last_hidden_state  # (B, T, C)

        # Callers that pass inputs_embeds, such as PEFT's prompt methods, may compute their own loss from the logits.
        only_loss = self.training and input_ids is not None and kwargs.get("num_items_in_batch") is not None
        if skip_logits is not None:
            only_loss = skip_logits
        loss = logits = None
        if labels is None:
            logits = self.lm_head(keep_positions(hidden_states, logits_to_keep))  # (B, T, V)
        elif only_loss and only_multiplies(self.lm_head) and self.loss_function is ForCausalLMLoss:
            loss = linear_cross_entropy(hidden_states, self.lm_head.weight, labels, **kwargs)
        else:
            logits = self.lm_head(hidden_states)
            loss = self.next_token_loss(logits, labels, **kwargs)
            logits = None if skip_logits else keep_positions(logits, logits_to_keep)
        return CausalLMOutputWithPast(loss, logits, cache_of(outputs), outputs.hidden_states, outputs.attentions)

    def next_token_loss(self, logits, labels, **kwargs):
        """transformers' loss, except that a batch without labels has the loss 0 and not 0 / 0."""
        if self.loss_function is ForCausalLMLoss:
            kwargs["num_items_in_batch"] = label_count(labels, **kwargs)
        return self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)


def cache_of(outputs) -> Cache | None:
    """Keys and values in a model's output, called `cache` since transformers 5.24 and `past_key_values` before."""
    return outputs.cache if hasattr(outputs, "cache") else outputs.past_key_values


def keep_positions(states, logits_to_keep: int | torch.Tensor):
    """States (B, T, ...) of the last N positions (0: all) or of the given ones: indices (N,) for all rows or (B, N)
    for each, or a boolean mask (B, T), which joins the rows."""
    if isinstance(logits_to_keep, int):
        return states[:, -logits_to_keep:]
    if logits_to_keep.dtype == torch.bool and logits_to_keep.ndim == 2:
        return states[logits_to_keep]
    if logits_to_keep.ndim == 2:
        return torch.take_along_dim(states, logits_to_keep[..., None], dim=1)
    return states[:, logits_to_keep]


# Arguments of transformers' GPT-2, in this version or an earlier one, that would change the result.
NOT_IMPLEMENTED = ("encoder_hidden_states", "encoder_attention_mask", "head_mask")


def check_arguments(input_ids, inputs_embeds, kwargs: dict) -> None:
    """Raise unless there is exactly one input, and for unsupported arguments of transformers' GPT-2."""
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("Give exactly one of input_ids and inputs_embeds.")
    for name in NOT_IMPLEMENTED:
        if kwargs.get(name) is not None:
            raise ValueError(f"{name} is not implemented: use transformers' own GPT-2 for it.")


def check_length(n_positions, inputs_embeds, past_length, packed_positions: torch.LongTensor | None) -> None:
    """Raise for empty input and for more than `n_positions` positions, which would otherwise end in an IndexError, or
    in a device-side assertion on a GPU."""
    batch, length = inputs_embeds.shape[:2]
    if batch == 0 or length == 0:
        raise ValueError(f"The input is empty: {batch} rows of {length} tokens; give at least one of each.")
    past_length = read_number(past_length)
    if packed_positions is not None and length > n_positions:  # each document counts for itself
        if not can_be_read(packed_positions):
            return
        length = int(packed_positions.max()) + 1
    if torch.is_tensor(past_length):
        return
    if (total := past_length + length) > n_positions:
        raise ValueError(
            f"The sequence is too long: {total} positions ({past_length} cached and {length} new positions) but "
            f"the model has n_positions={n_positions}; truncate the input or generate fewer tokens."
        )


def can_be_read(number) -> bool:
    """Whether the value is available to Python: not while a graph is compiled, and not on the meta device."""
    return not torch.is_tensor(number) or not (torch.compiler.is_compiling() or number.is_meta)


def read_number(number):
    """A number that a static cache counts on the device, as an int if it can be read. A symbol of a graph remains one:
    `int` would replace it by the value of the example."""
    return int(number) if torch.is_tensor(number) and can_be_read(number) else number


def check_mask(attention_mask, inputs_embeds, past_length, past_key_values: Cache | None) -> None:
    """Raise for a mask that does not have one column for each cached and each new position: transformers would treat
    missing columns as padding."""
    if not torch.is_tensor(attention_mask) or attention_mask.ndim == 4:  # finished
        return
    batch, length = inputs_embeds.shape[:2]
    shape = tuple(attention_mask.shape)
    if len(shape) != 2 or shape[0] != batch:
        raise ValueError(f"attention_mask has the shape {shape}, but ({batch}, positions) or 4 dimensions are needed.")
    past_length = read_number(past_length)
    if torch.is_tensor(past_length):
        return
    total = past_length + length
    # A cache may have room for more, and then so may its mask.
    if shape[1] < total or (past_key_values is None and shape[1] > total):
        raise ValueError(
            f"attention_mask has {shape[1]} columns, but there are {total} positions ({past_length} cached and "
            f"{length} new positions); give a column for each."
        )


def count_positions(inputs_embeds, attention_mask, past_length):
    """Positions of the new tokens: 0, 1, 2, ... for the tokens that the mask does not mask out."""
    new = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + past_length  # (T,)
    if attention_mask is None or attention_mask.ndim != 2:
        return new.unsqueeze(0)
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, new.to(attention_mask.device)]


def look_up(embedding: nn.Embedding, ids: torch.LongTensor, meaning: str) -> torch.Tensor:
    """Rows `ids` of an embedding, with a clearer error than PyTorch's "index out of range in self" on a CPU."""
    try:
        return embedding(ids)
    except IndexError:
        worst = ids.min() if ids.min() < 0 else ids.max()
        raise ValueError(
            f"{meaning} {worst.item()} is out of range: valid values are 0 to {embedding.num_embeddings - 1}."
        ) from None


def __getattr__(name: str):
    """The other heads, which checkpoints of early versions look for here. The import also makes `save_pretrained` copy
    their file."""
    if name.startswith("ScratchGPT2"):
        from .heads_scratch_gpt2 import HEADS

        if name in HEADS:
            return HEADS[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
