"""A key-value cache that writes each key and value once.

transformers' DynamicCache copies everything with `torch.cat` for every new token: with GPT-2 124M and 1,000 positions
in float32, 74 MB are read and 74 MB written per token, in addition to the 498 MB of the weights. Here the tensors have
spare room, which doubles whenever it is used up.
"""

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.generation import GenerationMixin
from transformers.generation.configuration_utils import GenerationMode

# Measured: copying a smaller tensor takes less time, and leaves it in the processor's cache for the attention.
MIN_BYTES = 2**20
STEP_BY_STEP = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)


class Buffer:
    """A tensor (B, H, positions, D) whose first `written` positions are in use."""

    def __init__(self, first: torch.Tensor, new: torch.Tensor):
        self.written = first.shape[-2]
        positions = 2 * (self.written + new.shape[-2])
        self.tensor = new.new_empty((*new.shape[:2], positions, new.shape[-1]))
        self.tensor[:, :, : self.written] = first

    def continues(self, states: torch.Tensor, new: torch.Tensor) -> bool:
        """Whether `states` is all that is written here, and `new` has room after it.

        It is not after `crop` or a reordering. A position is never written twice, so that the tensors which a caller
        has kept stay as they are, as with DynamicCache.
        """
        tensor, length = self.tensor, states.shape[-2]
        return (
            length == self.written
            and length + new.shape[-2] <= tensor.shape[-2]
            and states.data_ptr() == tensor.data_ptr()
            and states.stride() == tensor.stride()
            and states.shape[0] == tensor.shape[0]
            and torch.is_inference_mode_enabled() >= tensor.is_inference()
        )

    def append(self, new: torch.Tensor) -> torch.Tensor:
        """Write `new` (B, H, T, D), and return a view of everything written."""
        start, self.written = self.written, self.written + new.shape[-2]
        self.tensor[:, :, start : self.written] = new
        return self.tensor[:, :, : self.written]


class GrowingLayer(DynamicLayer):
    """A DynamicLayer whose keys and values are views of larger tensors.

    Gradients, `torch.compile` and mixed dtypes are left to DynamicLayer.
    """

    keys: torch.Tensor
    values: torch.Tensor
    buffers: tuple[Buffer, Buffer] | None = None

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        # A tensor of unknown size, as in an export, has no known number of bytes.
        if not self.is_initialized or not self.can_write(key_states, value_states) or self.keys.nbytes < MIN_BYTES:
            self.buffers = None
            return super().update(key_states, value_states, *args, **kwargs)
        if self.buffers is None or not (
            self.buffers[0].continues(self.keys, key_states) and self.buffers[1].continues(self.values, value_states)
        ):
            self.buffers = Buffer(self.keys, key_states), Buffer(self.values, value_states)
        self.keys, self.values = self.buffers[0].append(key_states), self.buffers[1].append(value_states)
        return self.keys, self.values

    def can_write(self, key_states: torch.Tensor, value_states: torch.Tensor) -> bool:
        tensors = (self.keys, self.values, key_states, value_states)
        return not (
            torch.compiler.is_compiling()
            or (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))
            or any(tensor.dtype != key_states.dtype or tensor.device != key_states.device for tensor in tensors)
        )

    def reset(self) -> None:
        self.buffers = None
        super().reset()


def prepare_cache_for_generation(
    self, generation_config, model_kwargs: dict, generation_mode: GenerationMode, *args, **kwargs
) -> None:
    """The library's own preparation; on a CPU, greedy search and sampling then get layers that grow.

    A cache of the caller, an offloaded, quantized or static one, and the other strategies, which crop or reorder the
    cache at every step, stay as they are.
    """
    given = generation_cache(model_kwargs)
    GenerationMixin._prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, *args, **kwargs
    )
    cache = generation_cache(model_kwargs)
    in_steps = generation_mode in STEP_BY_STEP and not generation_config.is_assistant and self.device.type == "cpu"
    if in_steps and given is None and isinstance(cache, DynamicCache) and not cache.offloading:
        cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]


def generation_cache(model_kwargs: dict) -> Cache | None:
    """What `generate` keeps the cache in, called `cache` since transformers 5.24, `past_key_values` before."""
    return model_kwargs.get("cache", model_kwargs.get("past_key_values"))
