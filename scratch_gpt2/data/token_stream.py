"""Token blocks straight from text, for pretraining without shards: tokenized while the model trains.

Shards remain the faster way: a stream is read again from its beginning when a run is resumed.
"""

import hashlib
import itertools
import logging
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from .encoding import tokenize, tokenizer_fingerprint
from .text_to_shards import TextSource
from .token_shards import check_model_fits

# Neighbouring blocks are often of one document; a step should see many.
SHUFFLED_BLOCKS = 1024

logger = logging.getLogger(__name__)


class TokenStream(torch.utils.data.IterableDataset):
    """Blocks of a text, endlessly, laid out as in `TokenShards`. The first blocks are for validation.

    Blocks are shuffled within a buffer of `SHUFFLED_BLOCKS`. The order depends on the text and the seed alone, so that
    a resumed run continues with the block that would have come next. Text that ends is read again.

    Args:
        source: the text. Standard input cannot be read again.
        validation_blocks: number of blocks that `validation` returns and training leaves out.

    Raises ValueError, when it is read, for text with too few tokens.
    """

    def __init__(
        self,
        source: TextSource,
        tokenizer: PreTrainedTokenizerBase,
        block_length: int,
        validation_blocks: int,
        seed: int,
    ):
        if block_length < 2:
            raise ValueError(f"block_length is {block_length}, but predicting a token takes at least 2.")
        self.source, self.tokenizer, self.block_length = source, tokenizer, block_length
        self.validation_blocks, self.seed = validation_blocks, seed

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        random = np.random.default_rng(self.seed)
        while True:
            count = 0
            for ids in shuffled(itertools.islice(self.read_once(), self.validation_blocks, None), random):
                yield {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(ids.copy())}
                count += 1
            if not count:
                raise ValueError(self.too_short())
            logger.warning("The text has ended after %s blocks and is read again from its beginning.", f"{count:,}")

    def validation(self) -> list[dict[str, torch.Tensor]]:
        """The first blocks of the text. Raises ValueError if no block is left to train on."""
        blocks = list(itertools.islice(self.read_once(), self.validation_blocks + 1))
        if len(blocks) <= self.validation_blocks:
            raise ValueError(self.too_short())
        return [{"input_ids": ids, "labels": ids.clone()} for ids in map(torch.from_numpy, blocks[:-1])]

    def too_short(self) -> str:
        return (
            f"The text has no more than the {self.validation_blocks} blocks of {self.block_length} tokens that are "
            "for validation; give more text or a smaller --eval_tokens."
        )

    def read_once(self) -> Iterator[np.ndarray]:
        """(block_length,) token ids; two blocks share one token, because the model shifts the labels."""
        eos, step = np.array([self.tokenizer.eos_token_id]), self.block_length - 1
        rest: np.ndarray = np.empty(0, dtype=np.int64)
        for ids, ends_document in tokenize(self.source.pieces(), self.tokenizer):
            rest = np.concatenate([rest, ids, eos if ends_document and len(ids) else eos[:0]])
            count = max(0, len(rest) - 1) // step
            for start in range(0, count * step, step):
                yield rest[start : start + self.block_length].copy()
            rest = rest[count * step :]

    def describe(self) -> dict[str, Any]:
        """All that decides which blocks there are. The first blocks stand for the text of a data set on the Hub, which
        may change."""
        first = hashlib.sha256(b"".join(block["input_ids"].numpy().tobytes() for block in self.validation()))
        described = {"tokenizer": tokenizer_fingerprint(self.tokenizer), "validation_blocks": self.validation_blocks}
        return self.source.describe() | described | {"first": first.hexdigest()}

    def check_fits(self, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> None:
        """Raise ValueError if a model is too small in vocabulary or positions."""
        check_model_fits("The tokenizer has", len(tokenizer), self.block_length, config)


def shuffled(blocks: Iterable[np.ndarray], random: np.random.Generator) -> Iterator[np.ndarray]:
    """Every block once: each takes the place of one that was drawn from the buffer."""
    buffer: list[np.ndarray] = []
    for block in blocks:
        if len(buffer) < SHUFFLED_BLOCKS:
            buffer.append(block)
        else:
            place = random.integers(SHUFFLED_BLOCKS)
            yield buffer[place]
            buffer[place] = block
    for place in random.permutation(len(buffer)):
        yield buffer[place]
