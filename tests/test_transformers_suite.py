"""transformers' own model tests, run over every head: whatever passes for its GPT-2 passes for ours.

Each test of the mixins runs on our head and on GPT-2's. Ours may fail or skip only where GPT-2 does, and must run
the model as often: many of these tests pass without doing anything when a class flag is missing.
"""

import copy
import unittest
from dataclasses import dataclass

import pytest
import torch
import transformers
from tokenizers.pre_tokenizers import ByteLevel
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import GPT2Tokenizer, pipeline, set_seed
from transformers_sdist import SdistUnavailable, load_tests

import scratch_gpt2

try:
    modeling, training, pipelines, configuration = load_tests(
        "test_modeling_common", "test_training_mixin", "test_pipeline_mixin", "test_configuration_common"
    )
except SdistUnavailable as reason:
    pytest.skip(str(reason), allow_module_level=True)

GPT2 = {
    "config": transformers.GPT2Config,
    "base": transformers.GPT2Model,
    "causal_lm": transformers.GPT2LMHeadModel,
    "sequence_classification": transformers.GPT2ForSequenceClassification,
    "token_classification": transformers.GPT2ForTokenClassification,
    "question_answering": transformers.GPT2ForQuestionAnswering,
    "double_heads": transformers.GPT2DoubleHeadsModel,
}
SCRATCH_GPT2 = {
    "config": scratch_gpt2.ScratchGPT2Config,
    "base": scratch_gpt2.ScratchGPT2Model,
    "causal_lm": scratch_gpt2.ScratchGPT2ForCausalLM,
    "sequence_classification": scratch_gpt2.ScratchGPT2ForSequenceClassification,
    "token_classification": scratch_gpt2.ScratchGPT2ForTokenClassification,
    "question_answering": scratch_gpt2.ScratchGPT2ForQuestionAnswering,
    "double_heads": scratch_gpt2.ScratchGPT2DoubleHeadsModel,
}
ROLES = [role for role in GPT2 if role != "config"]

# The mixins look up by class name what a head is for; a name they do not know is skipped without a word.
NAME_MAPPINGS = {
    "MODEL_MAPPING_NAMES": "base",
    "MODEL_FOR_PRETRAINING_MAPPING_NAMES": "causal_lm",
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": "causal_lm",
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES": "sequence_classification",
    "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES": "token_classification",
    "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES": "question_answering",
}
for mapping, role in NAME_MAPPINGS.items():
    ours = {SCRATCH_GPT2["config"].model_type: SCRATCH_GPT2[role].__name__}
    setattr(modeling, mapping, {**getattr(modeling, mapping), **ours})


