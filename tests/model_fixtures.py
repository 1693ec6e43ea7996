"""Pairs of small models with the same weights: transformers' GPT-2 and ours, converted here on purpose without
`openai_weights.py`, so that a mistake in its table cannot hide itself."""

from itertools import pairwise

import torch
import transformers

import scratch_gpt2
from scratch_gpt2 import ScratchGPT2Config

RENAMED = {
    "wte": "model.embed_tokens",
    "wpe": "model.embed_positions",
    "ln_f": "model.norm",
    "ln_1": "attn_norm",
    "ln_2": "mlp_norm",
    "attn.c_proj": "attn.out_proj",
    "mlp.c_fc": "mlp.up_proj",
    "mlp.c_proj": "mlp.down_proj",
    "multiple_choice_head.summary": "multiple_choice_head",
}
OWN_CLASS = {
    transformers.GPT2Model: scratch_gpt2.ScratchGPT2Model,
    transformers.GPT2LMHeadModel: scratch_gpt2.ScratchGPT2ForCausalLM,
    transformers.GPT2ForSequenceClassification: scratch_gpt2.ScratchGPT2ForSequenceClassification,
    transformers.GPT2ForTokenClassification: scratch_gpt2.ScratchGPT2ForTokenClassification,
    transformers.GPT2ForQuestionAnswering: scratch_gpt2.ScratchGPT2ForQuestionAnswering,
    transformers.GPT2DoubleHeadsModel: scratch_gpt2.ScratchGPT2DoubleHeadsModel,
}
TINY = {"vocab_size": 61, "n_positions": 32, "n_embd": 24, "n_layer": 3, "n_head": 4}
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
NO_DROPOUT = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop", "classifier_dropout"), 0.0) | {
    "summary_first_dropout": 0.0
}


def tiny_config(**options) -> ScratchGPT2Config:
    return ScratchGPT2Config(**TINY | TOKENS | NO_DROPOUT | options)


def tiny_model(**options) -> scratch_gpt2.ScratchGPT2ForCausalLM:
    """A language model with weights that make its greedy text varied, in eval mode."""
    return fill(scratch_gpt2.ScratchGPT2ForCausalLM(tiny_config(**options))).eval()


@torch.no_grad()
def fill(model, std: float = 0.2, seed: int = 0):
    """Different numbers everywhere: fresh biases and norms (zeros and ones) would hide a wrong one. Each tensor also
    rises a little from its first number to its last, so that no two orders of its rows or columns look alike (much of
    that, and most of a vector is its mean, which LayerNorm subtracts: float32 then has too few digits to compare)."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        parameter.normal_(0.0, std, generator=generator)
        parameter += torch.linspace(-std / 5, std / 5, parameter.numel()).view_as(parameter)
        if parameter.ndim == 1 and name.endswith("weight"):  # norms
            parameter += 1.0
    return model


@torch.no_grad()
def write_chain(model, ids: list[int]) -> None:
    """Make a model with an untied head write, after each of `ids`, the next: its blocks add nothing, and the head's
    row for a token is the normalized embedding of the token before it."""
    for block in model.model.layers:
        for layer in (block.attn.out_proj, block.mlp.down_proj):
            torch.nn.init.zeros_(layer.weight)
            torch.nn.init.zeros_(layer.bias)
    torch.nn.init.zeros_(model.model.embed_positions.weight)
    model.lm_head.weight.zero_()
    for token, following in pairwise(ids):
        model.lm_head.weight[following] = model.model.norm(model.model.embed_tokens.weight[token])


def own_names(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights or gradients of a transformers GPT-2 under our names, in our layout."""
    converted = {}
    for name, tensor in tensors.items():
        name = name.removeprefix("transformer.")
        for theirs, ours in RENAMED.items():
            name = name.replace(theirs, ours)
        name = f"model.{name.replace('h.', 'layers.', 1)}" if name.startswith("h.") else name
        if tensor.ndim == 2 and "layers." in name:
            tensor = tensor.T
        if "c_attn" in name:
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                converted[name.replace("c_attn", f"{letter}_proj")] = part
        else:
            converted[name] = tensor
    return converted


def twins(reference_class=transformers.GPT2LMHeadModel, attention="eager", std=0.2, sizes=TINY, **options):
    """transformers' model and ours with the same weights, in eval mode, without dropout."""
    options = sizes | TOKENS | NO_DROPOUT | {"attn_implementation": attention} | options
    reference = fill(reference_class(transformers.GPT2Config(**options)), std).eval()
    ours = OWN_CLASS[reference_class](ScratchGPT2Config(**options)).eval()
    weights = own_names(reference.state_dict())
    if reference_class is transformers.GPT2Model:
        weights = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
    ours.load_state_dict(weights)
    return reference, ours


def random_ids(*shape, seed=0, vocab_size=61):
    """Token ids without the special ones 0, 1 and 2."""
    return torch.randint(3, vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, as a part of the largest expected number."""
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def recorded_figures(monkeypatch) -> list:
    """The figures that matplotlib saves from now on."""
    from matplotlib.figure import Figure

    figures, save = [], Figure.savefig

    def record(figure, *args, **options):
        figures.append(figure)
        save(figure, *args, **options)

    monkeypatch.setattr(Figure, "savefig", record)
    return figures
