"""The heads of GPT-2 other than the language model: sequence and token classification, question answering, and
multiple choice."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_outputs import (
    QuestionAnsweringModelOutput,
    SequenceClassifierOutputWithPast,
    TokenClassifierOutput,
)
from transformers.models.gpt2.modeling_gpt2 import GPT2DoubleHeadsModelOutput
from transformers.utils import can_return_tuple

from .configuration_scratch_gpt2 import ScratchGPT2Config
from .modeling_scratch_gpt2 import ScratchGPT2ForCausalLM, ScratchGPT2Model, ScratchGPT2PreTrainedModel, cache_of


class ScratchGPT2ForSequenceClassification(ScratchGPT2PreTrainedModel):
    """Classification of a text from its last token, the only one that attends to all of it (GPT, section 3.2)."""

    def __init__(self, config: ScratchGPT2Config):
        super().__init__(config)
        self.model = ScratchGPT2Model(config)
        self.score = nn.Linear(config.n_embd, config.num_labels, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs,
    ) -> SequenceClassifierOutputWithPast:
        """Arguments as for `ScratchGPT2Model.forward`, and

        Args:
            labels: (B,) classes, (B, num_labels) floats of 0 and 1 where several may hold, or targets to regress,
                as `config.problem_type` says; if `None`: one label is regression, integers single, floats multi-label.

        Returns `loss` and `logits` (B, num_labels)."""
        past_key_values = past_key_values if past_key_values is not None else kwargs.pop("cache", None)
        past_length = past_key_values.get_seq_length() if past_key_values is not None else 0
        outputs = self.model(input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, **kwargs)
        hidden_states = outputs.last_hidden_state  # (B, T, C)
        last_token = self.last_token_index(input_ids, attention_mask, hidden_states, past_length)  # (B,)
        rows = torch.arange(hidden_states.shape[0], device=hidden_states.device)
        logits = self.score(hidden_states[rows, last_token])  # (B, C) -> (B, num_labels)
        items = kwargs.get("num_items_in_batch")
        loss = None if labels is None else self.classification_loss(logits, labels, items)
        return SequenceClassifierOutputWithPast(
            loss, logits, cache_of(outputs), outputs.hidden_states, outputs.attentions
        )

    def last_token_index(self, input_ids, attention_mask, hidden_states, past_length=0):
        """(B,): the last token that the mask shows, on whichever side the padding is.

        transformers' GPT-2 looks for the pad id instead, which finds the wrong token when a text really ends in the
        end-of-text token that GPT-2 is padded with. We look for it only without a mask, and only when it ends no text.
        """
        batch, length = hidden_states.shape[:2]
        columns = torch.arange(length, device=hidden_states.device)
        pad, eos = self.config.pad_token_id, self.config.eos_token_id
        if attention_mask is not None and attention_mask.ndim == 2:
            shown = attention_mask.to(hidden_states.device)[:, columns + past_length] != 0
        elif input_ids is not None and pad is not None and pad not in (eos if isinstance(eos, list) else [eos]):
            shown = input_ids != pad
        else:
            if input_ids is not None:
                self.warn_if_padding_and_no_attention_mask(input_ids, attention_mask)
            return columns[-1].expand(batch)
        return (columns * shown).argmax(-1)

    def classification_loss(self, logits, labels, num_items_in_batch):
        problem_type = self.config.problem_type
        if problem_type is None:
            kind = "multi_label" if labels.is_floating_point() else "single_label"
            problem_type = "regression" if self.config.num_labels == 1 else f"{kind}_classification"
        loss_of = {
            "regression": F.mse_loss,
            "single_label_classification": F.cross_entropy,
            "multi_label_classification": F.binary_cross_entropy_with_logits,
        }[problem_type]
        logits, labels = logits.float(), labels.to(logits.device).view(-1)
        if problem_type != "single_label_classification":
            logits, labels = logits.view(-1), labels.float()
        if num_items_in_batch is None:
            return loss_of(logits, labels)
        # Trainer counts the labels of a whole accumulation step, so that the loss does not depend on the split.
        return loss_of(logits, labels, reduction="sum") / num_items_in_batch


class ScratchGPT2ForTokenClassification(ScratchGPT2PreTrainedModel):
    """Classification of every token, as in named-entity recognition."""

    def __init__(self, config: ScratchGPT2Config):
        super().__init__(config)
        self.model = ScratchGPT2Model(config)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.classifier = nn.Linear(config.n_embd, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self, input_ids=None, attention_mask=None, position_ids=None, inputs_embeds=None, labels=None, **kwargs
    ) -> TokenClassifierOutput:
        """Arguments as for `ScratchGPT2Model.forward`, and `labels` (B, T), -100 where there is none.
        Returns `loss` and `logits` (B, T, num_labels)."""
        outputs = self.model(input_ids, attention_mask, position_ids, inputs_embeds=inputs_embeds, **kwargs)
        logits = self.classifier(self.dropout(outputs.last_hidden_state))
        loss = None if labels is None else self.loss_function(logits, labels, self.config, **kwargs)
        return TokenClassifierOutput(loss, logits, outputs.hidden_states, outputs.attentions)


class ScratchGPT2ForQuestionAnswering(ScratchGPT2PreTrainedModel):
    """Extractive question answering: start and end of the answer in the text."""

    def __init__(self, config: ScratchGPT2Config):
        super().__init__(config)
        self.model = ScratchGPT2Model(config)
        self.qa_outputs = nn.Linear(config.n_embd, 2)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        start_positions: torch.LongTensor | None = None,
        end_positions: torch.LongTensor | None = None,
        **kwargs,
    ) -> QuestionAnsweringModelOutput:
        """Arguments as for `ScratchGPT2Model.forward`, and `start_positions`, `end_positions` (B,).
        Returns `loss`, `start_logits` (B, T) and `end_logits` (B, T)."""
        outputs = self.model(input_ids, attention_mask, position_ids, inputs_embeds=inputs_embeds, **kwargs)
        start_logits, end_logits = self.qa_outputs(outputs.last_hidden_state).unbind(-1)  # (B, T, 2) -> 2 * (B, T)
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = self.loss_function(start_logits, end_logits, start_positions, end_positions, **kwargs)
        return QuestionAnsweringModelOutput(loss, start_logits, end_logits, outputs.hidden_states, outputs.attentions)


class ScratchGPT2DoubleHeadsModel(ScratchGPT2ForCausalLM):
    """A language model that also chooses (GPT, sections 3.2 and 3.3): each of N candidate texts per row is scored at
    one of its tokens. Equal to transformers' GPT2DoubleHeadsModel."""

    def __init__(self, config: ScratchGPT2Config):
        super().__init__(config)
        self.loss_type = "ForCausalLM"  # which the library would read off the name of the class
        self.summary_dropout = nn.Dropout(config.summary_first_dropout)
        self.multiple_choice_head = nn.Linear(config.n_embd, 1)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        mc_token_ids: torch.LongTensor | None = None,
        labels: torch.LongTensor | None = None,
        mc_labels: torch.LongTensor | None = None,
        **kwargs,
    ) -> GPT2DoubleHeadsModelOutput:
        """Inputs are (B, N, T), or (B, T) to generate; otherwise arguments as for `ScratchGPT2Model.forward`, and

        Args:
            mc_token_ids: (B, N) position at which each choice is scored; the last one by default.
            labels: (B, N, T) for the language model, shifted inside.
            mc_labels: (B,) number of the right choice.

        Returns `loss` of the language model and `logits` (B, N, T, V); `mc_loss` of the choice and `mc_logits` (B, N).
        """
        shape = input_ids.shape if input_ids is not None else inputs_embeds.shape[:-1]  # (B, N, T)
        ids, mask, positions, types = (  # (B, N, T) -> (B * N, T)
            tensor.flatten(0, -2) if tensor is not None else None
            for tensor in (input_ids, attention_mask, position_ids, token_type_ids)
        )
        embeds = inputs_embeds.flatten(0, -3) if inputs_embeds is not None else None
        outputs = self.model(ids, mask, positions, past_key_values, embeds, types, **kwargs)
        hidden_states = outputs.last_hidden_state.view(*shape, -1)  # (B, N, T, C)

        logits = self.lm_head(hidden_states)
        if mc_token_ids is None:
            mc_token_ids = torch.full(shape[:-1], shape[-1] - 1, device=hidden_states.device)
        summary = torch.take_along_dim(hidden_states, mc_token_ids[..., None, None], dim=-2).squeeze(-2)  # (B, N, C)
        mc_logits = self.multiple_choice_head(self.summary_dropout(summary)).squeeze(-1)  # (B, N)
        loss = mc_loss = None
        if labels is not None:
            loss = self.next_token_loss(logits, labels, **kwargs)
        if mc_labels is not None:
            mc_loss = F.cross_entropy(mc_logits.float(), mc_labels.view(-1))
        return GPT2DoubleHeadsModelOutput(
            loss, mc_loss, logits, mc_logits, cache_of(outputs), outputs.hidden_states, outputs.attentions
        )


HEADS = {
    head.__name__: head
    for head in (
        ScratchGPT2ForSequenceClassification,
        ScratchGPT2ForTokenClassification,
        ScratchGPT2ForQuestionAnswering,
        ScratchGPT2DoubleHeadsModel,
    )
}
