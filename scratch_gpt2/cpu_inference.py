"""Faster generation on a CPU: fewer and faster operations between one token and the next.

    model = AutoModelForCausalLM.from_pretrained(folder).optimize_for_inference()
    model.generate(...)
    print(model.inference_report())  # which kernels run, and how fast they read their weights
    model.restore_from_inference()  # before training it, moving it or loading other weights

The weights of linear layers are stored or packed in the layout that this CPU reads fastest (`cpu_kernels.py`). Query,
key and value are fused into one matrix, and a block computes its layers without calling their modules.
"""

import time
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Cache, PreTrainedModel
from transformers.utils import logging

from .cpu_kernels import PRODUCTS, Packed, missing_operator
from .hardware import cpu_computes_bfloat16
from .modeling_scratch_gpt2 import ScratchGPT2Block, ScratchGPT2ForCausalLM

RESTORE = "Call model.restore_from_inference() first"
TIMED_TOKENS = 8
logger = logging.get_logger(__name__)


class PackedLayers:
    """The packed weights of one linear layer, or of the linear layers of a block. They follow the layers' weights.

    Attributes:
        products: one for each group of layers with the same input; none in a copy before its first `refresh`.
        complete: whether the products do all that the layers do. With adapters, pruning or hooks they do not.
    """

    def __init__(self, module: nn.Module, product_class: type[Packed]):
        self.module, self.product_class = module, product_class
        self.dtype = next(module.parameters()).dtype
        self.forget()

    def forget(self) -> None:
        self.weights: list[torch.Tensor] = []
        self.products: list = []
        self.fingerprint: list | None = None
        self.complete = False

    def __getstate__(self) -> dict:  # packed tensors can be neither copied nor pickled: a copy packs its own
        return {"module": self.module, "product_class": self.product_class, "dtype": self.dtype}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self.forget()

    def refresh(self) -> None:
        """Pack the weights again if they have changed, and find out whether the products are complete.

        Raises ValueError for weights in another dtype, on another device, or whose gradients are asked for.
        """
        groups = layer_groups(self.module)
        layers = [layer for group in groups for layer in group]
        self.complete = all(map(is_plain_linear, layers)) and not (is_block(self.module) and is_hooked(self.module))
        if not self.complete:
            logger.warning_once("Layers with an adapter, pruning or a hook are not optimized for inference.")
            return
        if any(layer.weight.dtype != self.dtype or not layer.weight.is_cpu for layer in layers):
            raise ValueError(f"{RESTORE}: a model optimized for inference stays in its dtype and on the CPU.")
        if torch.is_grad_enabled() and any(layer.weight.requires_grad for layer in layers):
            raise ValueError(f"{RESTORE}: a model that is optimized for inference has no gradients.")
        if self.fingerprint != fingerprint(layers, self.weights):
            self.pack(groups)
            self.fingerprint = fingerprint(layers, self.weights)

    @torch.no_grad()
    def pack(self, groups: list[list[nn.Linear]]) -> None:
        self.weights, self.products = [], []
        for group in groups:
            shape = (sum(layer.out_features for layer in group), group[0].in_features)
            weight = lay_out(group, by_columns=self.product_class.stores_by_columns(shape, self.dtype))
            self.weights.append(weight)
            self.products.append(self.product_class(weight, join_biases(group)))


def is_block(module: nn.Module) -> bool:
    return isinstance(module, ScratchGPT2Block)


def layer_groups(module: nn.Module) -> list[list[nn.Module]]:
    """The linear layers of a block, those with the same input together; of a linear layer, itself."""
    if not is_block(module):
        return [[module]]
    attn, mlp = module.attn, module.mlp
    return [[attn.q_proj, attn.k_proj, attn.v_proj], [attn.out_proj], [mlp.up_proj], [mlp.down_proj]]


def is_plain_linear(layer: nn.Module) -> bool:
    """False for adapters, and where pruning or a parametrization computes the weight."""
    return type(layer) is nn.Linear and layer._parameters.get("weight") is not None


