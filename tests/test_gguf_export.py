"""GGUF files, read and run by llama.cpp itself: the same tokens, and log-probabilities within 0.01, because llama.cpp
computes GELU from a table in float16, and keeps keys and values in float16."""

import copy
import json
import urllib.request
from pathlib import Path

import pytest
import torch
from example_scripts import run_in_process
from model_fixtures import random_ids, relative_error, tiny_config, tiny_model, write_chain
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from scratch_gpt2 import ScratchGPT2ForCausalLM, ScratchGPT2ForSequenceClassification, export_gpt2, load_tokenizer
from scratch_gpt2.gguf_export import export_gguf
from scratch_gpt2.prediction import respond

GGUFReader = pytest.importorskip("gguf", reason="pip install gguf").GGUFReader
SPACE = Path(__file__).resolve().parents[1] / "space"
EXPORT = SPACE.parent / "examples" / "export.py"
SIZES = {"n_embd": 64, "n_head": 2, "n_layer": 3, "n_positions": 64}
TEXTS = [
    "The cat sat on the mat.",
    " two  spaces   and\ttabs\n\nand lines\r\n",
    "I'll say they've won, he'd think it's theirs; WE'RE NOT.",
    "x=1234567890; y[3]+=4.5e-6 // 100%",
    "日本語とРусский, ελληνικά, עברית",
    "naïve café ﬁ ① ½ ²",
    "🙂👩‍👩‍👧 flags 🇨🇭",
    "\u00a0non-breaking\u2003em space\u200bzero width",
    "trailing spaces   ",
    "   leading",
    "\n",
    "a" * 100,
    "don''t  ' 's",
    "_under__score-dash—em",
    "\x00\x01\x7f",
]


@pytest.fixture
def tokenizer(tiny_tokenizer):
    return tiny_tokenizer


@pytest.fixture
def make_model(tokenizer):
    """A model for the tiny tokenizer, with options on top of SIZES."""

    def make(**options):
        special = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), tokenizer.eos_token_id)
        return tiny_model(**SIZES | special | {"vocab_size": len(tokenizer)} | options)

    return make


def llama_server(file):
    """llama.cpp's own server, in this process."""
    xllamacpp = pytest.importorskip("xllamacpp", reason="llama.cpp is not installed; pip install xllamacpp")
    params = xllamacpp.CommonParams()
    params.model.path = str(file)
    params.n_parallel, params.warmup, params.verbosity = 1, False, -1
    params.n_ctx = 0  # what the file says
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    return xllamacpp.Server(params)


def post(server, path, **content):
    request = urllib.request.Request(server.listening_address + path, json.dumps(content).encode())
    with urllib.request.urlopen(request) as response:
        return json.load(response)


def next_token(server, ids, vocab_size):
    """(V,): the log-probability of each token after `ids`."""
    # Always an "a": llama.cpp would not report a byte that is a part of a character.
    options = {"n_predict": 1, "n_probs": vocab_size, "cache_prompt": False, "logit_bias": [[64, 1000]]}
    [entry] = post(server, "/completion", prompt=ids, **options)["completion_probabilities"]
    logprobs = {token["id"]: token["logprob"] for token in entry["top_logprobs"]}
    assert len(logprobs) == vocab_size
    return torch.tensor([logprobs[token] for token in range(vocab_size)])


@torch.no_grad()
def check_same_model(file, model, tolerance=0.01):
    """The whole distribution of the next token, after texts of 3 and 40 tokens."""
    server, vocab_size = llama_server(file), model.config.vocab_size
    for length in (3, 40):
        ids = random_ids(length, vocab_size=280).tolist()
        ours = model(torch.tensor([ids])).logits[0, -1].float().log_softmax(-1)
        theirs = next_token(server, ids, vocab_size)
        assert (theirs - ours).abs().max() <= tolerance


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scale_attn_by_inverse_layer_idx": True},
        {"scale_attn_weights": False},
        {"scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True, "n_head": 4},
        {"tie_word_embeddings": False},
        {"n_inner": 96},
        {"vocab_size": 320},
        {"activation_function": "gelu"},
        {"layer_norm_epsilon": 0.1},
        {"n_embd": 72, "n_head": 3, "n_layer": 1},
    ],
    ids=str,
)
def test_llama_cpp_writes_the_same(options, make_model, tokenizer, tmp_path):
    model = make_model(**options)
    export_gguf(model, tmp_path / "model.gguf", tokenizer=tokenizer, dtype="f32")
    check_same_model(tmp_path / "model.gguf", model)


