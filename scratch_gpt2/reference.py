"""GPT-2's forward pass in plain tensor arithmetic: the definition that the network is tested against.

No modules, no masks to pass, no cache, no dropout: a dict of weights, under the network's own names, and token ids.
Letters in shapes: B rows, T positions, C = n_embd, H = n_head, D = C / H, V = vocab_size.
"""

import math

import torch


def gpt2_logits(weights: dict[str, torch.Tensor], input_ids: torch.LongTensor, n_head: int) -> torch.Tensor:
    """Logits (B, T, V) of `input_ids` (B, T), for a state dict of `ScratchGPT2ForCausalLM` (Radford et al. 2019)."""
    T = input_ids.shape[1]
    n_layer = 1 + max(int(name.split(".")[2]) for name in weights if name.startswith("model.layers."))
    x = weights["model.embed_tokens.weight"][input_ids]  # (B, T, C)
    x = x + weights["model.embed_positions.weight"][:T]  # (B, T, C) + (T, C)
    for i in range(n_layer):
        w = {name.removeprefix(f"model.layers.{i}."): tensor for name, tensor in weights.items()}
        x = x + attention(w, layer_norm(w, "attn_norm", x), n_head)  # (B, T, C)
        x = x + linear(w, "mlp.down_proj", gelu(linear(w, "mlp.up_proj", layer_norm(w, "mlp_norm", x))))  # (B, T, C)
    x = layer_norm(weights, "model.norm", x)  # (B, T, C)
    return x @ weights["model.embed_tokens.weight"].T  # (B, T, C) @ (C, V) -> (B, T, V)


def attention(w: dict[str, torch.Tensor], x: torch.Tensor, n_head: int) -> torch.Tensor:
    """Causal multi-head self-attention (Vaswani et al. 2017, section 3.2): (B, T, C) -> (B, T, C)."""
    B, T, C = x.shape
    D = C // n_head
    q, k, v = (
        linear(w, f"attn.{name}_proj", x).view(B, T, n_head, D).transpose(1, 2) for name in "qkv"
    )  # (B, H, T, D)
    scores = q @ k.transpose(2, 3) / math.sqrt(D)  # (B, H, T, D) @ (B, H, D, T) -> (B, H, T, T)
    future = torch.ones(T, T, dtype=torch.bool).triu(diagonal=1)  # (T, T), true above the diagonal
    scores = scores.masked_fill(future, -math.inf)  # (B, H, T, T)
    probabilities = scores.softmax(dim=-1)  # (B, H, T, T), each row sums to 1
    y = (probabilities @ v).transpose(1, 2).reshape(B, T, C)  # (B, H, T, T) @ (B, H, T, D) -> (B, T, C)
    return linear(w, "attn.out_proj", y)  # (B, T, C)


def linear(w: dict[str, torch.Tensor], name: str, x: torch.Tensor) -> torch.Tensor:
    """(..., inputs) -> (..., outputs), with a weight (outputs, inputs) and a bias (outputs,)."""
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def layer_norm(w: dict[str, torch.Tensor], name: str, x: torch.Tensor) -> torch.Tensor:
    """Every vector to mean 0 and variance 1, then scaled and shifted (Ba et al. 2016): (..., C) -> (..., C)."""
    centred = x - x.mean(dim=-1, keepdim=True)  # (..., C)
    variance = centred.square().mean(dim=-1, keepdim=True)  # (..., 1)
    return centred / torch.sqrt(variance + 1e-5) * w[f"{name}.weight"] + w[f"{name}.bias"]  # (..., C)


def gelu(x: torch.Tensor) -> torch.Tensor:
    """x times the normal distribution function of x, by the tanh formula of Hendrycks & Gimpel 2016, section 2."""
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
