"""vLLM's plugin for our classes: install this package next to vLLM, which then loads them without
`trust_remote_code`. https://docs.vllm.ai/en/latest/design/plugin_system.html

vLLM runs them by its Transformers modeling backend. Only vLLM imports this module, by the entry point
`vllm.general_plugins`.
"""

import re

from torch import nn
from vllm import ModelRegistry
from vllm.model_executor.models.transformers import TransformersForSequenceClassification


class VLLMClassifier(TransformersForSequenceClassification):
    """The backend's classifier reads the first token and calls its head `classifier`; ours, as that of every other
    causal model, reads the last one, and is called `score`."""

    default_seq_pooling_type = "LAST"

    def __init__(self, *, vllm_config, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        assert isinstance(self.classifier, nn.Linear)
        # The backend's own adds a dimension of positions, which RoBERTa's head removes.
        self.classifier.__class__ = nn.Linear

    def load_weights(self, weights):
        return super().load_weights((re.sub(r"^score\.", "classifier.", name), tensor) for name, tensor in weights)


def register() -> None:
    import scratch_gpt2  # noqa: F401 - registers our classes with `Auto*`

    ModelRegistry.register_model(
        "ScratchGPT2ForCausalLM", "vllm.model_executor.models.transformers:TransformersForCausalLM"
    )
    ModelRegistry.register_model("ScratchGPT2ForSequenceClassification", f"{__name__}:{VLLMClassifier.__name__}")