def is_hooked(block: nn.Module) -> bool:
    """Whether somebody would notice that the modules inside `block` are not called."""
    inside = [module for part in (block.attn, block.mlp) for module in part.modules()]
    hooks = [hook for m in inside for hook in (*m._forward_pre_hooks.values(), *m._forward_hooks.values())]
    # The library's own hooks record the attention weights, which only eager attention has.
    return any("forward" in vars(module) for module in inside) or any(
        getattr(hook, "__module__", "") != "transformers.utils.output_capturing" for hook in hooks
    )


def join_biases(layers: list[nn.Linear]) -> torch.Tensor | None:
    return torch.cat([layer.bias for layer in layers]) if layers[0].bias is not None else None


def lay_out(layers: list[nn.Linear], by_columns: bool) -> torch.Tensor:
    """Join the weights of `layers`, which become views of the result, stored by rows or by columns."""
    weights = [layer.weight.detach() for layer in layers]
    weight = weights[0] if len(weights) == 1 else torch.cat(weights)  # (out, in)
    weight = weight.t().contiguous().t() if by_columns else weight.contiguous()
    for layer, part in zip(layers, weight.split([len(layer.weight) for layer in layers]), strict=True):
        layer.weight.data = part
    return weight


def fingerprint(layers: list[nn.Linear], weights: list[torch.Tensor]) -> list:
    """What changes with the weights of `layers`, stored as `weights`: addresses, versions, and some of the numbers,
    because assignments through `.data` do not count as a new version."""
    parameters = [parameter for layer in layers for parameter in (layer.weight, layer.bias) if parameter is not None]
    versions = [(p.data_ptr(), 0 if p.is_inference() else p._version) for p in parameters]
    biases = [layer.bias for layer in layers if layer.bias is not None]
    return [*versions, *map(sample_bytes, weights), *map(to_bytes, biases)]


def sample_bytes(weight: torch.Tensor) -> bytes:
    """A number of each row and of each column of an (out, in) weight."""
    stored = (weight if weight.is_contiguous() else weight.t()).view(-1)
    return to_bytes(stored[:: min(weight.shape) + 1])


def to_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def linear_forward(linear: nn.Linear, hidden_states):
    check_input(linear, hidden_states)
    if not linear.packed.complete or torch.is_autocast_enabled("cpu"):
        return type(linear).forward(linear, hidden_states)
    return linear.packed.products[0](hidden_states)


def block_forward(block: ScratchGPT2Block, hidden_states, attention_mask=None, past_key_values=None, **kwargs):
    """`ScratchGPT2Block.forward` with packed weights, for the library's sdpa attention."""
    check_input(block, hidden_states)
    attn, packed = block.attn, block.packed
    as_usual = not packed.complete or torch.is_autocast_enabled("cpu") or attn.config._attn_implementation != "sdpa"
    if as_usual:
        return type(block).forward(block, hidden_states, attention_mask, past_key_values, **kwargs)
    qkv_proj, out_proj, up_proj, down_proj = packed.products
    batch, length, width = hidden_states.shape
    heads = qkv_proj(block.attn_norm(hidden_states)).view(batch, length, 3, -1, attn.head_dim)
    query, key, value = heads.permute(2, 0, 3, 1, 4).unbind()  # (B, T, 3, H, D) -> 3 * (B, H, T, D)
    if past_key_values is not None:
        key, value = past_key_values.update(key, value, attn.layer_idx)  # (B, H, S, D)
    is_causal = attention_mask is None and length > 1  # the library's own rule
    output = F.scaled_dot_product_attention(query, key, value, attention_mask, 0.0, is_causal, scale=attn.scaling)
    hidden_states = hidden_states + out_proj(output.transpose(1, 2).reshape(batch, length, width))
    return hidden_states + down_proj(block.mlp.act(up_proj(block.mlp_norm(hidden_states))))


def check_input(module: nn.Module, hidden_states: torch.Tensor) -> None:
    if module.training or hidden_states.requires_grad:
        raise ValueError(f"{RESTORE}: a model that is optimized for inference has no gradients.")
    if hidden_states.dtype != module.packed.dtype or not hidden_states.is_cpu:
        raise ValueError(f"{RESTORE}: a model optimized for inference stays in its dtype and on the CPU.")


