"""Traps of a forward pass that no loss curve shows: padding, packing, the cache, dropout, checkpointing, dtypes."""

import contextlib

import pytest
import torch

import scratch_gpt2
from scratch_gpt2 import ScratchGPT2Config, ScratchGPT2ForCausalLM

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")

EOS = 60
BACKENDS = ["eager", "sdpa", "flex_attention"]
# On a CPU PyTorch's flex attention has no backward pass.
TRAINING_BACKENDS = ["eager", "sdpa"]
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def make_model(backend="sdpa", head=ScratchGPT2ForCausalLM, **options):
    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2, "initializer_range": 0.3}
    tokens = {"bos_token_id": EOS, "eos_token_id": EOS, "pad_token_id": EOS}
    config = ScratchGPT2Config(**sizes | tokens | NO_DROPOUT | options)
    return head._from_config(config, attn_implementation=backend).eval()


@pytest.fixture(autouse=True)
def flex_attention_without_compiling():
    """Compiling it would take most of the time of these tests."""
    with torch.compiler.set_stance("force_eager"):
        yield


def inference_of(backend):
    return torch.no_grad() if backend == "flex_attention" else contextlib.nullcontext()


def random_ids(*shape):
    return torch.randint(0, EOS, shape, generator=torch.Generator().manual_seed(1))


def pack(lengths):
    """One row of documents of these lengths: ids, positions, labels without the first token of each, documents."""
    documents = [ids.unsqueeze(0) for ids in random_ids(sum(lengths)).split(lengths)]
    input_ids = torch.cat(documents, dim=1)
    position_ids = torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0)
    return input_ids, position_ids, input_ids.masked_fill(position_ids == 0, -100), documents


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters()}


