"""The peers of decode.py that have a format of their own: converting the weights, and writing with each library."""

import json
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from transformers import DynamicCache, GPT2LMHeadModel

LLAMA_TYPES = ("F32", "Q8_0", "Q4_0")


class StepWithCache(torch.nn.Module):
    """transformers' GPT-2 for ONNX, with tensors only: from (B, T) ids and the alternating keys and values of all
    blocks to the logits of the last position and the longer keys and values."""

    def __init__(self, model: GPT2LMHeadModel):
        super().__init__()
        self.model = model

    def forward(self, ids, past):
        cache = DynamicCache(list(zip(past[::2], past[1::2], strict=True)))
        output = self.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return output.logits[:, -1], [x for layer in output.past_key_values.layers for x in (layer.keys, layer.values)]


def export_to_onnx(model: GPT2LMHeadModel, folder: Path) -> None:
    config, free = model.config, torch.export.Dim.DYNAMIC
    past = [torch.zeros(2, config.n_head, 3, config.n_embd // config.n_head) for _ in range(2 * config.n_layer)]
    shapes = ({0: free, 1: free}, [{0: free, 2: free}] * len(past))
    inputs = (torch.zeros(2, 5, dtype=torch.long), past)
    (folder / "onnx").mkdir()
    file = folder / "onnx" / "model.onnx"
    torch.onnx.export(StepWithCache(model).eval(), inputs, file, dynamic_shapes=shapes, dynamo=True, verbose=False)


def convert_to_ctranslate2(model: GPT2LMHeadModel, folder: Path) -> None:
    """As ctranslate2's own converter does, but with numbers as tokens: random weights have no vocabulary."""
    from ctranslate2.converters.transformers import GPT2Loader

    spec = GPT2Loader().get_model_spec(model)
    spec.register_vocabulary([str(number) for number in range(model.config.vocab_size)])
    spec.config.bos_token = spec.config.eos_token = spec.config.unk_token = str(model.config.eos_token_id)
    spec.validate()
    spec.optimize(quantization=None)
    (folder / "ctranslate2").mkdir()
    spec.save(str(folder / "ctranslate2"))


def convert_to_gguf(folder: Path) -> None:
    """With a tokenizer that is not used: llama.cpp gets ids."""
    from scratch_gpt2 import ScratchGPT2ForCausalLM
    from scratch_gpt2.gguf_export import export_gguf
    from scratch_gpt2.tokenization import train_tokenizer

    model = ScratchGPT2ForCausalLM.from_pretrained(folder)
    tokenizer = train_tokenizer(["the text"], 260)
    for kind in LLAMA_TYPES:
        export_gguf(model, folder / f"{kind}.gguf", tokenizer=tokenizer, dtype=kind.lower())


def make_ctranslate2_writer(folder: Path, compute_type: str):
    import ctranslate2

    generator = ctranslate2.Generator(
        str(folder / "ctranslate2"), compute_type=compute_type, intra_threads=torch.get_num_threads()
    )

    def write(ids, new_tokens):
        results = generator.generate_batch(
            [[str(number) for number in row] for row in ids.tolist()],
            max_length=new_tokens,
            min_length=new_tokens,
            include_prompt_in_result=False,
            sampling_topk=1,
        )
        return torch.tensor([result.sequences_ids[0] for result in results])

    return write


def make_onnx_writer(folder: Path):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(folder / "onnx" / "model.onnx", options)
    names = [argument.name for argument in session.get_inputs()]  # the ids, then keys and values of every block
    n_heads, head_size = (session.get_inputs()[1].shape[i] for i in (1, 3))
    to_value = onnxruntime.OrtValue.ortvalue_from_numpy

    def write(ids, new_tokens):
        empty = torch.zeros(len(ids), n_heads, 0, head_size).numpy()
        past, step_ids, written = [to_value(empty) for _ in names[1:]], ids, []
        for _ in range(new_tokens):
            inputs = dict(zip(names, [to_value(step_ids.numpy()), *past], strict=True))
            logits, *past = session.run_with_ort_values(None, inputs)
            step_ids = torch.from_numpy(logits.numpy().argmax(-1, keepdims=True))
            written.append(step_ids)
        return torch.cat(written, 1)

    return write


def make_openvino_writer(folder: Path, batch: int, in_int8: bool):
    """onnxruntime's file, with keys and values as a state that OpenVINO keeps, as optimum-intel makes it. In int8,
    the weights are compressed by nncf."""
    import openvino
    from openvino._offline_transformations import apply_make_stateful_transformation

    core = openvino.Core()
    model = core.read_model(folder / "onnx" / "model.onnx")
    ids, *past = model.inputs
    shapes = {one: [batch, one.partial_shape[1], -1, one.partial_shape[3]] for one in past}
    model.reshape({ids: [batch, -1]} | shapes)
    pairs = zip(past, model.outputs[1:], strict=True)
    apply_make_stateful_transformation(model, {one.any_name: other.any_name for one, other in pairs})
    if in_int8:
        import nncf

        model = nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_SYM)
    options = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": "f32"}
    request = core.compile_model(model, "CPU", options).create_infer_request()

    def write(ids, new_tokens):
        request.reset_state()
        step_ids, written = ids, []
        for _ in range(new_tokens):
            logits = request.infer([step_ids.numpy()], share_inputs=True)[0]
            step_ids = torch.from_numpy(logits.argmax(-1, keepdims=True))
            written.append(step_ids)
        return torch.cat(written, 1)

    return write


def make_llama_writer(file: Path, batch: int, positions: int):
    """llama.cpp's own server, in this process; one request for each text, all at once."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(file)
    params.n_parallel, params.n_ctx, params.warmup, params.verbosity = batch, batch * positions, False, -1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = torch.get_num_threads()
    server = xllamacpp.Server(params)  # it ends when nothing refers to it any more
    fixed = {"temperature": 0, "ignore_eos": True, "cache_prompt": False, "return_tokens": True}

    def complete(ids: list[int], new_tokens: int) -> list[int]:
        content = json.dumps(fixed | {"prompt": ids, "n_predict": new_tokens}).encode()
        with urllib.request.urlopen(
            urllib.request.Request(f"{server.listening_address}/completion", content)
        ) as response:
            return json.load(response)["tokens"]

    def write(ids, new_tokens):
        with ThreadPoolExecutor(batch) as pool:
            return torch.tensor(list(pool.map(complete, ids.tolist(), [new_tokens] * batch)))

    return write