def optimize_for_inference(model: PreTrainedModel, weights: str | None = None) -> PreTrainedModel:
    """Make the model faster on the CPU, and return it. `restore_from_inference` undoes it.

    By default, the results are equal up to rounding, in the model's own dtype: float32 or, if the CPU supports it,
    bfloat16. With `weights="bf16"`, `"int8"` or `"int4"`, they are approximate. The first call for a given model size
    takes about a second, because it measures which kernels are the fastest. Packed copies of weights need additional
    memory. `generate`, `pipeline`, `save_pretrained`, `state_dict`, `copy.deepcopy` and `pickle` work as before.
    Changed weights take effect at the latest when the next text starts, that is, with an empty cache. Layers with an
    adapter, a hook or pruning are not optimized.

    Weights may be stored by columns. Restore the model before you run code that needs contiguous weights, such as
    random pruning.

    Raises ValueError for a model in training mode, with adapters or quantized weights, on another device, in another
    dtype, and if torch has no oneDNN, no FBGEMM or not the operators for `weights`.
    """
    check_can_be_packed(model, weights)
    block_class, output_class = PRODUCTS[weights]
    blocks = [module for module in model.modules() if is_block(module)]
    inside = {module for block in blocks for module in block.modules()}
    linears = [module for module in model.modules() if type(module) is nn.Linear and module not in inside]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.requires_grad_(False)
    for module in (*blocks, *linears):
        module.packed = PackedLayers(module, block_class if is_block(module) else output_class)
        module.forward = partial(block_forward if is_block(module) else linear_forward, module)
        module.packed.refresh()
    follow = partial(follow_weights, [module.packed for module in (*blocks, *linears)])
    hooks = [
        model.base_model.register_forward_pre_hook(follow, with_kwargs=True),
        model.register_load_state_dict_pre_hook(refuse_to_load),
        model.register_state_dict_post_hook(store_by_rows),
    ]
    model.inference_undo = (trainable, hooks)
    return model


def follow_weights(packed: list[PackedLayers], module: nn.Module, args: tuple, kwargs: dict) -> None:
    """Before a forward pass that starts a text. One that continues a text has keys and values of the same weights."""
    cache = next((value for value in (*args, *kwargs.values()) if isinstance(value, Cache)), None)
    if cache is None or cache.get_seq_length() == 0:
        for layers in packed:
            layers.refresh()


def inference_report(model: PreTrainedModel) -> str:
    """One line for each shape (out, in) of weights: the kernels for one row and for several rows, and, where they were
    chosen by measuring, the GB/s at which they read the weight.

    Raises ValueError for a model that is not optimized.
    """
    if not hasattr(model, "inference_undo"):
        raise ValueError("The model is not optimized for inference: call model.optimize_for_inference() first.")
    kernels = chosen_kernels(model)
    return "\n".join(f"{shape}: {one}; several rows: {few}" for shape, (one, few) in kernels.items())


def chosen_kernels(model: PreTrainedModel) -> dict[tuple[int, ...], list[str]]:
    """The kernels for one row and for several rows, by the shape of the weight."""
    kernels = {}
    for module in model.modules():
        packed = vars(module).get("packed")
        for weight, product in zip(packed.weights, packed.products, strict=True) if packed else ():
            kernels[tuple(weight.shape)] = product.report()
    return kernels


def optimize_if_faster(model: nn.Module) -> str:
    """Optimize one of our language models in float32 on a CPU if this reduces the time per token by at least 10%, and
    return one line that names the kernels. Other models, and models with adapters or quantized weights, are not
    changed."""
    own = f"Kernels: torch's ({type(model).__name__}, {model.dtype}, {model.device})"
    if not isinstance(model, ScratchGPT2ForCausalLM) or model.dtype != torch.float32:
        return own
    try:
        check_can_be_packed(model, None)
    except ValueError:
        return own
    before = seconds_per_token(model)
    optimize_for_inference(model)
    if seconds_per_token(model) > 0.9 * before:
        restore_from_inference(model)
        return f"{own}, the fastest for this model"
    kernels = [f"{shape} {one}" for shape, (one, _) in chosen_kernels(model).items()]
    return f"Kernels: {', '.join(kernels)}"


