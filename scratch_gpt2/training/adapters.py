"""LoRA with sensible defaults for GPT-2. Importing this module also tells PEFT which layers to adapt by default."""

from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from transformers import PreTrainedModel

# All matrices of the blocks: better than attention alone at the same number of parameters (Dettmers et al. 2023,
# "QLoRA", section 4; Biderman et al. 2024, "LoRA Learns Less and Forgets Less").
LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj", "up_proj", "down_proj"]
TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING["scratch_gpt2"] = LORA_TARGETS


def add_lora(
    model: PreTrainedModel,
    task_type: str,
    rank: int,
    alpha: int,
    dropout: float = 0.0,
    target_modules: list[str] | str | None = None,
) -> PeftModel:
    """Freeze `model` and add trainable low-rank adapters (Hu et al. 2021, arXiv:2106.09685), those of `lora_config`.

    Raises ValueError for target modules that the model does not have.
    """
    model.enable_input_require_grads()  # without it, gradient checkpointing finds nothing to train in the first block
    return get_peft_model(model, lora_config(task_type, rank, alpha, dropout, target_modules))


def lora_config(
    task_type: str, rank: int, alpha: int, dropout: float = 0.0, target_modules: list[str] | str | None = None
) -> LoraConfig:
    """
    Args:
        task_type: as PEFT names it, such as `CAUSAL_LM` or `SEQ_CLS`; a classifier's head is trained and saved too.
        alpha: the adapters' output is scaled by `alpha / rank`.
        target_modules: names of layers, or `all-linear`; by default all matrices of the blocks.
    """
    return LoraConfig(
        task_type=task_type,
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=target_modules or LORA_TARGETS,
    )
