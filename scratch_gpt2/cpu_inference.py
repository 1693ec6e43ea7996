"""Faster text on a CPU: blocks that take fewer and faster steps from one token to the next.

    model = AutoModelForCausalLM.from_pretrained(folder).optimize_for_inference()
    model.generate(...)
    model.restore_from_inference()  # to train it, move it or load other weights

Query, key and value are one product, and a block does not call a module for each line. Inductor's freezing packs
weights with the same operators of oneDNN, torch.ao's dynamic quantization with the same operators for int8.
"""

import copy
import math
import warnings

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from .hardware import cpu_computes_bfloat16
from .modeling_scratch_gpt2 import ScratchGPT2Block

RESTORE = "Call model.restore_from_inference() first"


class Product:
    """`F.linear` with a weight that stands in memory twice: as it is for one row, packed for oneDNN for several."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None):
        self.weight, self.bias, self.dtype = weight.detach(), bias, weight.dtype
        self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.contiguous())
        # Measured: one row is faster with MKL on AVX2, by the costs of a call, and with oneDNN on AVX-512.
        in_mkl = self.dtype == torch.float32 and torch.backends.cpu.get_cpu_capability() != "AVX512"
        self.row_for_mkl = weight.shape[1] if in_mkl else 0
        self.cut()

    def cut(self) -> None:
        """A part of the weight for each thread, because MKL gives a product of one row to a single one: parts of the
        sum where the weight stands by columns, parts of the output where it stands by rows."""
        out_features, in_features = self.weight.shape
        self.cuts_sum = self.weight.t().is_contiguous()
        self.n_parts = math.gcd(torch.get_num_threads(), in_features if self.cuts_sum else out_features)
        bias = torch.zeros(out_features) if self.bias is None else self.bias
        if self.cuts_sum:
            self.parts = self.weight.t().unflatten(0, (self.n_parts, -1))  # (P, in / P, out)
            self.part_biases = torch.zeros(self.n_parts, 1, out_features)
            self.part_biases[0] = bias
        else:
            self.parts = self.weight.unflatten(0, (self.n_parts, -1)).mT  # (P, in, out / P)
            self.part_biases = bias.view(self.n_parts, 1, -1)

    def __call__(self, hidden_states):
        if hidden_states.numel() != self.row_for_mkl:
            return torch.ops.mkldnn._linear_pointwise(hidden_states, self.packed, self.bias, "none", [], "")
        if self.n_parts == 1:
            return F.linear(hidden_states, self.weight, self.bias)
        if self.cuts_sum:
            output = torch.baddbmm(self.part_biases, hidden_states.view(self.n_parts, 1, -1), self.parts).sum(0)
        else:
            rows = hidden_states.view(1, 1, -1).expand(self.n_parts, -1, -1)
            output = torch.baddbmm(self.part_biases, rows, self.parts)
        return output.view(*hidden_states.shape[:-1], -1)

    def __deepcopy__(self, memo):  # a packed tensor has no copy of its own
        return Product(copy.deepcopy(self.weight, memo), copy.deepcopy(self.bias, memo))


class Int8Product:
    """`F.linear` in int8: each row of the weight has a scale, each row of the input another one."""

    dtype = torch.float32

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None):
        self.packed, self.bias, self.in_features = pack_int8(weight.detach()), bias, weight.shape[1]

    def __call__(self, hidden_states):
        if hidden_states.numel() == self.in_features:
            return self.multiply(hidden_states) if self.bias is None else self.multiply(hidden_states).add_(self.bias)
        # The operator has one scale for all rows: with rows of equal size none takes another's digits.
        size = hidden_states.abs().amax(-1, keepdim=True).clamp_(min=torch.finfo(hidden_states.dtype).tiny)
        output = self.multiply(hidden_states / size).mul_(size)
        return output if self.bias is None else output.add_(self.bias)

    def multiply(self, hidden_states):
        # 7 bits for the input, as in torch.ao: AVX2 adds two products in 16 bits, which 8 would overflow.
        return torch.ops.quantized.linear_dynamic(hidden_states, self.packed, True)


class FastLinear(nn.Linear):
    """A linear layer outside of the blocks, the head among them."""

    def use(self, product: type) -> None:
        self.products = [product(lay_out([self]), self.bias)]
        self.__class__ = FastLinear

    def forward(self, hidden_states):
        check_input(self, hidden_states)
        return self.products[0](hidden_states)


class FastBlock(ScratchGPT2Block):
    """`ScratchGPT2Block` line by line, for the library's sdpa attention; with another one only its check is new."""

    def use(self, product: type) -> None:
        attn, mlp = self.attn, self.mlp
        qkv = [attn.q_proj, attn.k_proj, attn.v_proj]
        self.products = [product(lay_out(qkv), torch.cat([linear.bias for linear in qkv]))]
        self.products += [product(lay_out([one]), one.bias) for one in (attn.out_proj, mlp.up_proj, mlp.down_proj)]
        self.__class__ = FastBlock

    def forward(self, hidden_states, attention_mask=None, past_key_values=None, **kwargs):
        check_input(self, hidden_states)
        attn = self.attn
        if attn.config._attn_implementation != "sdpa":
            return super().forward(hidden_states, attention_mask, past_key_values, **kwargs)
        qkv_proj, out_proj, up_proj, down_proj = self.products
        batch, length, width = hidden_states.shape
        heads = qkv_proj(self.attn_norm(hidden_states)).view(batch, length, 3, -1, attn.head_dim)
        query, key, value = heads.permute(2, 0, 3, 1, 4).unbind()  # (B, T, 3, H, D) -> 3 * (B, H, T, D)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, attn.layer_idx)  # (B, H, S, D)
        is_causal = attention_mask is None and length > 1  # the library's own rule
        output = F.scaled_dot_product_attention(query, key, value, attention_mask, 0.0, is_causal, scale=attn.scaling)
        hidden_states = hidden_states + out_proj(output.transpose(1, 2).reshape(batch, length, width))
        return hidden_states + down_proj(self.mlp.act(up_proj(self.mlp_norm(hidden_states))))