@torch.no_grad()
def seconds_per_token(model: ScratchGPT2ForCausalLM) -> float:
    """The least of a few tokens that continue a text of one."""
    ids = torch.zeros(1, 1, dtype=torch.long)
    cache, least = model(ids, use_cache=True).past_key_values, float("inf")
    for _ in range(min(TIMED_TOKENS, model.config.n_positions - 1)):
        start = time.perf_counter()
        model(ids, past_key_values=cache, use_cache=True)
        least = min(least, time.perf_counter() - start)
    return least


def restore_from_inference(model: PreTrainedModel) -> PreTrainedModel:
    """Undo `optimize_for_inference`: the same parameters, bit for bit, are trainable again.

    Raises ValueError for a model that is not optimized.
    """
    if not hasattr(model, "inference_undo"):
        raise ValueError("The model is not optimized for inference; there is nothing to restore.")
    for module in model.modules():
        if "packed" in vars(module):
            del module.packed, module.forward
        if isinstance(module, nn.Linear):
            module.weight.data = module.weight.data.contiguous()
    trainable, hooks = model.inference_undo
    if not has_adapters(model):  # an adapter added since has frozen the weights for itself
        for parameter in trainable:
            parameter.requires_grad_(True)
    for hook in hooks:
        hook.remove()
    del model.inference_undo
    return model


def has_adapters(model: nn.Module) -> bool:
    return any(hasattr(module, "base_layer") for module in model.modules())


def check_can_be_packed(model: PreTrainedModel, weights: str | None) -> None:
    if weights not in PRODUCTS:
        raise ValueError(f"weights={weights!r} is unknown: leave it out or give 'bf16', 'int8' or 'int4'.")
    if any("packed" in vars(module) for module in model.modules()):
        raise ValueError(f"{RESTORE}: the model is optimized for inference already.")
    if any(module.training for module in model.modules()):
        raise ValueError("Call model.eval() first: only a model in evaluation mode can be optimized for inference.")
    if has_adapters(model):
        raise ValueError("Merge the adapter first (merge_and_unload): layers with adapters cannot be packed.")
    if getattr(model, "hf_quantizer", None) is not None:
        raise ValueError("Load the model without quantization_config: quantized layers cannot be packed.")
    if {parameter.device.type for parameter in model.parameters()} != {"cpu"}:
        raise ValueError(
            f"The model is on {model.device}: optimize_for_inference is for the CPU, call model.to('cpu') first."
        )
    if not torch.backends.mkldnn.is_available() or "x86" not in torch.backends.quantized.supported_engines:
        raise ValueError("This torch has no oneDNN or no FBGEMM; use the model as it is.")
    if (operator := missing_operator(weights)) is not None:
        raise ValueError(f"torch {torch.__version__} has no operator {operator}; install another version of torch.")
    check_dtype(model, weights)


def check_dtype(model: PreTrainedModel, weights: str | None) -> None:
    dtypes = {parameter.dtype for parameter in model.parameters()}
    in_bfloat16 = dtypes == {torch.bfloat16} and weights is None
    if (in_bfloat16 or weights == "bf16") and not cpu_computes_bfloat16():
        raise ValueError("This CPU does not compute bfloat16: load the model with dtype=torch.float32.")
    if not in_bfloat16 and dtypes != {torch.float32}:
        names = ", ".join(sorted(str(dtype) for dtype in dtypes))
        raise ValueError(f"The weights are {names}: load the model with dtype=torch.float32.")


def refuse_to_load(module, *_):
    raise ValueError(f"{RESTORE}: weights cannot be loaded into a model that is optimized for inference.")


def store_by_rows(module, state_dict, *_):
    rows = {}  # tied weights stay one tensor
    for name, tensor in state_dict.items():
        state_dict[name] = rows.setdefault(tensor.data_ptr(), tensor.contiguous())