class ModelTester:
    """The tiny model and inputs that the mixins ask for."""

    batch_size, seq_length, num_choices = 5, 7, 4
    vocab_size, hidden_size, num_hidden_layers, num_attention_heads = 99, 32, 2, 2
    is_training = True

    def __init__(self, family):
        self.config_class = family["config"]
        self.base_model_class = family["base"]
        self.causal_lm_class = family["causal_lm"]

    def get_config(self, **options):
        sizes = {
            "n_positions": 128,
            "n_embd": self.hidden_size,
            "n_layer": self.num_hidden_layers,
            "n_head": self.num_attention_heads,
        }
        tokens = {"vocab_size": self.vocab_size, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        return self.config_class(**sizes | tokens | {"num_labels": 3} | options)

    def prepare_config_and_inputs_for_common(self):
        shape = [self.batch_size, self.seq_length]
        lengths = torch.arange(self.seq_length, self.seq_length - self.batch_size, -1)
        mask = torch.arange(self.seq_length) < lengths[:, None]  # right-padded rows of 7, 6, 5, 4 and 3 tokens
        inputs = {
            "input_ids": modeling.ids_tensor(shape, self.vocab_size),
            "attention_mask": mask.long().to(modeling.torch_device),
            "token_type_ids": modeling.ids_tensor(shape, 16),
        }
        return self.get_config(), inputs


class HeadTest(modeling.ModelTesterMixin, pipelines.PipelineTesterMixin):
    """Body of every suite; `make_suite` sets `family` and `role`."""

    test_can_init_all_missing_weights_before_2023 = True

    def setUp(self):
        self.model_tester = ModelTester(self.family)
        head = self.family[self.role]
        self.all_model_classes = (head,)
        self.pipeline_model_mapping = {task: head for task, role in PIPELINE_ROLES.items() if role == self.role}

    def test_config(self):
        configuration.ConfigTester(self, config_class=self.family["config"], n_embd=36).run_common_tests()  # 12 heads


class GenerativeHeadTest(HeadTest, modeling.GenerationTesterMixin):
    pass


class CausalLMTest(GenerativeHeadTest, training.TrainingTesterMixin):
    model_tester = None


class DoubleHeadsTest(GenerativeHeadTest):
    test_all_params_have_gradient = False  # `loss` is the language modelling loss, `mc_loss` stands apart

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        if not return_labels:
            return copy.deepcopy(inputs_dict)
        tester = self.model_tester
        shape = (tester.batch_size, tester.num_choices, tester.seq_length)
        tokens = torch.zeros(shape, dtype=torch.long, device=modeling.torch_device)
        inputs = {"input_ids": tokens, "token_type_ids": tokens, "labels": tokens}
        return inputs | {"mc_token_ids": tokens[:, :, 0], "mc_labels": tokens[:, 0, 0]}


def make_suite(family, role):
    bodies = {"causal_lm": CausalLMTest, "double_heads": DoubleHeadsTest}
    bases = (bodies.get(role, HeadTest), unittest.TestCase)
    return type(f"{family[role].__name__}Test", bases, {"family": family, "role": role})


SUITES = {role: make_suite(SCRATCH_GPT2, role) for role in ROLES}
BASELINES = {role: make_suite(GPT2, role) for role in ROLES}


class PipelineTask:
    """What PipelineTesterMixin expects from transformers' tests/pipelines, which the sdist leaves out."""

    arguments = {}

    def get_test_pipeline(self, model, tokenizer, dtype, **processors):
        model.to(getattr(torch, dtype))
        pipe = pipeline(self.task, model=model, tokenizer=tokenizer, **self.arguments)
        return pipe, ["This is a test", "Another, longer test"]

    def run_pipeline_test(self, pipe, examples):
        for text in examples:
            tokens = pipe.tokenizer(text, return_tensors="pt").to(pipe.device)
            with torch.no_grad():
                expected = pipe.model(**tokens)
            self.check(pipe, text, pipe(text), expected)


class FeatureExtraction(PipelineTask):
    task = "feature-extraction"

    def check(self, pipe, text, output, expected):
        torch.testing.assert_close(torch.tensor(output), expected.last_hidden_state.float().cpu())


class TextGeneration(PipelineTask):
    task = "text-generation"
    arguments = {"max_new_tokens": 5, "do_sample": False, "return_full_text": False}

    def check(self, pipe, text, output, expected):
        # Random weights may begin with the eos token, which the pipeline does not show.
        first_token = pipe.tokenizer.decode(expected.logits[0, -1].argmax(), skip_special_tokens=True)
        assert output[0]["generated_text"].startswith(first_token)
        full = pipe(text, return_full_text=True)[0]["generated_text"]
        assert full == text + output[0]["generated_text"]


class TextClassification(PipelineTask):
    task = "text-classification"

    def check(self, pipe, text, output, expected):
        score, label = expected.logits[0].float().softmax(-1).max(-1)
        assert output[0]["label"] == pipe.model.config.id2label[label.item()]
        assert output[0]["score"] == pytest.approx(score.item(), abs=1e-3)


class ZeroShot(PipelineTask):
    task = "zero-shot-classification"
    arguments = {"candidate_labels": ["politics", "health"]}

    def check(self, pipe, text, output, expected):
        assert sorted(output["labels"]) == ["health", "politics"]
        assert sum(output["scores"]) == pytest.approx(1, abs=1e-3)


class TokenClassification(PipelineTask):
    task = "token-classification"

    def check(self, pipe, text, output, expected):
        labels = [pipe.model.config.id2label[label] for label in expected.logits[0].argmax(-1).tolist()]
        assert [token["entity"] for token in output] == labels
        assert "".join(token["word"] for token in output) == text.replace(" ", "Ġ")


PIPELINE_ROLES = {
    "feature-extraction": "base",
    "text-generation": "causal_lm",
    "text-classification": "sequence_classification",
    "zero-shot": "sequence_classification",
    "token-classification": "token_classification",
}
PIPELINE_TESTS = {
    "feature-extraction": FeatureExtraction,
    "text-generation": TextGeneration,
    "text-classification": TextClassification,
    "zero-shot": ZeroShot,
    "token-classification": TokenClassification,
}
for task, test in PIPELINE_TESTS.items():
    pipelines.pipeline_test_mapping[task]["test"] = f"{__name__}.{test.__name__}"


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Threads of parallel test processes get in each other's way: several times slower with these tiny models."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tiny_checkpoints(tmp_path_factory):
    """Saved models with a byte tokenizer, where PipelineTesterMixin looks for those of the Hub."""
    folder = tmp_path_factory.mktemp("tiny")
    vocabulary = {symbol: index for index, symbol in enumerate([*sorted(ByteLevel.alphabet()), "<|endoftext|>"])}
    tokenizer = GPT2Tokenizer(vocab=vocabulary, merges=[], pad_token="<|endoftext|>")
    tokens = {"vocab_size": 257, "bos_token_id": 256, "eos_token_id": 256, "pad_token_id": 256}
    summary = {}
    set_seed(0)
    for family in (GPT2, SCRATCH_GPT2):
        config = ModelTester(family).get_config(initializer_range=1.0, **tokens)
        for role in set(PIPELINE_ROLES.values()):
            head = family[role]
            path = folder / config.model_type / head.__name__
            head(copy.deepcopy(config)).save_pretrained(path)
            tokenizer.save_pretrained(path)
            summary[head.__name__] = {"tokenizer_classes": ["GPT2Tokenizer"], "processor_classes": []}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipelines, "TRANSFORMERS_TINY_MODEL_PATH", str(folder))
        patch.setattr(pipelines, "tiny_model_summary", summary)
        yield


