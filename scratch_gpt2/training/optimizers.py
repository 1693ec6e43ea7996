"""AdamW as GPT-2 is trained today, and Muon for the matrices inside the blocks."""

from contextlib import nullcontext

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from ..hardware import cpu_computes_bfloat16


def parameter_groups(model: PreTrainedModel, weight_decay: float) -> dict[str, dict]:
    """The trained parameters of a language model in three groups, by what they are:

    - `hidden`: the matrices inside the blocks,
    - `embeddings`: the token and position embeddings, and the output layer where it is not one of them,
    - `vectors`: biases and norms, which are not decayed.

    As in nanoGPT, every matrix is decayed, the embeddings among them.
    """
    outer = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    embeddings = {id(module.weight) for module in (*outer, model.get_output_embeddings())}
    groups: dict[str, list[nn.Parameter]] = {"hidden": [], "embeddings": [], "vectors": []}
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        kind = "vectors" if parameter.ndim < 2 else "embeddings" if id(parameter) in embeddings else "hidden"
        groups[kind].append(parameter)
    return {
        kind: {"params": parameters, "weight_decay": 0.0 if kind == "vectors" else weight_decay}
        for kind, parameters in groups.items()
    }


class Float32ForBfloat16(TorchFunctionMode):
    """Inside, `tensor.bfloat16()` gives a copy in float32."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.bfloat16:
            return args[0].to(torch.float32, copy=True)
        return func(*args, **(kwargs or {}))


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon for hidden matrices and AdamW for everything else, as one optimizer.

    Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) keeps a momentum of the gradient and steps
    along the nearest orthogonal matrix, so that no direction of a weight matrix is neglected. Its steps are scaled to
    the size of AdamW's (Liu et al. 2025, "Muon is Scalable for LLM Training", section 2.2): both therefore share one
    learning rate, one schedule and one weight decay.

    It is a single `Optimizer`, because Trainer, accelerate and the schedulers know one: `param_groups` and `state`
    are those of both parts together.

    Args:
        groups: what `parameter_groups` returns.
        lr, betas, eps: as for `torch.optim.AdamW`.
    """

    def __init__(self, groups: dict[str, dict], lr: float, betas=(0.9, 0.95), eps: float = 1e-8):
        muon = torch.optim.Muon([groups["hidden"]], lr=lr, adjust_lr_fn="match_rms_adamw")
        adamw = torch.optim.AdamW([groups["embeddings"], groups["vectors"]], lr=lr, betas=betas, eps=eps)
        super().__init__([*muon.param_groups, *adamw.param_groups], {"lr": lr})
        self.parts = (muon, slice(0, 1)), (adamw, slice(1, 3))

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part, groups in self.parts:
            # Again for every step: `load_state_dict` and FSDP replace the groups.
            part.param_groups, part.state = self.param_groups[groups], self.state
            with self.precision():
                part.step()
        return loss

    def precision(self):
        on_cpu = all(parameter.device.type == "cpu" for group in self.param_groups for parameter in group["params"])
        return Float32ForBfloat16() if on_cpu and not cpu_computes_bfloat16() else nullcontext()


def muon_for_trainer(model: PreTrainedModel, weight_decay: float, **kwargs) -> MuonWithAdamW:
    """Build `MuonWithAdamW` from a model, for Trainer's `optimizer_cls_and_kwargs`."""
    return MuonWithAdamW(parameter_groups(model, weight_decay), **kwargs)
