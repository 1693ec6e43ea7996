"""AdamW as GPT-2 is trained today, and Muon for the matrices inside the blocks."""

import math

import torch
from torch import nn
from torch.distributed.tensor import DTensor
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


def orthogonalize(matrices: torch.Tensor, coefficients: tuple[float, float, float], steps: int) -> torch.Tensor:
    """Move the singular values of (..., R, C) matrices close to 1 by Newton-Schulz iteration (Jordan et al. 2024).

    A step multiplies X from the left by a polynomial of its Gram matrix X X^T. For wide matrices, the product of these
    factors is computed first: it only takes products of (R, R). This needs float32, which keeps small singular values.
    Sharded matrices (FSDP) do not take this shortcut.
    """
    if matrices.shape[-2] > matrices.shape[-1]:
        return orthogonalize(matrices.mT, coefficients, steps).mT
    a, b, c = coefficients
    x = matrices / matrices.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    gram = x @ x.mT  # (..., R, R)
    if x.shape[-1] < 2 * x.shape[-2] or isinstance(x, DTensor):
        for step in range(steps):
            gram = gram if step == 0 else x @ x.mT
            x = a * x + (b * gram + c * (gram @ gram)) @ x
        return x
    identity = torch.eye(x.shape[-2])
    product = identity
    for _ in range(steps):
        factor = a * identity + b * gram + c * (gram @ gram)
        product = factor @ product
        gram = factor @ gram @ factor
    return product @ x


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon for hidden matrices and AdamW for everything else, as one optimizer.

    Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) keeps a momentum of the gradient and steps
    along the nearest orthogonal matrix, so that no direction of a weight matrix is neglected. Its steps are scaled to
    the size of AdamW's (Liu et al. 2025, "Muon is Scalable for LLM Training", section 2.2): both therefore share one
    learning rate, one schedule and one weight decay.

    CPUs without bfloat16 instructions would emulate torch's Muon, which computes in bfloat16. They compute it in
    float32 here, for all matrices of one shape together.

    It is a single `Optimizer`, because Trainer, accelerate and the schedulers know one: `param_groups` and `state`
    are those of both parts together.

    Args:
        groups: what `parameter_groups` returns.
        lr, betas, eps: as for `torch.optim.AdamW`.
        momentum: of Muon.
    """

    def __init__(
        self, groups: dict[str, dict], lr: float, betas=(0.9, 0.95), eps: float = 1e-8, momentum: float = 0.95
    ):
        muon = torch.optim.Muon([groups["hidden"]], lr=lr, momentum=momentum, adjust_lr_fn="match_rms_adamw")
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
            if isinstance(part, torch.optim.Muon) and self.needs_float32():
                self.muon_step_in_float32(part.param_groups[0])
            else:
                part.step()
        return loss

    def needs_float32(self) -> bool:
        on_cpu = all(parameter.device.type == "cpu" for group in self.param_groups for parameter in group["params"])
        return on_cpu and not cpu_computes_bfloat16()

    def muon_step_in_float32(self, group: dict) -> None:
        """What `torch.optim.Muon.step` computes. The parts of sharded matrices (FSDP) cannot be stacked."""
        by_shape: dict[tuple, list[nn.Parameter]] = {}
        for number, parameter in enumerate(group["params"]):
            if parameter.grad is not None:
                key = (tuple(parameter.shape), number if isinstance(parameter, DTensor) else None)
                by_shape.setdefault(key, []).append(parameter)
        for (shape, _), parameters in by_shape.items():
            updates = []
            for parameter in parameters:
                state = self.state[parameter]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(parameter.grad)
                momentum = state["momentum_buffer"]
                momentum.lerp_(parameter.grad, 1 - group["momentum"])
                updates.append(parameter.grad.lerp(momentum, group["momentum"]).float())
            stacked = torch.stack(updates) if len(updates) > 1 else updates[0]
            steps = orthogonalize(stacked, group["ns_coefficients"], group["ns_steps"])
            scale = 0.2 * math.sqrt(max(shape))  # Liu et al. 2025, equation 4
            for parameter, step in zip(parameters, steps if len(updates) > 1 else [steps], strict=True):
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(step, alpha=-group["lr"] * scale)


def muon_for_trainer(model: PreTrainedModel, weight_decay: float, **kwargs) -> MuonWithAdamW:
    """Build `MuonWithAdamW` from a model, for Trainer's `optimizer_cls_and_kwargs`."""
    return MuonWithAdamW(parameter_groups(model, weight_decay), **kwargs)
