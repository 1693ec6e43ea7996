"""Instruction tuning with transformers' Trainer: rows, quantized base, sample answers, saving."""

from pathlib import Path

import torch
from transformers import (
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProgressCallback,
    Trainer,
    TrainerCallback,
)

from ..data.collators import Row, pack
from ..data.instructions import Conversation, encode_conversations, encode_prompt
from ..files import write_json
from ..linear_cross_entropy import IGNORE_INDEX
from ..modeling_scratch_gpt2 import ScratchGPT2ForCausalLM
from ..prediction import respond
from .callbacks import ProgressBar
from .start import fit_to_tokenizer, model_to_continue
from .trainer import LanguageModelTrainer


def quantized_base(name: str, compute_dtype: torch.dtype, dropout: float = 0.0) -> ScratchGPT2ForCausalLM:
    """Load a checkpoint with its blocks' matrices in 4 bits (Dettmers et al. 2023, "QLoRA", arXiv:2305.14314).

    Raises ImportError without bitsandbytes.
    """
    try:
        import bitsandbytes
    except ImportError as error:
        raise ImportError("--qlora needs bitsandbytes: pip install bitsandbytes.") from error
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )
    dropouts = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
    model = ScratchGPT2ForCausalLM.from_pretrained(
        name, dtype=torch.float32, quantization_config=quantization, **dropouts
    )
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            # On a CPU with AVX512-BF16, an evaluation would repack the weight for a kernel without gradients.
            module.support_avx512bf16_for_cpu = False
    return model


def encode_part(
    name: str,
    conversations: list[Conversation],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    packed: bool = False,
    train_on_prompt: bool = False,
) -> tuple[list[Row], str]:
    """The rows of one part of the data, and a line that says what they are made of.

    `learned` in that line is the share of tokens that the loss is computed on; the first token of a conversation is
    never one of them, because no token precedes it.
    """
    rows, dropped = encode_conversations(tokenizer, conversations, max_length, train_on_prompt)
    tokens = sum(len(row["input_ids"]) for row in rows)
    cut = sum(len(row["input_ids"]) == max_length and row["input_ids"][-1] != tokenizer.eos_token_id for row in rows)
    learned = sum(label != IGNORE_INDEX for row in rows for label in row["labels"][1:])
    line = f"{name:<11}{len(rows):,} conversations, {tokens:,} tokens, {learned / tokens:.0%} of them learned"
    if packed:
        rows = pack(rows, max_length)
        line += f", in {len(rows):,} rows of {max_length} tokens ({tokens / len(rows) / max_length:.1%} full)"
    if cut or dropped:
        line += f"; cut to {max_length} tokens: {cut:,} answers lose their end, {dropped:,} more are left out"
    return rows, line


def save_test_rows(conversations: list[Conversation], file: Path) -> None:
    """Write the test rows for examples/respond.py."""
    rows: list[dict] = []
    for row in conversations:
        single = len(row.messages) == 2
        fields = {"instruction": row.instruction, "input": row.input, "output": row.output}
        rows.append(fields if single else {"messages": row.messages})
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, rows)


class AnswerCallback(TrainerCallback):
    """Answers some instructions before training and after every evaluation. The answers are printed, and logged as
    `samples` together with the losses. Decoding is greedy and draws no random numbers.

    Add it to an existing trainer, which it logs through. Every process takes part, because under FSDP no process has
    the whole model.
    """

    def __init__(
        self,
        trainer: Trainer,
        tokenizer: PreTrainedTokenizerBase,
        conversations: list[Conversation],
        max_new_tokens: int = 128,
    ):
        self.trainer = trainer
        self.tokenizer = tokenizer
        self.conversations = conversations
        self.prompts = [encode_prompt(tokenizer, conversation.prompt) for conversation in conversations]
        self.max_new_tokens = max_new_tokens
        if trainer.pop_callback(ProgressCallback) is not None:
            trainer.add_callback(ProgressBar)

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 0:
            self.show(model, state)

    def on_evaluate(self, args, state, control, model=None, **kwargs):
        self.show(model, state)

    def show(self, model: PreTrainedModel, state) -> None:
        room = model.config.n_positions - max(map(len, self.prompts))
        new_tokens = min(self.max_new_tokens, room)
        answers = respond(model, self.tokenizer, self.prompts, max_new_tokens=new_tokens, do_sample=False)
        text = "\n\n".join(
            f"{conversation.prompt[-1]['content'].strip()}\n--> {answer.text}\n"
            f"(reference: {conversation.output.strip()})"
            for conversation, answer in zip(self.conversations, answers, strict=True)
        )
        if state.is_world_process_zero:
            print(f"\n--- answers at step {state.global_step} ---\n{text}\n", flush=True)
        self.trainer.log({"samples": text})


def save_tuned(
    trainer: LanguageModelTrainer, tokenizer: PreTrainedTokenizerBase, merge_into: str | None = None
) -> None:
    """Save the model, or its adapter. With `merge_into`, the base of the adapter, save the merged model, and the
    adapter in the folder adapter."""
    folder = str(trainer.args.output_dir)
    if merge_into is None:
        trainer.save_model()
        return
    from peft import PeftModel

    adapter = str(Path(folder, "adapter"))
    trainer.save_model(adapter)
    if trainer.is_world_process_zero():
        base = model_to_continue(merge_into)
        fit_to_tokenizer(base, tokenizer)
        PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
