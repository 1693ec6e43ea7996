"""Programs that take our checkpoints besides those tested elsewhere: each `recipe` is code to copy, and is run here.
`integrations_table.py` writes the table of docs/integrations.md from the results."""

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from model_fixtures import random_ids, relative_error, tiny_model, twins
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForQuestionAnswering, AutoTokenizer

from scratch_gpt2 import export_gpt2

EXTRA = "not installed; pip install {}"


SIZES = {"n_embd": 64, "n_head": 2, "n_layer": 1}
UNTIED = SIZES | {"tie_word_embeddings": False, "activation_function": "relu", "n_inner": 96, "vocab_size": 64}


@pytest.fixture
def folder(tmp_path) -> Path:
    """A checkpoint of ours."""
    tiny_model(**SIZES).save_pretrained(tmp_path / "ours")
    return tmp_path / "ours"


@pytest.fixture
def exported(tmp_path, tiny_tokenizer):
    """A model of ours and the same one as transformers' GPT-2 in a folder, with its tokenizer."""
    special = {f"{name}_token_id": tiny_tokenizer.eos_token_id for name in ("bos", "eos", "pad")}
    model = tiny_model(vocab_size=len(tiny_tokenizer), **special)
    export_gpt2(model, tmp_path / "gpt2")
    tiny_tokenizer.save_pretrained(tmp_path / "gpt2")
    return model, tmp_path / "gpt2"


def recipe_onnx(folder, output):
    from transformers.exporters import OnnxConfig, OnnxExporter

    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.randint(model.config.vocab_size, (2, 8))
    example = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    OnnxExporter().export(model, example, OnnxConfig(dynamic=True)).save_pretrained(output)


def test_onnx(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason=EXTRA.format("onnx onnxscript onnxruntime"))
    pytest.importorskip("onnxscript", reason=EXTRA.format("onnx onnxscript onnxruntime"))
    model = tiny_model(**UNTIED)
    model.save_pretrained(tmp_path / "ours")
    recipe_onnx(tmp_path / "ours", tmp_path / "onnx")
    session = onnxruntime.InferenceSession(tmp_path / "onnx" / "model.onnx")
    for shape in ((1, 5), (3, 32)):
        ids = random_ids(*shape)
        mask = torch.ones_like(ids)
        mask[0, :3] = 0  # padding on the left
        feed = {"input_ids": ids.numpy(), "attention_mask": mask.numpy()}
        logits = torch.from_numpy(session.run(["logits"], feed)[0])
        expected = model(ids, attention_mask=mask).logits
        assert relative_error(logits[:, 3:], expected[:, 3:]) <= 1e-4


def recipe_onnx_generation(folder, output):
    from transformers.exporters import OnnxConfig, OnnxExporter

    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.randint(model.config.vocab_size, (2, 8))
    example = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    exporter = OnnxExporter()
    exported = exporter.export_for_generation(model, example, OnnxConfig(dynamic=True), multi_token_decode=True)
    exported.save_pretrained(output)


def recipe_onnx_greedy(output, ids, config, new_tokens):
    """Continue `ids` (1, T); the first call reads the prompt with an empty cache."""
    from transformers import DynamicCache
    from transformers.exporters import ExportedModel

    decode = ExportedModel.from_pretrained(output).runners["decode"]
    cache, new, empty = DynamicCache(config=config), ids, torch.zeros(1, config.n_head, 0, config.head_dim)
    for layer in cache.layers:
        layer.lazy_initialization(empty, empty)
        layer.keys = layer.values = empty
    for _ in range(new_tokens):
        positions = torch.arange(ids.shape[1] - new.shape[1], ids.shape[1])[None]
        outputs = decode(input_ids=new, position_ids=positions, past_key_values=cache)
        cache, new = outputs.past_key_values, outputs.logits[:, -1:].argmax(-1)
        ids = torch.cat([ids, new], dim=1)
    return ids


@pytest.fixture(scope="module")
def onnx_generation(tmp_path_factory):
    """A model, the folder of its export, a prompt, and its greedy text."""
    for package in ("onnxruntime", "onnxscript"):
        pytest.importorskip(package, reason=EXTRA.format("onnx onnxscript onnxruntime"))
    output, model, ids = tmp_path_factory.mktemp("onnx"), tiny_model(**SIZES), random_ids(1, 5)
    model.save_pretrained(output / "ours")
    recipe_onnx_generation(output / "ours", output)
    return model, output, ids, model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12)


def test_onnx_generates_with_the_cache(onnx_generation):
    model, output, ids, expected = onnx_generation
    assert torch.equal(recipe_onnx_greedy(output, ids, model.config, expected.shape[1] - 5), expected)


