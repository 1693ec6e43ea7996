"""GPT-2 written from scratch. Importing the package registers its classes with transformers' `Auto*` classes."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from .configuration_scratch_gpt2 import ScratchGPT2Config
from .cpu_inference import inference_report, optimize_for_inference, restore_from_inference
from .growing_cache import prepare_cache_for_generation
from .heads_scratch_gpt2 import (
    ScratchGPT2DoubleHeadsModel,
    ScratchGPT2ForQuestionAnswering,
    ScratchGPT2ForSequenceClassification,
    ScratchGPT2ForTokenClassification,
)
from .modeling_scratch_gpt2 import ScratchGPT2ForCausalLM, ScratchGPT2Model, ScratchGPT2PreTrainedModel
from .openai_weights import export_gpt2
from .prediction import classify_text
from .tokenization import load_tokenizer, train_tokenizer

__version__ = "0.1.0"

__all__ = [
    "ScratchGPT2Config",
    "ScratchGPT2DoubleHeadsModel",
    "ScratchGPT2ForCausalLM",
    "ScratchGPT2ForQuestionAnswering",
    "ScratchGPT2ForSequenceClassification",
    "ScratchGPT2ForTokenClassification",
    "ScratchGPT2Model",
    "ScratchGPT2PreTrainedModel",
    "classify_text",
    "export_gpt2",
    "load_tokenizer",
    "train_tokenizer",
]

# Methods of all our models, and no part of the code that travels with a checkpoint.
ScratchGPT2PreTrainedModel.optimize_for_inference = optimize_for_inference  # type: ignore[attr-defined]
ScratchGPT2PreTrainedModel.inference_report = inference_report  # type: ignore[attr-defined]
ScratchGPT2PreTrainedModel.restore_from_inference = restore_from_inference  # type: ignore[attr-defined]

# Code that travels has the library's cache, which does the same.
ScratchGPT2ForCausalLM._prepare_cache_for_generation = prepare_cache_for_generation  # type: ignore[method-assign]

# `register` makes a class known to its Auto class in this process; `register_for_auto_class` makes `save_pretrained`
# save the code with the weights, so that a process without this package can load them with `trust_remote_code=True`.
AutoConfig.register(ScratchGPT2Config.model_type, ScratchGPT2Config, exist_ok=True)
ScratchGPT2Config.register_for_auto_class()
for auto_class, model_class in (
    (AutoModel, ScratchGPT2Model),
    (AutoModelForCausalLM, ScratchGPT2ForCausalLM),
    (AutoModelForSequenceClassification, ScratchGPT2ForSequenceClassification),
    (AutoModelForTokenClassification, ScratchGPT2ForTokenClassification),
    (AutoModelForQuestionAnswering, ScratchGPT2ForQuestionAnswering),
):
    auto_class.register(ScratchGPT2Config, model_class, exist_ok=True)
    model_class.register_for_auto_class(auto_class.__name__)
ScratchGPT2DoubleHeadsModel.register_for_auto_class("AutoModelForPreTraining")