# Matrices, embeddings, head, and everything else.
STORED = {"f32": ("F32", "F32"), "f16": ("F16", "F16"), "q8_0": ("Q8_0", "Q8_0"), "q4_0": ("Q4_0", "Q8_0")}
TOLERANCES = {"f32": 0.01, "f16": 0.01, "q8_0": 0.2, "q4_0": 1.5}


@pytest.mark.parametrize("dtype", STORED)
def test_dtypes(dtype, make_model, tokenizer, tmp_path):
    model = make_model(tie_word_embeddings=False)
    export_gguf(model, tmp_path / "model.gguf", tokenizer=tokenizer, dtype=dtype)
    kinds = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(tmp_path / "model.gguf").tensors}
    matrices, embeddings = STORED[dtype]
    assert {kinds[f"blk.2.{name}.weight"] for name in ("attn_qkv", "attn_output", "ffn_up", "ffn_down")} == {matrices}
    assert kinds["token_embd.weight"] == kinds["output.weight"] == embeddings
    assert kinds["position_embd.weight"] == kinds["blk.0.attn_qkv.bias"] == kinds["output_norm.weight"] == "F32"
    check_same_model(tmp_path / "model.gguf", model, TOLERANCES[dtype])


def test_the_bfloat16_base_writes_the_same_text(tmp_path):
    base = SPACE / "checkpoints" / "base"
    file, _ = export_gguf(base, tmp_path / "base.gguf", dtype="f32")
    model, tokenizer = ScratchGPT2ForCausalLM.from_pretrained(base, dtype=torch.float32), load_tokenizer(base)
    ids = tokenizer("Once upon a time there was a little").input_ids
    ours = model.generate(torch.tensor([ids]), max_new_tokens=48, do_sample=False)[0, len(ids) :]
    theirs = post(llama_server(file), "/completion", prompt=ids, n_predict=48, temperature=0, return_tokens=True)
    assert theirs["tokens"] == ours.tolist()
    assert theirs["content"] == tokenizer.decode(ours)


@torch.no_grad()
def test_the_assistant_answers_the_same(tmp_path):
    """Each token of its answer is our model's best, or as good within llama.cpp's rounding; and it ends there."""
    assistant = SPACE / "checkpoints" / "assistant"
    file, _ = export_gguf(assistant, tmp_path / "assistant.gguf", dtype="f32")
    server, tokenizer = llama_server(file), load_tokenizer(assistant)
    model = ScratchGPT2ForCausalLM.from_pretrained(assistant, dtype=torch.float32)
    for question in ("Name a colour.", "What is the opposite of hot?"):
        messages = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        options = {"n_predict": 60, "temperature": 0, "return_tokens": True}
        tokens = post(server, "/completion", prompt=prompt, **options)["tokens"]
        [choice] = server.handle_chat_completions({"messages": messages, "max_tokens": 60, "temperature": 0})[
            "choices"
        ]
        assert choice["message"]["content"].strip() == tokenizer.decode(tokens, skip_special_tokens=True).strip() != ""
        written = tokens if tokens[-1] == tokenizer.eos_token_id else [*tokens, tokenizer.eos_token_id]
        assert choice["finish_reason"] == "stop"
        logits = model(torch.tensor([prompt + written])).logits[0, len(prompt) - 1 : -1]
        chosen = logits.gather(-1, torch.tensor(written)[:, None]).squeeze(-1)
        assert (logits.amax(-1) - chosen).max() <= 0.02