def recipe_openvino(onnx_folder, config, int8=False):
    """Read what `recipe_onnx_generation` wrote, for one text at a time; keys and values become a state."""
    import openvino
    from openvino.passes import MakeStateful, Manager

    core = openvino.Core()
    model = core.read_model(onnx_folder / "decode.onnx")
    past = [one.any_name for one in model.inputs if "past_key_values" in one.any_name]
    shapes = {name: [1, config.n_head, -1, config.head_dim] for name in past}
    model.reshape({"input_ids": [1, -1], "position_ids": [1, -1]} | shapes)
    manager = Manager()
    manager.register_pass(MakeStateful({name: name.replace("input.", "output.", 1) for name in past}))
    manager.run_passes(model)
    if int8:
        import nncf

        model = nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_SYM)
    options = {"INFERENCE_PRECISION_HINT": "f32"}  # else bfloat16, where the CPU computes it
    return core.compile_model(model, "CPU", options).create_infer_request()


def recipe_openvino_greedy(request, ids, new_tokens):
    """Continue `ids` (1, T); the first call reads the prompt. Returns all ids, and the logits of the last call."""
    request.reset_state()
    new = ids
    for _ in range(new_tokens):
        positions = torch.arange(ids.shape[1] - new.shape[1], ids.shape[1])[None]
        outputs = request.infer({"input_ids": new.numpy(), "position_ids": positions.numpy()})
        logits = torch.from_numpy(outputs["logits"])
        new = logits[:, -1:].argmax(-1)
        ids = torch.cat([ids, new], dim=1)
    return ids, logits


@torch.no_grad()
@pytest.mark.parametrize("int8", [False, True], ids=["float32", "int8"])
def test_openvino(int8, onnx_generation):
    """float32 writes the same text; the logits of int8 are close, and so are not those of float32."""
    for package in ("openvino", "nncf") if int8 else ("openvino",):
        pytest.importorskip(package, reason=EXTRA.format("openvino nncf"))
    model, output, ids, expected = onnx_generation
    written, logits = recipe_openvino_greedy(recipe_openvino(output, model.config, int8), ids, expected.shape[1] - 5)
    error = relative_error(logits[:, -1], model(written[:, :-1]).logits[:, -1])
    if int8:
        assert 1e-4 < error < 0.05
    else:
        assert torch.equal(written, expected) and error <= 1e-5


def recipe_torchao(folder, bits):
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerGroup
    from transformers import TorchAoConfig

    int4 = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))
    config = TorchAoConfig(Int8WeightOnlyConfig() if bits == 8 else int4)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)


@pytest.mark.parametrize(("bits", "error"), [(8, 0.05), (4, 0.3)])
def test_torchao(bits, error, folder, tmp_path):
    pytest.importorskip("torchao", reason=EXTRA.format("torchao"))
    model, ids = AutoModelForCausalLM.from_pretrained(folder), random_ids(2, 9)
    quantized = recipe_torchao(folder, bits)
    assert 0 < relative_error(quantized(ids).logits, model(ids).logits) < error
    quantized.save_pretrained(tmp_path / "quantized")
    assert weights_size(tmp_path / "quantized") < 0.5 * weights_size(folder)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized")
    assert torch.equal(again(ids).logits, quantized(ids).logits)


def weights_size(folder) -> int:
    return (folder / "model.safetensors").stat().st_size


def recipe_dynamic_int8(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, torch.qint8)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_dynamic_int8(folder):
    model, ids = AutoModelForCausalLM.from_pretrained(folder), random_ids(2, 9)
    quantized = recipe_dynamic_int8(folder)
    assert not any(type(module) is nn.Linear for module in quantized.modules())
    assert 0 < relative_error(quantized(ids, labels=ids).logits, model(ids).logits) < 0.1
    assert quantized.generate(ids, max_new_tokens=3, do_sample=False).shape == (2, 12)


def recipe_ctranslate2(gpt2_folder, output, quantization=None):
    from ctranslate2 import Generator
    from ctranslate2.converters import TransformersConverter

    TransformersConverter(str(gpt2_folder)).convert(str(output), quantization=quantization)
    return Generator(str(output))


def test_ctranslate2(exported, tmp_path):
    """float32 writes the same text; int8 is much smaller. `export_gpt2` wrote what is converted."""
    pytest.importorskip("ctranslate2", reason=EXTRA.format("ctranslate2"))
    model, gpt2_folder = exported
    tokenizer = AutoTokenizer.from_pretrained(gpt2_folder)
    inputs = tokenizer("The cat sat", return_tensors="pt")
    tokens = tokenizer.convert_ids_to_tokens(inputs.input_ids[0].tolist())
    generator = recipe_ctranslate2(gpt2_folder, tmp_path / "float32")
    result = generator.generate_batch([tokens], max_length=8, sampling_topk=1, include_prompt_in_result=False)[0]
    greedy = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, len(tokens) :]
    assert result.sequences_ids[0] == greedy.tolist()
    logits = torch.from_numpy(np.array(generator.forward_batch([tokens])))
    assert relative_error(logits, model(**inputs).logits) <= 1e-4

    small = recipe_ctranslate2(gpt2_folder, tmp_path / "int8", quantization="int8")
    assert small.compute_type.startswith("int8")
    sizes = [(tmp_path / name / "model.bin").stat().st_size for name in ("int8", "float32")]
    assert sizes[0] < 0.5 * sizes[1]


