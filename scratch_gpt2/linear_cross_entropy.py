"""Cross entropy of a linear layer's outputs without materializing all of the logits.

For 8 rows of 1024 tokens, GPT-2's logits are 8 * 1024 * 50257 floats: 1.6 GB, and as much again for their gradient,
only to be reduced to one number. Here the rows are processed in chunks: the logits, the loss and the gradients of a
chunk are computed together, and its logits are freed before the next chunk.

With logits z = W h and target y, the loss is  logsumexp(z) - z[y],  and its gradient with respect to z is
softmax(z) - onehot(y).
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import module as torch_module

# The label of positions that are not scored, as in `torch.nn.functional.cross_entropy`.
IGNORE_INDEX = -100
# Number of logits held at once: 64 MB in float32, or 333 rows of GPT-2's vocabulary.
CHUNK_ELEMENTS = 2**24


def linear_cross_entropy(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor | None = None,
    num_items_in_batch: torch.Tensor | int | None = None,
    shift_labels: torch.Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    **kwargs,
) -> torch.Tensor:
    """Next-token loss of `hidden_states @ weight.T`, equal to transformers' `ForCausalLMLoss` on those logits.

    Positions without a label cost nothing: they are removed before the first multiplication.

    Args:
        hidden_states: (B, T, C)
        weight: (V, C), usually the token embeddings.
        labels: (B, T) token ids, shifted here by one: position t is scored on `labels[:, t + 1]`.
        num_items_in_batch: divisor of the summed loss; defaults to the number of labeled positions.
        shift_labels: (B, T) labels that are already shifted; they replace `labels`.
        ignore_index: label of the positions to ignore.
        kwargs: arguments of other parts of the model, ignored as in transformers' own losses.

    Returns:
        A float32 scalar; 0 when no position has a label.

    Raises:
        ValueError: for more or fewer labels than positions, as `F.cross_entropy` does.
        IndexError: for a label outside the vocabulary, as `F.cross_entropy` does on a CPU.
    """
    items = label_count(labels, num_items_in_batch, shift_labels, ignore_index)
    if shift_labels is None:
        shift_labels = F.pad(labels[..., 1:], (0, 1), value=ignore_index)  # type: ignore[index]  # one is given
    rows = hidden_states.reshape(-1, hidden_states.shape[-1])  # (N, C) with N = B * T
    targets = shift_labels.reshape(-1).to(rows.device)  # (N,)
    if len(targets) != len(rows):  # F.cross_entropy's message
        raise ValueError(f"Expected input batch_size ({len(rows)}) to match target batch_size ({len(targets)}).")
    items = items.to(rows.device) if isinstance(items, torch.Tensor) else items

    # A compiled graph has fixed shapes, so there the unlabelled rows stay and count as zero.
    if not torch.compiler.is_compiling():
        kept = (targets != ignore_index).nonzero().squeeze(-1)
        rows, targets = rows[kept], targets[kept]
        outside = (targets < 0) | (targets >= weight.shape[0])
        if outside.any():
            raise IndexError(f"Target {targets[outside][0].item()} is out of bounds.")  # F.cross_entropy's message

    compute_dtype = autocast_dtype(rows) or weight.dtype
    total = _LinearCrossEntropySum.apply(rows, weight, targets, ignore_index, compute_dtype, torch.is_grad_enabled())
    return total / items


def label_count(labels, num_items_in_batch=None, shift_labels=None, ignore_index: int = IGNORE_INDEX, **kwargs):
    """Divisor of the summed loss: `num_items_in_batch`, by default the number of labeled positions. Never 0, so that
    a batch without labels has the loss 0 and not 0 / 0."""
    if num_items_in_batch is None:
        scored = labels[..., 1:] if shift_labels is None else shift_labels
        num_items_in_batch = (scored != ignore_index).sum()
    return num_items_in_batch + (num_items_in_batch == 0)


def autocast_dtype(tensor: torch.Tensor) -> torch.dtype | None:
    """The dtype in which autocast multiplies on the tensor's device, or `None` where it is off."""
    device = tensor.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):  # autocast does not know meta tensors
        return None
    return torch.get_autocast_dtype(device)