def lay_out(linears: list[nn.Linear]) -> torch.Tensor:
    """The weights of layers one under the other, of which their own become parts, with the longer side in a row: with
    one thread on AVX2 MKL reads (2304, 768) and (50257, 768) at 13 and 11 GB/s by rows and at 17 and 20 by columns,
    (768, 3072) at 18 by rows and 15 by columns, where a plain sum reads 17; with two threads and a part for each
    the three are read at 23, 28 and 25, without parts at 18, 21 and 18, and a plain sum at 25 to 30."""
    weight = torch.cat([linear.weight.detach() for linear in linears])  # (out, in)
    if weight.shape[0] >= weight.shape[1]:
        weight = weight.t().contiguous().t()
    for linear, part in zip(linears, weight.split([linear.out_features for linear in linears]), strict=True):
        linear.weight.data = part
    return weight


def check_input(module: nn.Module, hidden_states: torch.Tensor) -> None:
    if module.training or hidden_states.requires_grad:
        raise ValueError(f"{RESTORE}: a model that is optimized for inference has no gradients.")
    if hidden_states.dtype != module.products[0].dtype or not hidden_states.is_cpu:
        raise ValueError(f"{RESTORE}: a model optimized for inference stays in its dtype and on the CPU.")


@torch.no_grad()
def optimize_for_inference(model: PreTrainedModel, weights: str | None = None) -> PreTrainedModel:
    """Make the model faster on the CPU, and return it. `restore_from_inference` undoes it.

    Results are those of the model up to rounding, in the model's own dtype, float32 or (where the CPU computes it)
    bfloat16. With `weights="int8"` they are approximate. The weights stay in memory beside their packed copies.
    Nothing else changes: `generate`, `pipeline`, `save_pretrained` and `state_dict` do as before.

    Raises ValueError for a model that trains, has adapters or is quantized, on another device, in another dtype, and
    where torch has no oneDNN or no FBGEMM.
    """
    check_can_be_packed(model, weights)
    product = Int8Product if weights == "int8" else Product
    blocks = [module for module in model.modules() if type(module) is ScratchGPT2Block]
    inside = {module for block in blocks for module in block.modules()}
    for block in blocks:
        FastBlock.use(block, product)
    for linear in set(model.modules()) - inside:
        if type(linear) is nn.Linear:
            FastLinear.use(linear, product)
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.requires_grad_(False)
    refuse, by_rows = model.register_load_state_dict_pre_hook, model.register_state_dict_post_hook
    model.inference_undo = (learning, [refuse(refuse_to_load), by_rows(store_by_rows)])
    return model


