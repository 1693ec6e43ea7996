"""Faster text on a CPU: linear layers whose weights stand in memory as the processor's kernels read them.

    model = AutoModelForCausalLM.from_pretrained(folder).optimize_for_inference()
    model.generate(...)
    model.restore_from_inference()  # to train it, move it or load other weights

Inductor's freezing packs weights with the same operators of oneDNN, torch.ao's dynamic quantization with the same
operators for int8.
"""

import warnings

import torch
from torch import nn
from transformers import PreTrainedModel

RESTORE = "Call model.restore_from_inference() first"


class PackedLinear(nn.Linear):
    """An `nn.Linear` with its weight packed for oneDNN. Where nothing else needs the weight, `weight` is empty:
    packing only reorders numbers, and `packed.to_dense()` gives them back."""

    packed: torch.Tensor

    def forward(self, hidden_states):
        self.check(hidden_states, self.packed.dtype)
        return torch.ops.mkldnn._linear_pointwise(hidden_states, self.packed, self.bias, "none", [], "")

    def check(self, hidden_states, dtype: torch.dtype) -> None:
        if self.training or hidden_states.requires_grad:
            raise ValueError(f"{RESTORE}: a model that is optimized for inference has no gradients.")
        if hidden_states.dtype != dtype or not hidden_states.is_cpu:
            raise ValueError(f"{RESTORE}: a model optimized for inference stays in its dtype and on the CPU.")

    def unpack(self) -> None:
        if not self.weight.numel():
            self.weight.data = self.packed.to_dense().to(self.weight)
        del self.packed
        self.__class__ = nn.Linear

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not self.weight.numel():
            destination[f"{prefix}weight"] = self.packed.to_dense()


class Int8Linear(PackedLinear):
    """An `nn.Linear` that computes in int8: each row of the weight has a scale, each row of the input another one."""

    def forward(self, hidden_states):
        self.check(hidden_states, torch.float32)
        if hidden_states.numel() == self.in_features:
            return self.multiply(hidden_states) if self.bias is None else self.multiply(hidden_states).add_(self.bias)
        # The operator has one scale for all rows: with rows of equal size none takes another's digits.
        size = hidden_states.abs().amax(-1, keepdim=True).clamp_(min=torch.finfo(hidden_states.dtype).tiny)
        output = self.multiply(hidden_states / size).mul_(size)
        return output if self.bias is None else output.add_(self.bias)

    def multiply(self, hidden_states):
        # 7 bits for the input, as in torch.ao: AVX2 adds two products in 16 bits, which 8 would overflow.
        return torch.ops.quantized.linear_dynamic(hidden_states, self.packed, True)


@torch.no_grad()
def optimize_for_inference(model: PreTrainedModel, weights: str | None = None) -> PreTrainedModel:
    """Pack the weights of all linear layers for the CPU, and return the model. `restore_from_inference` undoes it.

    Results are those of the model up to rounding, in the model's own dtype, float32 or (where the CPU computes it)
    bfloat16, and no second copy of a weight is kept but the head's, which is the token embedding too. With
    `weights="int8"` they are approximate, and the weights stay in memory beside their int8 copies.
    Nothing else changes: `generate`, `pipeline`, `save_pretrained` and `state_dict` do as before.

    Raises ValueError for a model in training mode, with adapters or quantized, on another device, in another dtype,
    and where torch has no oneDNN or no FBGEMM.
    """
    check_can_be_packed(model, weights)
    linears = [module for module in model.modules() if type(module) is nn.Linear]
    shared = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for linear in linears:
        if weights == "int8":
            linear.packed = pack_int8(linear.weight)
            linear.__class__ = Int8Linear
        else:
            linear.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())
            linear.__class__ = PackedLinear
            if id(linear.weight) not in shared:
                linear.weight.data = linear.weight.new_empty(0)
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.requires_grad_(False)
    model.inference_undo = (learning, model.register_load_state_dict_pre_hook(refuse_to_load))
    return model


def restore_from_inference(model: PreTrainedModel) -> PreTrainedModel:
    """Undo `optimize_for_inference`: the same parameters with the same numbers, to the last bit, learn again.

    Raises ValueError for a model that is not optimized.
    """
    if not is_optimized(model):
        raise ValueError("The model is not optimized for inference; there is nothing to restore.")
    for module in model.modules():
        if isinstance(module, PackedLinear):
            module.unpack()
    learning, hook = model.inference_undo
    for parameter in learning:
        parameter.requires_grad_(True)
    hook.remove()
    del model.inference_undo
    return model


def is_optimized(model: PreTrainedModel) -> bool:
    return any(isinstance(module, PackedLinear) for module in model.modules())


def check_can_be_packed(model: PreTrainedModel, weights: str | None) -> None:
    if weights not in (None, "int8"):
        raise ValueError(f"weights={weights!r} is unknown: leave it out or give 'int8'.")
    if is_optimized(model):
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
    from .training.arguments import cpu_computes_bfloat16  # imports the library's Trainer

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
