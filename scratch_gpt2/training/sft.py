"""Instruction tuning with transformers' Trainer: the recipe, the model to train, its evaluation and sample answers."""

import numpy as np
import torch
from transformers import (
    BitsAndBytesConfig,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from ..data.instructions import Conversation, encode_prompt
from ..linear_cross_entropy import IGNORE_INDEX
from ..modeling_scratch_gpt2 import ScratchGPT2ForCausalLM
from ..prediction import respond
from .trainer import PushingTrainer


def check_arguments(args: TrainingArguments) -> None:
    """Raise ValueError for an option that would train something else than it says."""
    if args.label_smoothing_factor:
        raise ValueError(
            f"label_smoothing_factor is {args.label_smoothing_factor}, but Trainer would smooth every label against "
            "the wrong position; leave it at 0."
        )


def quantized_base(name: str, compute_dtype: torch.dtype) -> ScratchGPT2ForCausalLM:
    """A checkpoint whose blocks' matrices are kept in 4 bits (Dettmers et al. 2023, "QLoRA", arXiv:2305.14314).

    Raises ImportError without bitsandbytes.
    """
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise ImportError("--qlora needs bitsandbytes: pip install bitsandbytes.") from error
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )
    return ScratchGPT2ForCausalLM.from_pretrained(name, dtype=torch.float32, quantization_config=quantization)


class InstructionTrainer(PushingTrainer):
    """Trainer whose `eval_loss` is the mean over all labelled tokens, in whatever batches and processes they come.

    Trainer itself averages the means of the batches, so that a token counts the more, the fewer there are beside it.
    """

    def __init__(self, model: PreTrainedModel, args: TrainingArguments, **kwargs):
        super().__init__(model, args, compute_metrics=mean_over_tokens, **kwargs)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """The summed loss of the batch as its first row's "prediction", (B,), and its number of tokens as the label.

        The last batches of several processes are filled up with rows that have been there before. Trainer cuts off
        what belongs to them; here their labels are taken away.
        """
        inputs = self._prepare_inputs(inputs)
        labels = inputs["labels"]
        state = self.accelerator.gradient_state
        if state.end_of_dataloader and state.remainder > 0:
            own = state.remainder - self.args.process_index * len(labels)
            labels[max(own, 0) :] = IGNORE_INDEX
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = model(**inputs, num_items_in_batch=1, skip_logits=True).loss
        sums, tokens = torch.zeros(2, len(labels), device=labels.device)
        sums[0], tokens[0] = loss, (labels[:, 1:] != IGNORE_INDEX).sum()
        return None, sums, tokens


def mean_over_tokens(prediction: EvalPrediction) -> dict[str, float]:
    sums, tokens = prediction.predictions, prediction.label_ids
    return {"loss": float(sums.sum(dtype=np.float64) / tokens.sum(dtype=np.float64))}


class AnswerCallback(TrainerCallback):
    """Answers some instructions before training and after every evaluation: printed, and logged as `samples` to
    wherever the losses go. Decoding is greedy and draws no random numbers.

    Add it to a trainer that exists, since only a trainer can log. Every process takes part, since under FSDP none has
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
        self.max_new_tokens = max_new_tokens

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 0:
            self.show(model, state)

    def on_evaluate(self, args, state, control, model=None, **kwargs):
        self.show(model, state)

    def show(self, model: PreTrainedModel, state) -> None:
        answers = greedy_answers(model, self.tokenizer, [c.prompt for c in self.conversations], self.max_new_tokens)
        pairs = zip(self.conversations, answers, strict=True)
        text = "\n\n".join(
            f"{conversation.prompt[-1]['content'].strip()}\n--> {answer}\n(reference: {conversation.output.strip()})"
            for conversation, answer in pairs
        )
        if state.is_world_process_zero:
            print(f"\n--- answers at step {state.global_step} ---\n{text}\n", flush=True)
        self.trainer.log({"samples": text})


def greedy_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[dict[str, str]]],
    max_new_tokens: int,
) -> list[str]:
    """The most likely answers, computed together, from a model that is being trained."""
    ids = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    room = model.config.n_positions - max(map(len, ids))
    was_training = model.training
    model.eval()
    answers = respond(model, tokenizer, ids, max_new_tokens=min(max_new_tokens, room), do_sample=False)
    model.train(was_training)
    return [answer.text for answer in answers]
