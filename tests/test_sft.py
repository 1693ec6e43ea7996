"""Instruction tuning: a step however it is divided, the evaluation, answers learned by heart, the script."""

import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from model_fixtures import recorded_figures, tiny_model
from transformers import TrainerState, TrainingArguments
from warm_python import accelerate_launch, run_two

from scratch_gpt2 import ScratchGPT2Config, ScratchGPT2ForCausalLM
from scratch_gpt2.cli import parse_arguments
from scratch_gpt2.data.collators import PackingCollator, PaddingCollator, pack
from scratch_gpt2.data.instructions import encode_conversations, encode_prompt, read_instructions, split
from scratch_gpt2.linear_cross_entropy import IGNORE_INDEX
from scratch_gpt2.tokenization import CHAT_TEMPLATE, train_tokenizer
from scratch_gpt2.training.callbacks import ProgressBar
from scratch_gpt2.training.checkpoints import find_fault
from scratch_gpt2.training.plots import plot_log
from scratch_gpt2.training.start import fit_to_tokenizer, new_model
from scratch_gpt2.training.trainer import LanguageModelTrainer

REPOSITORY = Path(__file__).resolve().parents[1]
SCRIPT = REPOSITORY / "examples" / "sft.py"
PAD = 2


def uneven_rows(sizes):
    """Rows of the given numbers of tokens, of which the last 1, 2, 3, 4, 1, 2, ... are learned."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for number, size in enumerate(sizes):
        ids = torch.randint(3, 61, (size,), generator=generator).tolist()
        learned = 1 + number % 4
        rows.append({"input_ids": ids, "labels": [IGNORE_INDEX] * (size - learned) + ids[-learned:]})
    return rows


def make_trainer(model, folder, rows, collator=PaddingCollator, batch_size=8, accumulation=1, **options):
    settings = {"max_steps": 1, "optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant"}
    settings |= {"logging_steps": 1, "save_strategy": "no", "report_to": [], "use_cpu": True, "disable_tqdm": True}
    settings |= {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulation}
    args = TrainingArguments(str(folder), max_grad_norm=1e9, **settings | options)
    return LanguageModelTrainer(
        model, args, train_dataset=rows, eval_dataset=rows, data_collator=collator(model.config.pad_token_id)
    )


# One step, divided in several ways

ROWS = {
    PaddingCollator: uneven_rows([9, 5, 7, 6, 12, 5, 8, 10]),
    PackingCollator: pack(uneven_rows([9, 5, 7, 6, 12, 5, 8, 10, 11, 6, 7, 7, 5, 5, 9, 8]), length=16),
}


@pytest.mark.parametrize("collator", ROWS, ids=["padded", "packed"])
def test_the_division_of_a_step_changes_nothing(collator, tmp_path):
    """8 rows at once, 2 at a time, 1 at a time: the same loss, gradient norm and update."""
    rows = ROWS[collator]
    assert len(rows) == 8
    assert len({sum(label != IGNORE_INDEX for label in row["labels"]) for row in rows}) > 2
    results = []
    for batch_size, accumulation in ((8, 1), (2, 4), (1, 8)):
        model = tiny_model(eos_token_id=PAD, pad_token_id=PAD)
        before = {name: weight.clone() for name, weight in model.state_dict().items()}
        trainer = make_trainer(model, tmp_path, rows, collator, batch_size, accumulation)
        trainer.train()
        update = {name: weight - before[name] for name, weight in model.state_dict().items()}
        results.append((trainer.state.log_history[0]["loss"], trainer.state.log_history[0]["grad_norm"], update))
    loss, grad_norm, update = results[0]
    assert grad_norm > 0.1
    for other_loss, other_norm, other_update in results[1:]:
        assert other_loss == pytest.approx(loss, rel=1e-5)
        assert other_norm == pytest.approx(grad_norm, rel=1e-5)
        torch.testing.assert_close(other_update, update, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("collator", ROWS, ids=["padded", "packed"])
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_the_evaluation_loss_is_the_mean_over_tokens(batch_size, collator, tmp_path):
    """Against the log-probabilities of each document alone."""
    model = tiny_model(eos_token_id=PAD, pad_token_id=PAD)
    sizes = [9, 5, 7, 6, 12, 5, 8, 10] + [11, 6, 7, 7, 5, 5, 9, 8] * (collator is PackingCollator)
    losses = []
    for document in uneven_rows(sizes):
        logits = model(torch.tensor([document["input_ids"]])).logits[0, :-1]
        losses += F.cross_entropy(logits, torch.tensor(document["labels"][1:]), reduction="none").tolist()
    learned = [loss for loss in losses if loss != 0]
    assert len(learned) == 20 * len(sizes) // 8
    trainer = make_trainer(model, tmp_path, ROWS[collator], collator, per_device_eval_batch_size=batch_size)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(sum(learned) / len(learned), rel=1e-5)


def test_the_evaluation_calls_the_output_layer(tmp_path):
    """A hook on it, such as accelerate's for offloaded weights, acts there too."""
    model = tiny_model(eos_token_id=PAD, pad_token_id=PAD)
    model.lm_head.register_forward_hook(lambda module, args, logits: 0 * logits)
    loss = make_trainer(model, tmp_path, ROWS[PaddingCollator]).evaluate()["eval_loss"]
    assert loss == pytest.approx(math.log(61), rel=1e-6)  # 61 equally likely tokens


