"""GPT-2 in plain tensor arithmetic: the definition that the network is tested against.

    python -m scratch_gpt2.reference space/checkpoints/base "Once upon a time"

prints the shape of every intermediate tensor, the loss of the text and a continuation.

There are no modules, no padding, no cache and no dropout: only token ids, and a dict of weights with the names of the
network. Letters in shapes: B batch size, T sequence length, C = n_embd, H = n_head, D = C / H, V = vocab_size.
"""

import math
import sys
from collections.abc import Callable

import torch

Weights = dict[str, torch.Tensor]
Watch = Callable[[str, torch.Tensor], object]  # called with the name and the value of every intermediate tensor


def ignore(name: str, tensor: torch.Tensor) -> None:
    """The default for `watch`."""


def gpt2_logits(weights: Weights, input_ids: torch.LongTensor, n_head: int, watch: Watch = ignore) -> torch.Tensor:
    """Logits (B, T, V) of `input_ids` (B, T), for a state dict of `ScratchGPT2ForCausalLM` (Radford et al. 2019)."""
    T = input_ids.shape[1]
    n_layer = 1 + max(int(name.split(".")[2]) for name in weights if name.startswith("model.layers."))
    x = weights["model.embed_tokens.weight"][input_ids]  # (B, T, C)
    x = x + weights["model.embed_positions.weight"][:T]  # (B, T, C) + (T, C)
    watch("embeddings", x)
    for i in range(n_layer):
        w = {name.removeprefix(f"model.layers.{i}."): tensor for name, tensor in weights.items()}
        x = x + attention(w, layer_norm(w, "attn_norm", x), n_head, watch)  # (B, T, C)
        inner = gelu(linear(w, "mlp.up_proj", layer_norm(w, "mlp_norm", x)))  # (B, T, 4C)
        watch("feed-forward", inner)
        x = x + linear(w, "mlp.down_proj", inner)  # (B, T, C)
        watch(f"block {i}", x)
    x = layer_norm(weights, "model.norm", x)  # (B, T, C)
    logits = x @ weights["model.embed_tokens.weight"].T  # (B, T, C) @ (C, V) -> (B, T, V)
    watch("logits", logits)
    return logits


def attention(w: Weights, x: torch.Tensor, n_head: int, watch: Watch = ignore) -> torch.Tensor:
    """Causal multi-head self-attention (Vaswani et al. 2017, section 3.2): (B, T, C) -> (B, T, C).

    Every head has D of the C channels. `modeling_scratch_gpt2.py` computes all heads in parallel instead of in a loop.
    """
    q, k, v = (linear(w, f"attn.{name}_proj", x).chunk(n_head, dim=-1) for name in "qkv")  # each H * (B, T, D)
    heads = [one_head(q[h], k[h], v[h], watch) for h in range(n_head)]  # H * (B, T, D)
    joined = torch.cat(heads, dim=-1)  # (B, T, C)
    watch("heads, joined", joined)
    return linear(w, "attn.out_proj", joined)  # (B, T, C)


def one_head(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, watch: Watch = ignore) -> torch.Tensor:
    """Each position averages the values up to its own position, with weights: 3 * (B, T, D) -> (B, T, D)."""
    T, D = q.shape[-2:]
    watch("queries of a head", q)
    scores = q @ k.transpose(1, 2) / math.sqrt(D)  # (B, T, D) @ (B, D, T) -> (B, T, T)
    future = torch.ones(T, T, dtype=torch.bool).triu(diagonal=1)  # (T, T), true above the diagonal
    probabilities = scores.masked_fill(future, -math.inf).softmax(dim=-1)  # (B, T, T), each row sums to 1
    watch("attention of a head", probabilities)
    return probabilities @ v  # (B, T, T) @ (B, T, D) -> (B, T, D)


def linear(w: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    """(..., inputs) -> (..., outputs), with a weight (outputs, inputs) and a bias (outputs,)."""
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def layer_norm(w: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    """Normalize each vector to mean 0 and variance 1, then scale and shift (Ba et al. 2016): (..., C) -> (..., C)."""
    centered = x - x.mean(dim=-1, keepdim=True)  # (..., C)
    variance = centered.square().mean(dim=-1, keepdim=True)  # (..., 1)
    return centered / torch.sqrt(variance + 1e-5) * w[f"{name}.weight"] + w[f"{name}.bias"]  # (..., C)


def gelu(x: torch.Tensor) -> torch.Tensor:
    """x times the standard normal distribution function of x, in the tanh approximation of Hendrycks & Gimpel 2016."""
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def next_token_loss(logits: torch.Tensor, input_ids: torch.LongTensor) -> torch.Tensor:
    """Cross-entropy in nats, a scalar: the mean of -log p(token) over (B, T - 1) tokens. Position t predicts token
    t + 1, so the last logits and the first token are not used."""
    log_probabilities = logits[:, :-1].log_softmax(dim=-1)  # (B, T - 1, V)
    return -log_probabilities.gather(2, input_ids[:, 1:, None]).mean()  # (B, T - 1, 1) -> ()


def sample(
    weights: Weights, input_ids: torch.LongTensor, n_head: int, steps: int, temperature: float = 1.0, top_k: int = 50
) -> torch.LongTensor:
    """Extend `input_ids` (B, T) by `steps` tokens, each sampled from the `top_k` most probable: (B, T + steps).

    A temperature below 1 sharpens the distribution; `top_k=1` always selects the most probable token. Every step
    computes all positions again; a key-value cache would avoid that (`past_key_values` in `modeling_scratch_gpt2.py`).
    """
    for _ in range(steps):
        logits = gpt2_logits(weights, input_ids, n_head)[:, -1] / temperature  # (B, V)
        top_logits, ids = logits.topk(min(top_k, logits.shape[-1]))  # (B, top_k) each
        sampled = torch.multinomial(top_logits.softmax(dim=-1), 1)  # (B, 1), an index into `ids`
        input_ids = torch.cat([input_ids, ids.gather(1, sampled)], dim=1)
    return input_ids


@torch.no_grad()
def main(checkpoint: str, text: str) -> None:
    from .modeling_scratch_gpt2 import ScratchGPT2ForCausalLM
    from .tokenization import load_tokenizer

    model = ScratchGPT2ForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    tokenizer, weights, n_head = load_tokenizer(checkpoint), model.state_dict(), model.config.n_head
    input_ids = tokenizer(text, return_tensors="pt").input_ids
    if input_ids.shape[1] < 2:
        sys.exit("The text must have at least two tokens: one to read and one to predict.")
    print(f"{'tokens':<20}{tuple(input_ids.shape)} {[tokenizer.decode([i]) for i in input_ids[0].tolist()]}")
    shapes: dict[str, tuple[int, ...]] = {}
    logits = gpt2_logits(weights, input_ids, n_head, lambda name, x: shapes.setdefault(name, tuple(x.shape)))
    for name, shape in shapes.items():
        print(f"{name:<20}{shape}")
    print(f"{'loss':<20}{next_token_loss(logits, input_ids):.3f} nats per token")
    torch.manual_seed(0)
    steps = min(40, model.config.n_positions - input_ids.shape[1])
    print(tokenizer.decode(sample(weights, input_ids, n_head, steps, temperature=0.8)[0]))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit('usage: python -m scratch_gpt2.reference CHECKPOINT "A text"')
    main(*sys.argv[1:])