def test_transformers_reads_it_back(make_model, tokenizer, tmp_path):
    model = make_model()
    export_gguf(model, tmp_path / "model.gguf", tokenizer=tokenizer, dtype="f32")
    config = GPT2Config(**SIZES, vocab_size=len(tokenizer))  # the reader forgets `n_positions`
    read = GPT2LMHeadModel.from_pretrained(tmp_path, config=config, gguf_file="model.gguf")
    ids = random_ids(2, 9)
    assert relative_error(read(ids).logits, model(ids).logits) <= 1e-5


@pytest.mark.parametrize("name", ["tiny_tokenizer", "gpt2_tokenizer"])
def test_texts_are_encoded_alike(name, request, make_model, tmp_path):
    tokenizer = request.getfixturevalue(name)
    model = tiny_model(vocab_size=len(tokenizer), n_embd=8, n_head=1, n_layer=1)
    export_gguf(model, tmp_path / "model.gguf", tokenizer=tokenizer)
    server = llama_server(tmp_path / "model.gguf")
    for text in [*TEXTS, "end<|endoftext|>of text"]:
        assert post(server, "/tokenize", content=text, add_special=True)["tokens"] == tokenizer(text).input_ids, text


CHAT = [
    [{"role": "user", "content": "Where is the rat? "}],
    [{"role": "system", "content": "Be a cat."}, {"role": "user", "content": "Where is the rat?"}],
    [
        {"role": "user", "content": "Where is the rat?"},
        {"role": "assistant", "content": "Under the hat."},
        {"role": "user", "content": "And the cat?"},
    ],
]


def test_chat(make_model, tokenizer, tmp_path):
    """The same prompts, and an answer that ends where the model ends it."""
    reply = tokenizer(" The hat is on the mat.").input_ids
    model = make_model(tie_word_embeddings=False)
    prompt = tokenizer.apply_chat_template(CHAT[0], add_generation_prompt=True)["input_ids"]
    write_chain(model, [prompt[-1], *dict.fromkeys(reply), tokenizer.eos_token_id])
    model.config.n_positions = 512
    model.model.embed_positions = torch.nn.Embedding(512, 64)
    torch.nn.init.zeros_(model.model.embed_positions.weight)
    export_gguf(model, tmp_path / "model.gguf", tokenizer=tokenizer)
    server = llama_server(tmp_path / "model.gguf")
    for messages in CHAT:
        expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert post(server, "/apply-template", messages=messages)["prompt"] == expected
    [answer] = respond(model, tokenizer, [prompt], max_new_tokens=40, do_sample=False)
    [choice] = server.handle_chat_completions({"messages": CHAT[0], "max_tokens": 40, "temperature": 0})["choices"]
    assert answer.stopped and choice["finish_reason"] == "stop"
    assert choice["message"]["content"].strip() == answer.text != ""