def recipe_offload(folder, offload_folder, memory):
    return AutoModelForCausalLM.from_pretrained(
        folder, device_map="auto", max_memory={"cpu": memory}, offload_folder=offload_folder
    )


def test_disk_offload(tmp_path):
    model, ids = tiny_model(n_embd=32), random_ids(2, 7)
    model.save_pretrained(tmp_path / "ours")
    offloaded = recipe_offload(
        tmp_path / "ours", tmp_path / "offload", memory=sum(p.nbytes for p in model.parameters()) // 2
    )
    assert set(offloaded.hf_device_map.values()) == {"cpu", "disk"}
    assert torch.equal(offloaded(ids).logits, model(ids).logits)


def recipe_lora(folder):
    from peft import LoraConfig, get_peft_model

    import scratch_gpt2.training.adapters  # noqa: F401 - tells PEFT the layers that are meant by default

    return get_peft_model(AutoModelForCausalLM.from_pretrained(folder), LoraConfig(task_type="CAUSAL_LM"))


def test_lora_without_named_targets(folder):
    pytest.importorskip("peft", reason=EXTRA.format("peft"))
    names = [name.split(".lora_A")[0] for name, _ in recipe_lora(folder).named_parameters() if "lora_A" in name]
    targets = {name.rsplit(".", 1)[1] for name in names}
    assert targets == {"q_proj", "k_proj", "v_proj", "out_proj", "up_proj", "down_proj"}


def recipe_dpo(model, reference, tokenizer, rows, output):
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    options = {"max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 0.01, "logging_steps": 1}
    options |= {
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "save_strategy": "no",
        "gradient_checkpointing": False,
    }
    trainer = DPOTrainer(
        model,
        reference,
        args=DPOConfig(str(output), **options),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_trl_dpo(tiny_tokenizer, tmp_path):
    """Both steps cost what they cost with transformers' GPT-2, the first ln 2: the policy is still the reference."""
    for package in ("trl", "datasets"):
        pytest.importorskip(package, reason=EXTRA.format(package))
    sizes = {"vocab_size": len(tiny_tokenizer), "n_positions": 64, "n_embd": 24, "n_layer": 2, "n_head": 4}
    rows = [{"prompt": f"The {word}", "chosen": " sat on the mat.", "rejected": " is."} for word in ("cat", "rat") * 4]
    losses = []
    for model in twins(sizes=sizes):
        losses.append(recipe_dpo(model, copy.deepcopy(model), tiny_tokenizer, rows, tmp_path))
    theirs, ours = losses
    assert ours[0] == pytest.approx(math.log(2), abs=1e-4)
    assert ours[1] < 0.6 and ours == pytest.approx(theirs, rel=1e-3)


def recipe_question_answering(folder, ids):
    outputs = AutoModelForQuestionAnswering.from_pretrained(folder)(ids)
    spans = outputs.start_logits[0][:, None] + outputs.end_logits[0]  # (start, end)
    backwards = torch.ones_like(spans).tril(-1).bool()
    return divmod(spans.masked_fill(backwards, -torch.inf).argmax().item(), len(spans))


def test_question_answering(tmp_path):
    """transformers 5 has no pipeline for this head. The span is the one that its GPT-2 finds."""
    assert "question-answering" not in transformers.pipelines.PIPELINE_REGISTRY.get_supported_tasks()
    theirs, ours = twins(transformers.GPT2ForQuestionAnswering)
    ours.save_pretrained(tmp_path)
    ids = random_ids(1, 8)
    outputs = theirs(ids)
    starts, ends = outputs.start_logits[0].tolist(), outputs.end_logits[0].tolist()
    best = max((starts[i] + ends[j], i, j) for i in range(8) for j in range(i, 8))
    assert recipe_question_answering(tmp_path, ids) == best[1:]


def test_vllm_requirements():
    """What vLLM's documentation asks of a model of its Transformers backend (docs/models/supported_models.md, "Writing
    custom models"): attention through the interface, keyword arguments handed down to it, and a parallel plan."""
    calls = []

    def attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
        calls.append((module.layer_idx, module.is_causal, kwargs["attention_instances"]))
        output = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
        return output.transpose(1, 2).contiguous(), None

    model, ids = tiny_model(), random_ids(1, 9)
    expected = model(ids).logits
    transformers.AttentionInterface.register("recording", attention)
    model.set_attn_implementation("recording")
    positions = torch.arange(9)[None]
    logits = model(ids, position_ids=positions, use_cache=False, attention_instances="theirs").logits
    assert relative_error(logits, expected) <= 1e-5
    assert calls == [(n, True, "theirs") for n in range(3)]

    base = model.model
    assert base._supports_attention_backend and model.config.auto_map["AutoModel"].endswith(".ScratchGPT2Model")
    assert [name for name, child in base.named_children() if isinstance(child, nn.ModuleList)] == ["layers"]
    plan = model.config.base_model_tp_plan
    linear = [name for name, module in base.layers[0].named_modules() if type(module) is nn.Linear]
    assert set(plan) == {f"layers.*.{name}" for name in linear} and set(plan.values()) == {"colwise", "rowwise"}