# By heart


@pytest.fixture(scope="module")
def eight(shared_data):
    """The first eight instructions of the file and a tokenizer for them."""
    conversations = read_instructions(str(shared_data / "instruction-data.json"), max_rows=8)
    texts = [CHAT_TEMPLATE, *(message["content"] for row in conversations for message in row.messages)]
    return conversations, train_tokenizer(texts, vocab_size=512)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_eight_real_answers_are_learned_by_heart(lora, packed, eight, tmp_path):
    """Every greedy answer is exact, and the next token is the eos that stops it."""
    conversations, tokenizer = eight
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_embd": 64, "n_head": 2, "n_positions": 256, "initializer_range": 0.1}
    model = new_model(ScratchGPT2Config.from_preset("tiny", **sizes), tokenizer)
    fit_to_tokenizer(model, tokenizer)
    if lora:
        adapters = pytest.importorskip("scratch_gpt2.training.adapters", reason="peft is not installed")
        model = adapters.add_lora(model, "CAUSAL_LM", rank=32, alpha=64)
    rows, dropped = encode_conversations(tokenizer, conversations, max_length=256)
    assert dropped == 0
    collator = PackingCollator if packed else PaddingCollator
    rows = pack(rows, 256) if packed else rows
    options = {"max_steps": 120, "optim": "adamw_torch", "learning_rate": 5e-3, "logging_steps": 200}
    make_trainer(model, tmp_path, rows, collator, **options).train()

    model.eval()
    for conversation in conversations:
        prompt = torch.tensor([encode_prompt(tokenizer, conversation.prompt)])
        output = model.generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=100, do_sample=False
        )
        expected = [*tokenizer.encode(conversation.output.strip()), tokenizer.eos_token_id]
        assert output[0, prompt.shape[1] :].tolist() == expected


# The script

OPTIONS = {"--num_train_epochs": 2, "--per_device_train_batch_size": 2, "--gradient_accumulation_steps": 2}
OPTIONS |= {"--learning_rate": 0.01, "--use_cpu": "true", "--disable_tqdm": "true", "--logging_steps": 1}
OPTIONS |= {"--eval_steps": 4, "--save_steps": 4, "--save_total_limit": 9, "--per_device_eval_batch_size": 2}
OPTIONS |= {"--validation": 5 / 26, "--test": 5 / 26, "--samples": 2}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return make_files(tmp_path_factory.mktemp("sft"))


def make_files(folder):
    """A base model whose vocabulary has the words, and 26 rows of different length."""
    folder.mkdir(exist_ok=True)
    words = ["red", "green", "blue", "a grey cloud", "the yellow lemon", "two black crows on a leaf"]
    rows = [
        {"instruction": f"Repeat {n}.", "input": words[n % 6], "output": words[n % 6] * (1 + n % 3)} for n in range(26)
    ]
    (folder / "rows.json").write_text(json.dumps(rows))
    tokenizer = train_tokenizer([CHAT_TEMPLATE, json.dumps(rows)], vocab_size=400)
    tokenizer.save_pretrained(folder / "base")
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_embd": 64, "n_head": 2, "n_positions": 192}  # bitsandbytes quantizes blocks of 64
    new_model(ScratchGPT2Config.from_preset("tiny", **sizes), tokenizer).save_pretrained(folder / "base")
    return {"--data": folder / "rows.json", "--model": folder / "base"}