def test_adapters_are_merged(make_model, tokenizer, monkeypatch, capsys, tmp_path):
    """By the script, for an adapter on transformers' own GPT-2 too, whose tokenizer is that of its base."""
    peft = pytest.importorskip("peft", reason="pip install peft")
    model = make_model()
    export_gpt2(model, tmp_path / "base", tokenizer=tokenizer)
    base = GPT2LMHeadModel.from_pretrained(tmp_path / "base")
    adapted = peft.get_peft_model(base, peft.LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    adapted.save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter.gguf"
    options = ["--model", tmp_path / "adapter", "--output", file, "--dtype", "f32"]
    code, stdout, stderr = run_in_process(EXPORT, monkeypatch, capsys, *options)
    assert (code, stdout) == (0, f"{file}\n{tmp_path / 'adapter.Modelfile'}\n"), stderr
    with pytest.raises(AssertionError):
        check_same_model(file, model)
    check_same_model(file, adapted.eval())
    code, _, stderr = run_in_process(EXPORT, monkeypatch, capsys, *options)
    assert code == 1 and stderr.endswith(
        f"error: {file} exists; choose another name, or add --overwrite to replace it.\n"
    )


def test_the_script_exports_transformers_gpt2(make_model, tokenizer, monkeypatch, capsys, tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path / "ours")
    tokenizer.save_pretrained(tmp_path / "ours")
    options = ["--model", tmp_path / "ours", "--output", tmp_path / "gpt2"]
    assert run_in_process(EXPORT, monkeypatch, capsys, *options)[:2] == (0, f"{tmp_path / 'gpt2'}\n")
    exported = GPT2LMHeadModel.from_pretrained(tmp_path / "gpt2")
    ids = random_ids(2, 9)
    assert (exported(ids).logits - model(ids).logits).abs().max() < 1e-4
    assert AutoTokenizer.from_pretrained(tmp_path / "gpt2").chat_template == tokenizer.chat_template
    code, _, stderr = run_in_process(EXPORT, monkeypatch, capsys, *options)
    assert code == 1 and "exists; choose another name" in stderr


def test_modelfile(make_model, tokenizer, tmp_path):
    model = make_model()
    model.generation_config.update(temperature=0.5, top_k=20, repetition_penalty=1.1)
    file, modelfile = export_gguf(model, tmp_path / "cat.gguf", tokenizer=tokenizer)
    assert (file.name, modelfile.name) == ("cat.gguf", "cat.Modelfile")
    assert modelfile.read_text() == (
        "FROM ./cat.gguf\n"
        "PARAMETER num_ctx 64\n"
        'PARAMETER stop "<|endoftext|>"\n'
        "PARAMETER temperature 0.5\n"
        "PARAMETER top_k 20\n"
        "PARAMETER repeat_penalty 1.1\n"
        'TEMPLATE """{{ if .System }}{{ .System }}{{ else }}Below is an instruction that describes a task. '
        "Write a response that appropriately completes the request.{{ end }}{{ range .Messages }}"
        '{{ if eq .Role "user" }}\n\n### Instruction:\n{{ .Content }}'
        '{{ else if eq .Role "assistant" }}\n\n### Response:\n{{ .Content }}<|endoftext|>{{ end }}{{ end }}'
        '\n\n### Response:\n"""\n'
    )


@pytest.mark.parametrize(
    ("options", "dtype", "message"),
    [
        ({}, "q5_k", "dtype is 'q5_k'; choose one of f32, f16, q8_0, q4_0."),
        (
            {"activation_function": "relu"},
            "f16",
            "activation_function is 'relu', but llama.cpp's GPT-2 computes gelu_new only.",
        ),
        (
            {"n_embd": 40},
            "q8_0",
            "q8_0 needs widths that are multiples of 32, but the model has 40: choose f16.",
        ),
        (
            {"vocab_size": 289},
            "f16",
            "The tokenizer has 290 tokens but the model only 289; use the tokenizer that the model was trained with.",
        ),
        (
            {"eos_token_id": [1, 2, 3]},
            "f16",
            "generation_config.eos_token_id names 3 tokens, but GGUF only two: keep two.",
        ),
    ],
)
def test_what_llama_cpp_cannot_compute_is_refused(options, dtype, message, make_model, tokenizer, tmp_path):
    with pytest.raises(ValueError) as error:
        export_gguf(make_model(**options), tmp_path / "model.gguf", tokenizer=tokenizer, dtype=dtype)
    assert str(error.value) == message
    assert list(tmp_path.iterdir()) == []


def test_other_tokenizers_and_models_are_refused(make_model, tokenizer, tmp_path):
    other = copy.deepcopy(tokenizer)
    other.backend_tokenizer.pre_tokenizer = Sequence([Digits(), ByteLevel(add_prefix_space=False)])
    with pytest.raises(ValueError, match=r"^The tokenizer is not GPT-2's byte-level BPE without added spaces and"):
        export_gguf(make_model(), tmp_path / "model.gguf", tokenizer=other)
    with pytest.raises(ValueError, match=r"^ScratchGPT2ForSequenceClassification cannot be exported to GGUF"):
        classifier = ScratchGPT2ForSequenceClassification(tiny_config())
        export_gguf(classifier, tmp_path / "model.gguf", tokenizer=tokenizer)
    assert list(tmp_path.iterdir()) == []