def cast_for_autocast(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` in the dtype that autocast computes in: one copy for all layers that read it. Without this, each layer
    casts the tensor and keeps its own copy for the backward pass."""
    return tensor.to(autocast_dtype(tensor) or tensor.dtype)


def only_multiplies(layer: nn.Module) -> bool:
    """Whether calling `layer` does nothing but `F.linear(x, layer.weight)`, so that its weight can stand for the call.

    It does more when an adapter, a quantizer or tensor parallelism has replaced the layer or its weight, when somebody
    listens with a hook, or when something like accelerate's offloading supplies the weight only during the call.
    """
    return (
        type(layer) is nn.Linear
        and type(layer.weight) is nn.Parameter
        and layer.bias is None
        and not layer.weight.is_meta
        and "forward" not in layer.__dict__
        and not (layer._forward_hooks or layer._forward_pre_hooks)
        and not (layer._backward_hooks or layer._backward_pre_hooks)
        and not torch_module._has_any_global_hook()
    )


class _LinearCrossEntropySum(torch.autograd.Function):
    """Sum of the losses. Its gradients are computed in the forward pass, while the logits of a chunk exist."""

    @staticmethod
    def forward(ctx, rows, weight, targets, ignore_index, compute_dtype, grad_enabled):
        needs_rows, needs_weight = (grad_enabled and needed for needed in ctx.needs_input_grad[:2])
        total = torch.zeros((), dtype=torch.float32, device=rows.device)
        rows_grad = torch.empty_like(rows) if needs_rows else None
        weight_grad = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None

        with torch.autocast(rows.device.type, enabled=False):
            compute_weight = weight.to(compute_dtype)  # (V, C)
            chunk_length = max(1, CHUNK_ELEMENTS // weight.shape[0])
            for start in range(0, rows.shape[0], chunk_length):
                chunk = slice(start, start + chunk_length)
                inputs = rows[chunk].to(compute_dtype)  # (n, C)
                logits = _padded_logits(inputs, compute_weight)  # (n, P)
                log_probs = F.log_softmax(logits, dim=-1, dtype=torch.float32)
                known = log_probs
                if torch.compiler.is_compiling():  # there labels are not checked, and could lie in the padding
                    known = log_probs[:, : weight.shape[0]]
                # Not in place: compiled by torch 2.11, the gradients would be zeros.
                total = total + F.nll_loss(known, targets[chunk], ignore_index=ignore_index, reduction="sum")
                if not (needs_rows or needs_weight):
                    continue
                logits_grad = _logits_gradient(log_probs, targets[chunk], ignore_index).to(compute_dtype)
                logits_grad = logits_grad[:, : weight.shape[0]]  # (n, P) -> (n, V)
                if needs_rows:
                    rows_grad[chunk] = logits_grad @ compute_weight
                if needs_weight and compute_dtype == torch.float32:
                    weight_grad.addmm_(logits_grad.T, inputs)
                elif needs_weight:
                    weight_grad += logits_grad.T @ inputs

        ctx.gradients = rows_grad, weight_grad
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx, total_grad):
        if ctx.gradients is None:
            raise RuntimeError(
                "linear_cross_entropy frees its gradients after one backward pass, even with retain_graph."
            )
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
            raise RuntimeError("linear_cross_entropy has no second derivative: call the model with skip_logits=False.")
        rows_grad, weight_grad = ctx.gradients
        ctx.gradients = None
        if rows_grad is not None:
            rows_grad *= total_grad
        if weight_grad is not None:
            weight_grad = weight_grad.mul_(total_grad).to(ctx.weight_dtype)
        return rows_grad, weight_grad, None, None, None, None


def _padded_logits(inputs, weight):
    """`inputs @ weight.T` (n, V), padded to (n, P) with logits of probability 0: P is V rounded up to a multiple of 8.

    Most rows of 50257 numbers are not aligned to a vector register, and writing them takes 1.5 times as long.
    """
    vocab_size = weight.shape[0]
    logits = inputs.new_full((inputs.shape[0], -(-vocab_size // 8) * 8), -math.inf)
    logits[:, :vocab_size].addmm_(inputs, weight.T, beta=0)  # 0: the old contents are not read
    return logits


def _logits_gradient(log_probs, targets, ignore_index):
    """softmax - onehot, in place of `log_probs` (n, P): a second tensor of that size would double the peak memory."""
    gradient = log_probs.exp_()
    labelled = targets != ignore_index
    columns = torch.where(labelled, targets, 0).unsqueeze(-1)  # (n, 1)
    gradient.scatter_add_(1, columns, gradient.new_full(columns.shape, -1.0))
    if torch.compiler.is_compiling():  # otherwise every row here has a label
        gradient *= labelled.unsqueeze(-1)
    return gradient