@dataclass
class Outcome:
    failures: list[str]
    skips: list[str]
    forwards: int

    @property
    def passed(self):
        return not self.failures and not self.skips

    def __str__(self):
        lines = [f"failed: {trace.strip()}" for trace in self.failures] + [f"skipped: {s}" for s in self.skips]
        return "\n".join(lines) or f"passed with {self.forwards} forward passes"


def run(suite, name):
    """Outcome of one test of a suite; the same seeds for every suite."""
    forwards = []

    def count(module, args):
        if type(module) is suite.family[suite.role]:
            forwards.append(module)

    set_seed(0)
    modeling.global_rng.seed(0)
    result = unittest.TestResult()
    hook = register_module_forward_pre_hook(count)
    try:
        suite(name).run(result)
    finally:
        hook.remove()
    failures = [trace for _, trace in result.failures + result.errors]
    return Outcome(failures, sorted({reason for _, reason in result.skipped}), len(forwards))


CASES = [(role, name) for role in ROLES for name in unittest.TestLoader().getTestCaseNames(SUITES[role])]


# Tests that transformers runs on a GPU only, and in which ours differs on purpose.
DIFFERENT = {
    "test_disk_offload_bin": "a folder with nothing but a pickle is refused",
    "test_flex_attention_with_grads": "sets config.head_dim, which follows from n_embd and n_head here",
}


@pytest.mark.parametrize(("role", "name"), CASES)
def test_does_what_gpt2_does(role, name, tiny_checkpoints):
    if name in DIFFERENT:
        pytest.skip(DIFFERENT[name])
    ours, baseline = run(SUITES[role], name), run(BASELINES[role], name)
    if ours.passed:
        assert baseline.failures or ours.forwards >= baseline.forwards, "passes without running the model as often"
        return
    worse = ours.failures and not baseline.failures
    if worse or baseline.passed:
        pytest.fail(f"transformers' GPT-2 {baseline}\nours {ours}", pytrace=False)
    pytest.skip(f"transformers' GPT-2 {str(baseline).splitlines()[-1]}")


PASSED_BY_GPT2 = [
    ("base", "test_attention_outputs"),
    ("base", "test_pipeline_feature_extraction"),
    ("causal_lm", "test_eager_matches_sdpa_inference_09_fp32_pad_left"),
    ("causal_lm", "test_pipeline_text_generation_fp16"),
    ("causal_lm", "test_training_gradient_checkpointing"),
    ("causal_lm", "test_training_overfit"),
    ("sequence_classification", "test_pipeline_zero_shot"),
    ("sequence_classification", "test_problem_types"),
    ("token_classification", "test_pipeline_token_classification"),
    ("question_answering", "test_model_outputs_equivalence"),
    ("double_heads", "test_generation_tester_mixin_inheritance"),
    ("double_heads", "test_resize_tokens_embeddings"),
]


@pytest.mark.parametrize(("role", "name"), PASSED_BY_GPT2)
def test_the_baseline_stands(role, name, tiny_checkpoints):
    """A stand-in or tester that breaks GPT-2's own tests would excuse every failure of ours."""
    assert str(run(BASELINES[role], name)).startswith("passed")


@pytest.mark.parametrize("role", ROLES)
def test_class_flags(role):
    """What these flags switch on is tested on a GPU only, or is skipped without a word."""
    head = SCRATCH_GPT2[role]
    assert head.supports_gradient_checkpointing
    assert head._supports_sdpa
    assert head._supports_flash_attn
    assert head._supports_flex_attn
    assert head._supports_attention_backend
    assert head._can_compile_fullgraph
    assert head._no_split_modules
    assert head._skip_keys_device_placement == ["past_key_values", "cache"]  # its names before and since 5.24
    assert {"hidden_states", "attentions"} <= set(head._can_record_outputs)
    assert head.config_class.base_model_tp_plan
    assert bool(head._tied_weights_keys) == (role in ("causal_lm", "double_heads"))
