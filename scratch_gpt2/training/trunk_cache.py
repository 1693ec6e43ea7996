"""The hidden states that frozen blocks compute, cached on disk: no epoch computes them a second time.

Frozen blocks run without dropout (`freezing.py`) and give a text the same hidden states in every epoch. They are
computed once, in the model's precision, and the trained part reads them by memory map. For `head` that is one vector
per text, 4 * n_embd bytes in float32; for `last_block` one per token, because its attention reads all of them.

The states are kept in a folder named by the sha256 of everything they depend on: the frozen weights, the token ids,
the configuration and the versions of the libraries. A changed model or text gets another folder. Each file is written
under a temporary name first; after an interruption, the finished files are used and the rest is computed.
"""

import copy
import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers.modeling_outputs import SequenceClassifierOutputWithPast

from ..files import write_atomically
from ..heads_scratch_gpt2 import ScratchGPT2ForSequenceClassification
from ..modeling_scratch_gpt2 import ScratchGPT2Block, ScratchGPT2Model

CACHED_PARTS = ("head", "last_block")
CHUNK_BYTES = 2**26  # size of a file, and of the memory to compute it in
BATCH_TOKENS = 4096


class TrunkStates(torch.utils.data.Dataset):
    """Rows with the hidden states of a frozen trunk, for Trainer.

    Item i is row i, a dict with `input_ids` and its other columns, and `hidden_states`: (T, n_embd), the input of the
    last block, or (n_embd,), the input of the head. An item is read from disk when it is accessed.
    """

    def __init__(self, rows: list[dict], chunks: list[np.ndarray], places: list[tuple[int, int, int]]):
        self.rows = rows
        self.chunks = chunks
        self.places = places  # number of the chunk, first vector, number of vectors (0: one, as a vector)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict:
        chunk, start, length = self.places[i]
        states = self.chunks[chunk][start : start + length] if length else self.chunks[chunk][start]
        return {**self.rows[i], "hidden_states": torch.from_numpy(states)}


class TrainedTop(nn.Module):
    """The trained layers of a classifier, on top of cached hidden states.

    The last block computes the output of the last token only: the head reads no other, so loss and gradients are those
    of the whole model, at a fraction of the cost.
    """

    def __init__(self, model: ScratchGPT2ForSequenceClassification, part: str):
        super().__init__()
        self.config = model.config
        self.score = model.score
        if part == "last_block":
            self.block = model.model.layers[-1]
            self.norm = model.model.norm

    def forward(self, hidden_states, lengths=None, labels=None) -> SequenceClassifierOutputWithPast:
        """Args:
            hidden_states: (B, T, C) padded on the right, or (B, C) if only the head is trained.
            lengths: (B,) number of tokens per row; only with (B, T, C).
            labels: ignored; Trainer passes them to its loss function.

        Returns `logits` (B, num_labels)."""
        if lengths is not None:
            hidden_states = self.norm(last_token_output(self.block, hidden_states, lengths))  # (B, C)
        return SequenceClassifierOutputWithPast(logits=self.score(hidden_states))