def command(options, *flags):
    return [str(SCRIPT), *(str(part) for pair in options.items() for part in pair), *flags]


def load_script():
    specification = importlib.util.spec_from_file_location("sft", SCRIPT)
    script = importlib.util.module_from_spec(specification)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "sft", script)  # dataclasses look their module up by its name
        specification.loader.exec_module(script)
    return script


def run_script(options, *flags):
    script = load_script()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", command(options, *flags))
        script.main()


def read_log(folder, key):
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [entry[key] for entry in entries if key in entry]


@pytest.fixture(scope="module")
def full_run(files, tmp_path_factory):
    folder = tmp_path_factory.mktemp("full")
    run_script(files | OPTIONS | {"--output_dir": folder})
    return folder


def test_what_the_script_leaves_can_be_used(full_run):
    names = {path.name for path in full_run.iterdir()}
    assert {"model.safetensors", "tokenizer.json", "chat_template.jinja", "test.json", "log.jsonl"} <= names
    assert (full_run / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert len(read_instructions(str(full_run / "test.json"))) == 5
    tokenizer = transformers.AutoTokenizer.from_pretrained(full_run)
    model = transformers.AutoModelForCausalLM.from_pretrained(full_run)
    assert type(model) is ScratchGPT2ForCausalLM and model.config.use_cache
    assert model.generation_config.eos_token_id == model.generation_config.pad_token_id == tokenizer.eos_token_id
    chat = transformers.pipeline("text-generation", str(full_run))
    answer = chat([{"role": "user", "content": "Repeat 1."}], max_new_tokens=3, return_full_text=False)
    assert isinstance(answer[0]["generated_text"], str | list)


def test_the_record_says_what_the_loss_is_per(full_run, files, tmp_path, capsys):
    assert json.loads((full_run / "run.json").read_text())["loss_per"] == "token of the answers"
    options = OPTIONS | {"--max_steps": 1, "--samples": 0, "--eval_steps": 1, "--save_steps": 1}
    run_script(files | options | {"--output_dir": tmp_path}, "--train_on_prompt")
    assert json.loads((tmp_path / "run.json").read_text())["loss_per"] == "token of prompts and answers"
    assert " per token of prompts and answers, perplexity " in capsys.readouterr().out


def test_the_log(full_run):
    """16 rows, 4 a step, two epochs: 8 steps. The best checkpoint has been loaded before the last evaluation."""
    losses = read_log(full_run, "loss")
    assert len(losses) == 8 and losses[-1] < losses[0]
    *evaluations, final = read_log(full_run, "eval_loss")
    assert len(evaluations) == 2 and final == pytest.approx(min(evaluations), rel=1e-6)
    samples = read_log(full_run, "samples")
    assert len(samples) == 4  # before, two evaluations, the last one
    assert all(sample.count("\n--> ") == 2 and sample.count("(reference: ") == 2 for sample in samples)


def test_texts_of_the_log_are_no_numbers(capsys):
    """Trainer's bar would write `[String too long to display ...]` above the answers."""
    bar, state = ProgressBar(), TrainerState(max_steps=2)
    bar.on_train_begin(None, state, None)
    bar.on_log(None, state, None, logs={"samples": "x" * 200, "epoch": 1.0})
    assert "epoch" not in "".join(capsys.readouterr())
    bar.on_log(None, state, None, logs={"loss": 0.5, "samples": "x" * 200, "epoch": 1.0})
    assert "{'loss': '0.5', 'epoch': '1'}\n" in "".join(capsys.readouterr())
    bar.on_train_end(None, state, None)


@pytest.mark.xdist_group("distributed")
@pytest.mark.parametrize("flags", [(), ("--pack", "--lora")], ids=["padded", "packed_lora"])
def test_two_processes_are_one(flags, files, tmp_path):
    """Four rows a step: two passes of one process, or one pass of each of two. The five validation rows do not go
    evenly into batches of two for two."""
    options = files | OPTIONS | {"--max_steps": 3, "--eval_steps": 3, "--save_steps": 3}
    if "--pack" in flags:
        options |= {"--per_device_train_batch_size": 1, "--gradient_accumulation_steps": 2}
    run_script(options | {"--output_dir": tmp_path / "one"}, *flags)
    together = command(options | {"--output_dir": tmp_path / "two", "--gradient_accumulation_steps": 1}, *flags)
    if "--pack" in flags:
        finished = run_two(*together)
    else:
        finished = [accelerate_launch(REPOSITORY / "examples" / "accelerate" / "ddp.yaml", *together)]
    assert not any(done.returncode for done in finished), [done.stderr[-5000:] for done in finished]
    for key, tolerance in (("loss", 1e-5), ("grad_norm", 1e-4), ("eval_loss", 1e-5)):
        expected = read_log(tmp_path / "one", key)
        assert len(expected) == (2 if key == "eval_loss" else 3)
        assert read_log(tmp_path / "two", key) == pytest.approx(expected, rel=tolerance), key
    assert sum(done.stdout.count("training ") for done in finished) == 1


def test_an_adapter_is_merged_and_resumed(files, tmp_path, capsys):
    pytest.importorskip("peft")
    options = files | OPTIONS | {"--lora_rank": 4, "--dropout": 0.1}
    run_script(options | {"--output_dir": tmp_path / "straight"}, "--lora", "--merge", "--pack")
    checkpoint = tmp_path / "straight" / "checkpoint-4"
    assert find_fault(checkpoint) is None

    merged = ScratchGPT2ForCausalLM.from_pretrained(tmp_path / "straight").eval()
    base = ScratchGPT2ForCausalLM.from_pretrained(files["--model"])
    from peft import PeftModel

    adapted = PeftModel.from_pretrained(base, tmp_path / "straight" / "adapter").eval()
    ids = torch.arange(1, 20).unsqueeze(0)
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, rtol=1e-4, atol=1e-4)
        with adapted.disable_adapter():
            assert (merged(ids).logits - adapted(ids).logits).abs().max() > 1e-2

    (tmp_path / "again").mkdir()
    checkpoint.rename(tmp_path / "again" / "checkpoint-4")
    (tmp_path / "straight" / "identity.json").rename(tmp_path / "again" / "identity.json")
    with pytest.raises(ValueError, match="contains checkpoints of an earlier run; add --resume"):
        run_script(options | {"--output_dir": tmp_path / "again"}, "--lora", "--merge", "--pack")
    again = {"--output_dir": tmp_path / "again"}
    with pytest.raises(
        ValueError, match=r"was trained with other settings \(it holds .* of shape \[4, \d+\]\); resume"
    ):
        run_script(options | again | {"--lora_rank": 8}, "--lora", "--merge", "--pack", "--resume")
    with pytest.raises(ValueError, match=r"was trained with other settings \(adapters\); resume with the same --lora"):
        run_script(files | OPTIONS | again, "--pack", "--resume")
    with pytest.raises(ValueError, match=r"^validation is 0\.3, but the run in .* began with 0\.19"):
        run_script(options | again | {"--validation": 0.3}, "--lora", "--merge", "--pack", "--resume")
    run_script(options | {"--output_dir": tmp_path / "again"}, "--lora", "--merge", "--pack", "--resume")
    assert read_log(tmp_path / "again", "loss") == read_log(tmp_path / "straight", "loss")
    assert "PeftModel" not in capsys.readouterr().out