def restore_from_inference(model: PreTrainedModel) -> PreTrainedModel:
    """Undo `optimize_for_inference`: the same parameters with the same numbers, to the last bit, learn again.

    Raises ValueError for a model that is not optimized.
    """
    if not hasattr(model, "inference_undo"):
        raise ValueError("The model is not optimized for inference; there is nothing to restore.")
    for module in model.modules():
        if isinstance(module, FastBlock | FastLinear):
            del module.products
            module.__class__ = ScratchGPT2Block if isinstance(module, FastBlock) else nn.Linear
        if isinstance(module, nn.Linear):
            module.weight.data = module.weight.data.contiguous()
    learning, hooks = model.inference_undo
    for parameter in learning:
        parameter.requires_grad_(True)
    for hook in hooks:
        hook.remove()
    del model.inference_undo
    return model


def check_can_be_packed(model: PreTrainedModel, weights: str | None) -> None:
    if weights not in (None, "int8"):
        raise ValueError(f"weights={weights!r} is unknown: leave it out or give 'int8'.")
    if any(isinstance(module, FastBlock | FastLinear) for module in model.modules()):
        raise ValueError(f"{RESTORE}: the model is optimized for inference already.")
    if any(module.training for module in model.modules()):
        raise ValueError("Call model.eval() first: only a model that does not train can be optimized for inference.")
    if any(hasattr(module, "base_layer") for module in model.modules()):
        raise ValueError("Merge the adapter first (merge_and_unload): layers with adapters cannot be packed.")
    if getattr(model, "hf_quantizer", None) is not None:
        raise ValueError("Load the model without quantization_config: quantized layers cannot be packed.")
    if {parameter.device.type for parameter in model.parameters()} != {"cpu"}:
        raise ValueError(
            f"The model is on {model.device}: optimize_for_inference is for the CPU, model.to('cpu') first."
        )
    if not torch.backends.mkldnn.is_available() or "x86" not in torch.backends.quantized.supported_engines:
        raise ValueError("This torch has no oneDNN or no FBGEMM; use the model as it is.")
    check_dtype(model, weights)


def check_dtype(model: PreTrainedModel, weights: str | None) -> None:
    dtypes = {parameter.dtype for parameter in model.parameters()}
    if dtypes == {torch.bfloat16} and weights is None:
        if not cpu_computes_bfloat16():
            raise ValueError("This CPU does not compute bfloat16: load the model with dtype=torch.float32.")
    elif dtypes != {torch.float32}:
        names = ", ".join(sorted(str(dtype) for dtype in dtypes))
        raise ValueError(f"The weights are {names}: load the model with dtype=torch.float32.")


def pack_int8(weight: torch.Tensor):
    """FBGEMM's packed form of an (out, in) weight: int8 from -127 to 127 times a scale for each output."""
    scales = weight.abs().amax(1).clamp(min=torch.finfo(weight.dtype).tiny) / 127  # (out,)
    numbers = torch.round(weight / scales[:, None]).to(torch.int8)
    no_shift = torch.zeros(len(scales), dtype=torch.long)
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # "deprecated", but FBGEMM has no other door
        quantized = torch._make_per_channel_quantized_tensor(numbers, scales.double(), no_shift, 0)
    return torch.ops.quantized.linear_prepack(quantized, None)


def refuse_to_load(module, *_):
    raise ValueError(f"{RESTORE}: weights cannot be loaded into a model that is optimized for inference.")


def store_by_rows(module, state_dict, *_):
    rows = {}  # tied weights stay one tensor
    for name, tensor in state_dict.items():
        state_dict[name] = rows.setdefault(tensor.data_ptr(), tensor.contiguous())