def last_token_output(block: ScratchGPT2Block, hidden_states: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """(B, T, C) -> (B, C): a block's output at the last token of each row, which needs only that token's query."""
    attn = block.attn
    batch, length, _ = hidden_states.shape
    rows = torch.arange(batch, device=lengths.device)
    last = hidden_states[rows, lengths - 1]  # (B, C)
    heads = (batch, -1, attn.config.n_head, attn.head_dim)
    normed = block.attn_norm(hidden_states)
    query = attn.q_proj(normed[rows, lengths - 1]).view(heads).transpose(1, 2)  # (B, H, 1, D)
    key = attn.k_proj(normed).view(heads).transpose(1, 2)  # (B, H, T, D)
    value = attn.v_proj(normed).view(heads).transpose(1, 2)
    shown = torch.arange(length, device=lengths.device) < lengths[:, None]  # (B, T)
    dropout = attn.config.attn_pdrop if block.training else 0.0
    output = F.scaled_dot_product_attention(query, key, value, shown[:, None, None], dropout, scale=attn.scaling)
    last = last + attn.resid_dropout(attn.out_proj(output.reshape(batch, -1)))
    return last + block.mlp(block.mlp_norm(last))


def collate_states(items: list[dict]) -> dict[str, torch.Tensor]:
    """Pad rows of `TrunkStates` on the right, for `TrainedTop`."""
    states = [item["hidden_states"] for item in items]
    batch = {"hidden_states": pad_sequence(states, batch_first=True)}
    if states[0].ndim == 2:
        batch["lengths"] = torch.tensor([len(state) for state in states])
    return batch | {"labels": torch.tensor([item["labels"] for item in items])}


def frozen_trunk(model: ScratchGPT2ForSequenceClassification, part: str) -> ScratchGPT2Model:
    """The frozen layers of `model`, shared with it, as a network of their own."""
    trunk = copy.copy(model.model)
    trunk._modules = dict(model.model._modules)
    if part == "last_block":
        trunk.layers = model.model.layers[:-1]
        trunk.norm = nn.Identity()
    return trunk.eval()


def cache_trunk(
    model: ScratchGPT2ForSequenceClassification, part: str, splits: dict[str, list[dict]], folder: str | os.PathLike
) -> dict[str, TrunkStates]:
    """Compute the states of all `splits`, or find them in `folder`.

    Args:
        part: what will be trained, `head` or `last_block`.
        splits: rows with `input_ids`, a list of token ids without padding.

    Raises OSError if they do not fit on the disk.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    trunk = frozen_trunk(model, part)
    digest = trunk_digest(trunk, part)
    folders = {name: folder / rows_fingerprint(digest, rows) for name, rows in splits.items()}
    needed = sum(states_bytes(rows, part, model) for name, rows in splits.items() if not folders[name].is_dir())
    if needed > (free := shutil.disk_usage(folder).free):
        raise OSError(
            f"The hidden states take {needed:,} bytes but {folder} has {free:,} free; choose another folder with "
            "--trunk_cache, or --no_cache_trunk."
        )
    return {name: cache_rows(trunk, part, rows, folders[name]) for name, rows in splits.items()}


def states_bytes(rows: list[dict], part: str, model: ScratchGPT2ForSequenceClassification) -> int:
    """Size of the states of `rows` on the disk."""
    vectors = sum(len(row["input_ids"]) if part == "last_block" else 1 for row in rows)
    return vectors * model.config.n_embd * model.dtype.itemsize


def trunk_digest(trunk: ScratchGPT2Model, part: str):
    config = trunk.config.to_dict() | {"attention": trunk.config._attn_implementation}
    labels = ("id2label", "label2id", "num_labels", "problem_type", "_name_or_path", "architectures", "use_cache")
    config = {name: value for name, value in config.items() if name not in labels}
    versions = [part, torch.__version__, transformers.__version__, str(trunk.dtype)]
    digest = hashlib.sha256(json.dumps([versions, config], sort_keys=True, default=str).encode())
    for name, tensor in trunk.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest


def rows_fingerprint(digest, rows: list[dict]) -> str:
    digest = digest.copy()
    for row in rows:
        digest.update(np.array([len(row["input_ids"]), *row["input_ids"]], dtype=np.int64))
    return digest.hexdigest()


def cache_rows(trunk: ScratchGPT2Model, part: str, rows: list[dict], folder: Path) -> TrunkStates:
    """Rows of similar length are computed and stored together, the longest first."""
    folder.mkdir(exist_ok=True)
    by_length = sorted(range(len(rows)), key=lambda i: -len(rows[i]["input_ids"]))
    vectors = [len(row["input_ids"]) if part == "last_block" else 1 for row in rows]
    parts: list[list[int]] = [[]]
    size = 0
    for i in by_length:
        if parts[-1] and size + vectors[i] > CHUNK_BYTES // (trunk.dtype.itemsize * trunk.config.n_embd):
            parts.append([])
            size = 0
        parts[-1].append(i)
        size += vectors[i]
    chunks: list[np.ndarray] = []
    places = [(0, 0, 0)] * len(rows)
    for number, members in enumerate(tqdm(parts, desc="frozen blocks", unit="file", leave=False, disable=None)):
        starts = np.cumsum([0] + [vectors[i] for i in members])
        for i, start in zip(members, starts, strict=False):
            places[i] = number, int(start), vectors[i] if part == "last_block" else 0
        file = folder / f"states_{number:05}.npy"
        shape = (int(starts[-1]), trunk.config.n_embd)
        if not is_whole(file, shape):
            states = compute_states(trunk, part, [rows[i]["input_ids"] for i in members])
            write_atomically(file, lambda opened, states=states: np.save(opened, states))
        chunks.append(np.load(file, mmap_mode="c"))  # with "r", torch warns that the array is not writable
    return TrunkStates(rows, chunks, places)


def is_whole(file: Path, shape: tuple[int, int]) -> bool:
    try:
        return np.load(file, mmap_mode="r").shape == shape
    except (FileNotFoundError, ValueError, EOFError):
        return False


@torch.no_grad()
def compute_states(trunk: ScratchGPT2Model, part: str, texts: list[list[int]]) -> np.ndarray:
    """(number of vectors, C) for texts sorted by length, the longest first.

    Texts are padded on the right without a mask, because causal attention does not look to the right.
    """
    states, start = [], 0
    while start < len(texts):
        longest = len(texts[start])
        batch = [torch.tensor(ids) for ids in texts[start : start + max(1, BATCH_TOKENS // longest)]]
        padded = pad_sequence(batch, batch_first=True).to(trunk.device)
        hidden_states = trunk(padded, use_cache=False).last_hidden_state.cpu()  # (B, T, C)
        for ids, row in zip(batch, hidden_states, strict=True):
            states.append(row[: len(ids)] if part == "last_block" else row[len(ids) - 1 : len(ids)])
        start += len(batch)
    return torch.cat(states).numpy()