# Packing


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_documents_equal_separate_rows(backend, training):
    """With default arguments, so with a cache in eval mode."""
    model = make_model(backend).train(training)
    input_ids, position_ids, _, documents = pack([3, 5, 4])
    with inference_of(backend):
        packed = model(input_ids, position_ids=position_ids).logits
        separate = torch.cat([model(document).logits for document in documents], dim=1)
    torch.testing.assert_close(packed, separate, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", TRAINING_BACKENDS)
def test_packed_documents_have_the_loss_and_gradients_of_separate_rows(backend):
    model = make_model(backend).train()
    input_ids, position_ids, labels, documents = pack([3, 5, 4])
    loss = model(input_ids, position_ids=position_ids, labels=labels).loss
    loss.backward()
    packed = gradients(model)

    model.zero_grad()
    separate_loss = sum(model(ids, labels=ids, num_items_in_batch=2 + 4 + 3).loss for ids in documents)
    separate_loss.backward()
    torch.testing.assert_close(loss, separate_loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(packed, gradients(model), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("backend", TRAINING_BACKENDS)
def test_no_gradient_crosses_a_document_boundary(backend, training):
    model = make_model(backend).train(training)
    input_ids, position_ids, _, _ = pack([3, 5, 4])
    embeds = model.get_input_embeddings()(input_ids).detach().requires_grad_()
    logits = model(inputs_embeds=embeds, position_ids=position_ids).logits
    logits[:, 3:8].square().sum().backward()  # the second document
    reached = embeds.grad.abs().sum(-1)[0] > 0
    assert reached.tolist() == [False] * 3 + [True] * 5 + [False] * 4


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_a_packed_row_may_be_longer_than_n_positions(training):
    model = make_model().train(training)
    input_ids, position_ids, labels, documents = pack([16, 16, 5])
    packed = model(input_ids, position_ids=position_ids).logits
    torch.testing.assert_close(packed[:, 16:32], model(documents[1]).logits, rtol=1e-5, atol=1e-5)
    assert model(input_ids, position_ids=position_ids, labels=labels).loss.isfinite()


def test_a_mask_makes_a_packed_row_one_document():
    """The mask wins, even one of ones: the last document then looks at the first."""
    model = make_model()
    input_ids, position_ids, _, _ = pack([3, 5, 4])
    other_start = input_ids.clone()
    other_start[:, 0] = (input_ids[:, 0] + 1) % EOS

    def last_logits(ids, **mask):
        return model(ids, position_ids=position_ids, **mask).logits[:, -1]

    ones = torch.ones_like(input_ids)
    torch.testing.assert_close(last_logits(input_ids), last_logits(other_start), rtol=0, atol=0)
    change = last_logits(input_ids, attention_mask=ones) - last_logits(other_start, attention_mask=ones)
    assert change.abs().max() > 1e-2


def test_a_masked_row_longer_than_n_positions_is_refused():
    input_ids, position_ids, _, _ = pack([16, 1])
    with pytest.raises(ValueError, match=r"17 positions .* n_positions=16; truncate"):
        make_model()(input_ids, position_ids=position_ids, attention_mask=torch.ones_like(input_ids))


# Padding


def pad_left(input_ids, pads):
    """Ids and mask of rows with `pads` padding tokens in front."""
    padding = torch.full((input_ids.shape[0], pads), EOS)
    mask = torch.cat([torch.zeros_like(padding), torch.ones_like(input_ids)], dim=1)
    return torch.cat([padding, input_ids], dim=1), mask


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pads", [0, 1, 5])
def test_left_padding_changes_no_logit(backend, pads):
    model = make_model(backend)
    input_ids = random_ids(2, 6)
    padded, mask = pad_left(input_ids, pads)
    with inference_of(backend):
        logits = model(padded, attention_mask=mask).logits[:, pads:]
        torch.testing.assert_close(logits, model(input_ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("head", ["ScratchGPT2ForTokenClassification", "ScratchGPT2ForQuestionAnswering"])
def test_left_padding_changes_no_logit_of_other_heads(head):
    model = make_model(head=getattr(scratch_gpt2, head), num_labels=3)
    input_ids = random_ids(2, 6)
    padded, mask = pad_left(input_ids, 5)
    padded_logits, logits = model(padded, attention_mask=mask).to_tuple(), model(input_ids).to_tuple()
    for with_pads, without in zip(padded_logits, logits, strict=True):
        torch.testing.assert_close(with_pads[:, 5:], without, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", TRAINING_BACKENDS)
def test_a_row_of_padding_is_harmless(backend):
    model = make_model(backend).train()
    input_ids, mask = random_ids(2, 6), torch.tensor([[1] * 6, [0] * 6])
    labels = input_ids.masked_fill(mask == 0, -100)
    output = model(input_ids, attention_mask=mask, labels=labels, skip_logits=False)
    assert output.logits.isfinite().all()
    output.loss.backward()
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())

    with_padding_row = gradients(model)
    model.zero_grad()
    model(input_ids[:1], labels=labels[:1]).loss.backward()
    torch.testing.assert_close(with_padding_row, gradients(model), rtol=1e-4, atol=1e-6)


def test_a_row_of_padding_is_harmless_for_flex_attention():
    model = make_model("flex_attention")
    with torch.no_grad():
        assert model(random_ids(1, 6), attention_mask=torch.zeros(1, 6)).logits.isfinite().all()


# Batches with nothing to learn


@pytest.mark.parametrize("items", [None, 0, torch.tensor(0)], ids=["mean", "int", "tensor"])
def test_a_batch_without_labels_to_learn_leaves_the_weights_alone(items):
    """Trainer counts the labels of a step and passes the count, here 0; a NaN would destroy every weight."""
    model = make_model().train()
    input_ids = random_ids(2, 6)
    loss = model(input_ids, labels=torch.full_like(input_ids, -100), num_items_in_batch=items).loss
    loss.backward()
    assert loss.item() == 0.0
    assert all(gradient is None or not gradient.any() for gradient in gradients(model).values())


# The cache


def test_by_default_there_is_a_cache_only_where_it_is_of_use():
    model = make_model()
    input_ids = random_ids(1, 6)
    assert model(input_ids).past_key_values.get_seq_length() == 6
    assert model(input_ids, labels=input_ids).past_key_values is None
    model.train()
    assert model(input_ids).past_key_values is None
    assert model(input_ids, labels=input_ids).past_key_values is None
    assert model.model(input_ids).past_key_values is None


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_an_explicit_use_cache_is_honoured(training):
    model = make_model().train(training)
    input_ids = random_ids(1, 6)
    assert model(input_ids, use_cache=True).past_key_values.get_seq_length() == 6
    assert model(input_ids, labels=input_ids, use_cache=True).past_key_values.get_seq_length() == 6
    assert model(input_ids, use_cache=False).past_key_values is None


# Gradient checkpointing


def checkpointed_gradients(use_reentrant):
    model = make_model("eager").train()
    if use_reentrant is not None:
        model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    input_ids = random_ids(2, 6)
    model(input_ids, labels=input_ids).loss.backward()
    return gradients(model)


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_checkpointing_changes_no_gradient(use_reentrant):
    torch.testing.assert_close(checkpointed_gradients(use_reentrant), checkpointed_gradients(None), rtol=0, atol=0)


def test_checkpointing_runs_every_block_again_and_leaves_the_cache_alone():
    model = make_model().train()
    model.activation_checkpointing_enable()
    calls = []
    for block in model.model.layers:
        block.mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    input_ids = random_ids(1, 6)
    output = model(input_ids, labels=input_ids, use_cache=True)
    output.loss.backward()
    assert len(calls) == 4  # two blocks, forward and backward
    assert output.past_key_values.get_seq_length() == 0  # the library switches it off; doubled it would be 12


# Dropout


@pytest.mark.parametrize("backend", BACKENDS)
def test_there_is_no_dropout_in_evaluation(backend):
    dropout = dict.fromkeys(NO_DROPOUT, 0.9)
    input_ids = random_ids(2, 6)
    with torch.no_grad():
        logits = make_model(backend, **dropout)(input_ids).logits
        torch.testing.assert_close(logits, make_model(backend)(input_ids).logits, rtol=0, atol=0)


@pytest.mark.parametrize("place", NO_DROPOUT)
@pytest.mark.parametrize("backend", TRAINING_BACKENDS)
def test_each_dropout_works_in_training(backend, place):
    model = make_model(backend, **{place: 0.9}).train()
    input_ids = random_ids(2, 6)
    assert (model(input_ids).logits - model(input_ids).logits).abs().max() > 1e-2


# dtypes


def test_the_dtype_on_load_is_the_checkpoints_unless_asked_otherwise(tmp_path):
    model = make_model().to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    as_saved = ScratchGPT2ForCausalLM.from_pretrained(tmp_path)
    assert {parameter.dtype for parameter in as_saved.parameters()} == {torch.bfloat16}
    for_training = ScratchGPT2ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert {parameter.dtype for parameter in for_training.parameters()} == {torch.float32}
    torch.testing.assert_close(for_training.lm_head.weight, model.lm_head.weight.float(), rtol=0, atol=0)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_the_loss_of_a_bfloat16_model_is_float32(training):
    model = make_model().to(torch.bfloat16).train(training)
    input_ids = random_ids(2, 6)
    loss = model(input_ids, labels=input_ids).loss
    assert loss.dtype == torch.float32
    logits = model(input_ids).logits[:, :-1].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits.double(), input_ids[:, 1:].flatten())
    torch.testing.assert_close(loss, expected.float(), rtol=1e-6, atol=0)