def test_qlora(files, tmp_path, capsys):
    """The base is really in 4 bits, the adapter learns, and merging gives an ordinary float32 model."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    from scratch_gpt2.training.sft import quantized_base

    base = quantized_base(str(files["--model"]), torch.float32)
    quantized = [name for name, module in base.named_modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
    assert len(quantized) == 2 * 6 and "lm_head" not in quantized
    options = files | OPTIONS | {"--learning_rate": 0.02, "--num_train_epochs": 8}
    for kind in ("lora", "qlora"):
        run_script(options | {"--output_dir": tmp_path / kind}, f"--{kind}", "--merge")
    lora, qlora = (read_log(tmp_path / kind, "loss") for kind in ("lora", "qlora"))
    first, last = sum(qlora[:2]) / 2, sum(qlora[-4:]) / 4  # the tied, frozen embeddings of this base allow no more
    assert last < first - 0.15 and last == pytest.approx(sum(lora[-4:]) / 4, abs=0.1) and qlora != lora
    merged = ScratchGPT2ForCausalLM.from_pretrained(tmp_path / "qlora")
    assert type(merged.model.layers[0].mlp.up_proj) is torch.nn.Linear
    assert merged.model.layers[0].mlp.up_proj.weight.dtype == torch.float32


def test_qlora_without_bitsandbytes(files, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ImportError, match="--qlora needs bitsandbytes: pip install bitsandbytes"):
        run_script(files | OPTIONS | {"--output_dir": tmp_path}, "--qlora")


def test_show_trains_nothing(files, tmp_path, capsys):
    run_script(files | OPTIONS | {"--output_dir": tmp_path / "out", "--show": 2}, "--pack")
    output = capsys.readouterr().out
    assert output.count("<|endoftext|><<<") >= 2 and "\033" not in output  # not a terminal
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten_unasked(full_run, files, tmp_path):
    (tmp_path / "run").mkdir()
    for path in full_run.iterdir():
        if path.is_file():
            (tmp_path / "run" / path.name).write_bytes(path.read_bytes())
    options = (
        files | OPTIONS | {"--output_dir": tmp_path / "run", "--max_steps": 1, "--eval_steps": 1, "--save_steps": 1}
    )
    before = (tmp_path / "run" / "model.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match=r"contains a finished run .*--overwrite_output_dir to replace it"):
        run_script(options)
    for flags in ((), ("--overwrite_output_dir",)):
        for own in ({"--data": tmp_path / "run" / "test.json"}, {"--model": tmp_path / "run"}):
            with pytest.raises(ValueError, match="is an input of this run and would be overwritten"):
                run_script(options | own, *flags)
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == before
    run_script(options, "--overwrite_output_dir", "--lora")
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert "adapter_model.safetensors" in names and "model.safetensors" not in names


def test_the_recipe_follows_the_values_of_options(files, tmp_path):
    script = load_script()
    given = [str(word) for pair in (files | {"--output_dir": tmp_path}).items() for word in pair]

    def parse(*options):
        groups = (script.ModelArguments, script.DataArguments, script.RunArguments, script.InstructionArguments)
        return parse_arguments(*groups, description="", defaults=script.recipe, arguments=[*given, *options])[-1]

    for options in ([], ["--lora", "False"], ["--pack", "0"], ["--smoke=no"]):
        args = parse(*options)
        assert (args.learning_rate, args.per_device_train_batch_size, args.num_train_epochs) == (5e-5, 8, 3)
    assert parse("--lora=True").learning_rate == parse("--qlora", "yes").learning_rate == 3e-4
    assert parse("--pack=1").per_device_train_batch_size == 2
    assert parse("--smoke", "true").num_train_epochs == 15
    assert parse("--lora", "--learning_rate", "0.5").learning_rate == 0.5
    assert str(parse("--merge").hub_strategy.value) == "end"
    assert not parse("--smoke").overwrite_output_dir


def test_smoke_twice(tmp_path, capsys, monkeypatch):
    """Without --output_dir, a second try replaces the first."""
    monkeypatch.chdir(tmp_path)
    quick = {"--max_steps": 1, "--samples": 0}
    run_script(quick, "--smoke", "--use_cpu")
    run_script(quick, "--smoke", "--use_cpu")
    assert (tmp_path / "sft_smoke" / "model.safetensors").is_file()
    with pytest.raises(FileExistsError, match="contains a finished run"):
        run_script(quick | {"--output_dir": tmp_path / "sft_smoke"}, "--smoke", "--use_cpu")


def test_smoke(tmp_path, capsys):
    run_script({"--output_dir": tmp_path / "out"}, "--smoke", "--use_cpu")
    output = capsys.readouterr().out
    assert "--- answers at step 0 ---" in output and "--- answers at step 75 ---" in output
    assert "validation loss" in output and "examples/respond.py" in output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"--data": "MISSING"}, r"missing\.json"),
        ({"--model": "NOTHING"}, r"nothing does not exist; give an existing folder or a Hub id"),
        ({"--max_length": 193}, r"max_length is 193, but the model has 192 positions"),
        ({"--max_length": 5}, r"No answer begins within max_length 5"),
        ({"--max_length": -3}, r"max_length is -3 but must be at least 1"),
        ({"--max_rows": 2}, r"2 rows are too few"),
        ({"--max_rows": 0}, r"max_rows is 0 but must be at least 1"),
        ({"--validation": 0}, r"validation is 0 but must be above 0: its loss tells which checkpoint is the best"),
        ({"--validation": 0.5, "--test": 0.5}, r"validation is 0\.5 and test is 0\.5; .* their sum below 1"),
        ({"--test": -0.1}, r"test is -0\.1; test must be at least 0"),
        ({"--merge": "true"}, r"--merge merges an adapter: add --lora or --qlora"),
        ({"--merge": "true", "--lora": "False"}, r"--merge merges an adapter: add --lora or --qlora"),
        ({"--lora_rank": 16}, r"--lora_rank is for adapters: add --lora or --qlora, or leave it out"),
        ({"--target_modules": "q_proj"}, r"--target_modules is for adapters: add --lora"),
        ({"--lora": "true", "--lora_rank": 0}, r"lora_rank is 0 but must be at least 1"),
        ({"--dropout": 1}, r"dropout is 1 but must be from 0 to below 1"),
        ({"--metric_for_best_model": "accuracy"}, r"metric_for_best_model is 'accuracy'; choose one of loss"),
        ({"--output_dir": "MODEL"}, r"base is an input of this run and would be overwritten"),
        ({"--push_to_hub": "true"}, r"The Hugging Face Hub cannot be pushed to .*hf auth login"),
    ],
)
def test_bad_input(options, message, files, tmp_path):
    paths = {"MISSING": tmp_path / "missing.json", "NOTHING": tmp_path / "nothing", "MODEL": files["--model"]}
    options = {name: paths.get(value, value) for name, value in options.items()}
    with pytest.raises((ValueError, OSError), match=message):
        run_script(files | OPTIONS | {"--output_dir": tmp_path / "out"} | options)
    assert not (tmp_path / "out").exists()


def test_rows_kept_back_are_checked_before_the_training(files, tmp_path):
    conversations = read_instructions(str(files["--data"]))
    *_, test = split(conversations, seed=42, fractions=(16 / 26, 5 / 26, 5 / 26))
    number = int(test[2].origin.rpartition(" ")[2])
    rows = json.loads(files["--data"].read_text())
    rows[number - 1]["output"] = "red<|endoftext|>green"
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    options = files | OPTIONS | {"--output_dir": tmp_path / "out", "--data": tmp_path / "rows.json"}
    with pytest.raises(ValueError, match=rf"rows\.json, row {number}: A chat message must not contain"):
        run_script(options)
    assert not (tmp_path / "out").exists()


def test_curves_without_points_draw_no_warning(tmp_path, recwarn):
    """Of a run that has been evaluated but has not logged a step, there is only a validation loss."""
    plot_log([{"step": 0, "eval_loss": 2.0}], tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert [str(warning.message) for warning in recwarn] == []


def test_the_loss_is_drawn_larger_than_the_rest(tmp_path, monkeypatch):
    drawn = recorded_figures(monkeypatch)
    log = [{"step": n, "loss": 3.0 - n, "learning_rate": 0.1, "grad_norm": 1.0} for n in range(3)]
    plot_log([*log, {"step": 2, "eval_loss": 1.5}], tmp_path / "curves.png")
    areas = {axes.get_title() or axes.get_ylabel(): axes.bbox.width * axes.bbox.height for axes in drawn[0].axes}
    assert list(areas) == ["loss per token (nats)", "learning rate", "gradient norm"]
    assert areas["loss per token (nats)"] > 4 * max(areas["learning rate"], areas["gradient norm"])


def test_data_are_required(tmp_path):
    with pytest.raises(ValueError, match=r"--data is missing: give \.json or \.jsonl files"):
        run_script({"--output_dir": tmp_path / "out", "--use_cpu": "true"})


def test_a_tokenizer_with_more_tokens_than_the_model(tiny_tokenizer):
    with pytest.raises(ValueError, match="The tokenizer has 290 tokens but the model's vocab_size is 61"):
        fit_to_tokenizer(tiny_model(), tiny_tokenizer)
