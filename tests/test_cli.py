"""The command line: options, configuration files, recipes, help, and how a script ends."""

import dataclasses
import errno
import importlib.util
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
from safetensors import SafetensorError
from transformers import TrainingArguments
from warm_python import run_python

from scratch_gpt2 import command_help
from scratch_gpt2.cli import given_options, parse_arguments, run_main
from scratch_gpt2.training.recipes import ClassificationArguments, InstructionArguments, PretrainingArguments

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def script_dataclasses(name, monkeypatch):
    """The dataclasses of a script's options, from the script itself."""
    specification = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(specification)
    monkeypatch.setitem(sys.modules, name, module)  # dataclasses look their module up by its name
    specification.loader.exec_module(module)
    groups, _ = command_help.script_groups(EXAMPLES / f"{name}.py")
    return [getattr(module, group.__name__) for group in groups]


DESCRIPTION = """Do something.

    python examples/something.py --lora

A paragraph
in two lines:

    python examples/something.py
"""


@dataclass
class Options:
    data: str | None = field(default=None, metadata={"help": "Folder of the data.", "public": True})
    lora: bool = field(default=False, metadata={"help": "Train adapters."})
    cache: bool = field(default=True, metadata={"help": "Keep states."})
    train: Literal["head", "all"] = field(default="head", metadata={"help": "What to train."})
    texts: list[str] = field(default_factory=list, metadata={"help": "Texts."})
    rank: int = field(default=4, metadata={"help": "Rank."})


def recipe_defaults(options):
    return {"learning_rate": 0.25} if options.lora else {"learning_rate": 0.5}


def parse(*arguments, groups=(Options, PretrainingArguments), defaults=recipe_defaults):
    return parse_arguments(*groups, description=DESCRIPTION, defaults=defaults, arguments=list(arguments))


class TestHome:
    def test_a_tilde_in_a_path_is_the_home_folder(self, monkeypatch, tmp_path):
        """`--output=~/x` reaches the script as it is typed; texts keep their tilde."""
        monkeypatch.setenv("HOME", "/home/me")

        @dataclass
        class Paths:
            data: str | None = None
            texts: list[str] = field(default_factory=list)
            prompt: str = ""

        (paths,) = parse("--data=~/a", "--texts", "~/b", "c~", "--prompt=~/d", groups=(Paths,), defaults=None)
        assert (paths.data, paths.texts, paths.prompt) == ("/home/me/a", ["/home/me/b", "c~"], "~/d")
        (tmp_path / "options.yaml").write_text("data: ~/e")
        monkeypatch.setenv("HOME", str(tmp_path))
        (paths,) = parse("--config=~/options.yaml", groups=(Paths,), defaults=None)
        assert paths.data == f"{tmp_path}/e"


class TestParsing:
    @pytest.mark.parametrize(
        ("arguments", "lora"),
        [
            ([], False),
            (["--lora"], True),
            (["--lora=True"], True),
            (["--lora", "yes"], True),
            (["--lora", "1"], True),
            (["--lora", "False"], False),
            (["--lora=false"], False),
            (["--lora", "0"], False),
            (["--lora", "--lora", "no"], False),
        ],
    )
    def test_defaults_follow_the_value_of_an_option_not_its_spelling(self, arguments, lora):
        options, args = parse(*arguments)
        assert options.lora is lora
        assert args.learning_rate == (0.25 if lora else 0.5)

    def test_what_is_given_counts_more_than_the_recipe(self):
        assert parse("--lora", "--learning_rate", "0.125")[1].learning_rate == 0.125
        assert parse("--no_cache")[0].cache is False and parse()[0].cache is True

    def test_given_options_are_known_even_where_they_equal_the_default(self):
        options, args = parse("--rank", "4", "--max_steps", "3")
        assert given_options(options) == {"rank"} and given_options(args) == {"max_steps"}
        assert given_options(Options()) == set()

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--learnig_rate", "1"], "error: --learnig_rate is not an option; did you mean --learning_rate?\n"),
            (["--dataset_name", "x"], "error: --dataset_name is not an option; did you mean --data?\n"),
            (["--zzzz"], "error: --zzzz is not an option; see --help.\n"),
            (["stray"], "error: 'stray' belongs to no option; see --help.\n"),
            (["--rank", "many"], "error: argument --rank: invalid int value: 'many'\n"),
            (["--train", "tail"], "error: argument --train: invalid choice: 'tail' (choose from 'head', 'all')\n"),
        ],
    )
    def test_mistakes_are_one_line_and_exit_code_2(self, arguments, message, capsys):
        with pytest.raises(SystemExit) as end:
            parse(*arguments)
        assert end.value.code == 2
        assert capsys.readouterr().err == message


class TestNamesOfOtherScripts:
    """What run_clm.py, run_classification.py, TRL and litgpt call our options."""

    @pytest.mark.parametrize(
        ("script", "arguments", "expected"),
        [
            (
                "pretrain",
                "--model_name_or_path m --tokenizer_name t --train_file a.txt --block_size 128 --out_dir o",
                {"model": "m", "tokenizer": "t", "data": "a.txt", "block_length": 128, "output_dir": "o"},
            ),
            ("pretrain", "--checkpoint_dir m --max_seq_length 64", {"model": "m", "block_length": 64}),
            ("pretrain", "--max_length 32", {"block_length": 32}),
            (
                "sft",
                "--model_name_or_path m --dataset_name d --max_seq_length 64 --packing --use_peft --lora_r 8",
                {"model": "m", "data": ["d"], "max_length": 64, "pack": True, "lora": True, "lora_rank": 8},
            ),
            ("sft", "--dataset d --lora_target_modules q_proj", {"data": ["d"], "target_modules": ["q_proj"]}),
            ("sft", "--train_file a.json b.json", {"data": ["a.json", "b.json"]}),
            ("classify", "--model_name_or_path m --max_seq_length 64", {"model": "m", "max_length": 64}),
            ("classify", "--model m --tokenizer_name t --lora_r 2", {"tokenizer": "t", "lora_rank": 2}),
        ],
    )
    def test_they_are_ours(self, script, arguments, expected, monkeypatch, tmp_path):
        groups = script_dataclasses(script, monkeypatch)
        parsed = parse_arguments(*groups, description="", arguments=arguments.split())
        assert {name: getattr(g, name) for g in parsed for name in expected if hasattr(g, name)} == expected
        assert set().union(*map(given_options, parsed)) >= expected.keys()

    def test_in_a_file_too(self, monkeypatch, tmp_path):
        (tmp_path / "run.yaml").write_text("model_name_or_path: m\nblock_size: 16\noverwrite: true\n")
        groups = script_dataclasses("pretrain", monkeypatch)
        model_args, data_args, *_, args = parse_arguments(
            *groups, description="", arguments=[str(tmp_path / "run.yaml")]
        )
        assert (model_args.model, data_args.block_length, args.overwrite_output_dir) == ("m", 16, True)

    @pytest.mark.parametrize(
        ("script", "option", "sentence"),
        [
            ("classify", "--train_file", "make a folder from FILE with examples/prepare_classification.py"),
            ("classify", "--dataset_name", "make a folder from it with examples/prepare_classification.py --hub NAME"),
            ("sft", "--max_train_samples", "--max_rows N reads the first N rows, before they are split."),
            ("sft", "--validation_split_percentage", "--validation takes a share, such as 0.05 for 5 percent."),
            ("sft", "--assistant_only_loss", "only the answers are learned unless --train_on_prompt is given."),
            ("sft", "--load_in_4bit", "--qlora trains adapters on weights in 4 bits."),
            (
                "pretrain",
                "--config_name",
                "--preset, --n_layer, --n_embd and --n_head choose the size of a new model.",
            ),
            ("pretrain", "--validation_file", "the validation text is a part of --data, and --eval_tokens says"),
            ("pretrain", "--torch_dtype", "the weights are trained in float32, and --bf16 computes in bfloat16."),
        ],
    )
    def test_what_would_mean_something_else_is_explained(self, script, option, sentence):
        text, code = command_help.answer(str(EXAMPLES / f"{script}.py"), [option, "x"])
        assert code == 2 and text.startswith(f"error: {option} is not an option: {sentence}") and text.count("\n") == 1


class TestConfigFile:
    YAML = "lora: true\nlearning_rate: 5e-4\ntexts: [x, y]\nrank: 8\nreport_to: none\n"

    def test_yaml_alone_and_with_the_command_line_winning(self, tmp_path):
        file = tmp_path / "run.yaml"
        file.write_text(self.YAML)
        options, args = parse(str(file))
        assert (options.lora, options.texts, options.rank) == (True, ["x", "y"], 8)
        assert args.learning_rate == 5e-4 and args.report_to == []
        options, args = parse("--rank", "2", "--config", str(file), "--texts", "z", "--learning_rate", "1")
        assert (options.lora, options.texts, options.rank, args.learning_rate) == (True, ["z"], 2, 1.0)
        assert given_options(options) == {"lora", "texts", "rank"}

    def test_a_value_in_the_file_chooses_the_recipe(self, tmp_path):
        file = tmp_path / "run.json"
        file.write_text('{"lora": true, "eval_steps": null, "lr_scheduler_kwargs": {"min_lr_rate": 0.5}}')
        options, args = parse(str(file))
        assert options.lora and args.learning_rate == 0.25
        assert args.lr_scheduler_kwargs == {"min_lr_rate": 0.5}

    def test_the_file_can_give_what_is_required(self, tmp_path):
        @dataclass
        class Required:
            model: str = field(metadata={"help": "Model."})

        file = tmp_path / "run.yml"
        file.write_text("model: gpt2\n")
        (options,) = parse(str(file), groups=(Required,), defaults=None)
        assert options.model == "gpt2"
        with pytest.raises(SystemExit):
            parse(groups=(Required,), defaults=None)

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("a.yaml", "learnig_rate: 1", r"a.yaml: --learnig_rate is not an option; did you mean --learning_rate\?$"),
            ("a.yaml", "rank: many", r"a.yaml: rank is 'many', which is not a valid int\.$"),
            ("a.yaml", "rank: 2.5", r"a.yaml: rank is 2.5, which is not a valid int\.$"),
            ("a.yaml", "train: tail", r"a.yaml: train is 'tail'; choose from head, all\.$"),
            ("a.yaml", "lora: maybe", r"a.yaml: lora is 'maybe', which is not a valid bool\.$"),
            ("a.yaml", "- lora", r"a.yaml must contain options and their values"),
            ("a.yaml", "a: b: c", r"a.yaml is not a valid configuration file"),
            ("a.json", "{", r"a.json is not a valid configuration file"),
        ],
    )
    def test_mistakes_in_the_file(self, tmp_path, name, content, message):
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=message):
            parse(str(tmp_path / name))

    def test_a_missing_file(self, tmp_path):
        with pytest.raises(OSError, match=r"absent\.yaml"):
            parse("--config", str(tmp_path / "absent.yaml"))


class TestHelp:
    def help(self, capsys, flag):
        with pytest.raises(SystemExit) as end:
            parse(flag)
        assert end.value.code == 0
        return capsys.readouterr().out

    def test_own_options_with_their_defaults_then_the_recipe_then_the_examples(self, capsys, monkeypatch):
        monkeypatch.setenv("COLUMNS", "110")
        text = self.help(capsys, "--help")
        assert "Do something.\n\nA paragraph in two lines:\n\n    python examples/something.py\n\noptions:\n" in text
        assert "\n  --lora                    Train adapters. (default: false)\n" in text
        assert "\n  --train                   What to train. One of head, all. (default: head)\n" in text
        assert "--config                  YAML or JSON file of options; the command line overrides it." in text
        assert text.endswith("examples:\n    python examples/something.py --lora\n")
        order = [text.index(part) for part in ("--data", "--learning_rate 0.0006", "--weight_decay 0.1", "examples:")]
        assert order == sorted(order)
        assert "--fsdp_config" not in text and len(text.splitlines()) < 60

    def test_everything(self, capsys):
        text = self.help(capsys, "--help-all")
        for name in [entry.name for entry in dataclasses.fields(TrainingArguments)]:
            assert f"--{name}" in text
        assert "The initial learning rate for the optimizer. (default: 0.0006)" in " ".join(text.split())


class TestRecipes:
    def test_pretraining_is_gpt3s_recipe(self, tmp_path):
        args = PretrainingArguments(tmp_path)
        assert (args.max_steps, args.learning_rate, args.weight_decay) == (19_073, 6e-4, 0.1)
        assert (args.adam_beta1, args.adam_beta2, args.max_grad_norm) == (0.9, 0.95, 1.0)
        assert args.lr_scheduler_kwargs == {"min_lr_rate": 0.1} and args.get_warmup_steps(19_073) == 715

    @pytest.mark.parametrize(
        ("arguments", "expected"),
        [
            ([], ("adamw", 6e-4)),
            (["--recipe", "gpt3"], ("adamw", 6e-4)),
            (["--recipe", "muon"], ("muon", 4e-3)),
            (["--recipe", "muon", "--learning_rate", "0.25"], ("muon", 0.25)),
            (["--recipe", "muon", "--optimizer", "adamw"], ("adamw", 4e-3)),
            (["--recipe", "muon", "--smoke"], ("muon", 3e-3)),
        ],
    )
    def test_recipes_of_pretraining(self, arguments, expected, tmp_path, monkeypatch):
        groups = script_dataclasses("pretrain", monkeypatch)
        arguments = [*arguments, "--output_dir", str(tmp_path)]
        _, _, run, args = parse_arguments(
            *groups, description="", defaults=sys.modules["pretrain"].recipe_defaults, arguments=arguments
        )
        assert (run.optimizer, args.learning_rate) == expected

    def test_epochs_replace_the_steps_of_pretraining(self, tmp_path):
        args = PretrainingArguments(tmp_path, num_train_epochs=2)
        assert (args.max_steps, args.num_train_epochs) == (-1, 2)
        assert PretrainingArguments(tmp_path, max_steps=-1).num_train_epochs == 3.0
        with pytest.raises(ValueError, match=r"^max_steps is 5 and num_train_epochs is 2; give one of them\.$"):
            PretrainingArguments(tmp_path, max_steps=5, num_train_epochs=2)

    def test_a_copy_is_the_same_run(self, tmp_path):
        args = dataclasses.replace(PretrainingArguments(tmp_path, seed=3), learning_rate=1e-3)
        assert (args.max_steps, args.seed, args.learning_rate) == (19_073, 3, 1e-3)

    def test_only_the_default_schedule_gets_its_floor(self, tmp_path):
        assert PretrainingArguments(tmp_path, lr_scheduler_type="linear").lr_scheduler_kwargs is None

    def test_classification_and_instructions(self, tmp_path):
        args = ClassificationArguments(tmp_path)
        assert (args.num_train_epochs, args.learning_rate, args.per_device_eval_batch_size) == (5, 5e-4, 32)
        assert args.load_best_model_at_end and args.save_strategy == "epoch" and not args.prediction_loss_only
        args = InstructionArguments(tmp_path)
        assert (args.num_train_epochs, args.learning_rate, args.gradient_accumulation_steps) == (3, 5e-5, 4)
        assert args.label_names == ["labels"] and args.load_best_model_at_end

    @pytest.mark.parametrize("recipe", [PretrainingArguments, ClassificationArguments, InstructionArguments])
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"num_train_epochs": -2}, "num_train_epochs is -2 but must be above 0"),
            ({"num_train_epochs": 0}, "num_train_epochs is 0 but must be above 0"),
            ({"num_train_epochs": float("nan")}, "num_train_epochs is nan but must be above 0"),
            ({"max_steps": 0}, "max_steps is 0 but must be at least 1"),
            ({"max_steps": -5}, "max_steps is -5 but must be at least 1"),
            ({"per_device_train_batch_size": 0}, "per_device_train_batch_size is 0 but must be at least 1"),
            ({"per_device_eval_batch_size": 0}, "per_device_eval_batch_size is 0 but must be at least 1"),
            ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps is 0 but must be at least 1"),
            ({"learning_rate": float("nan")}, "learning_rate is nan but must be a finite number"),
            ({"learning_rate": -1e-3}, "learning_rate is -0.001 but must be a finite number, at least 0"),
            ({"weight_decay": -0.1}, "weight_decay is -0.1 but must be"),
            ({"label_smoothing_factor": 1.0}, r"label_smoothing_factor is 1.0 but must be in \[0, 1\)"),
        ],
    )
    def test_values_that_train_nothing_are_refused(self, recipe, options, message, tmp_path):
        with pytest.raises(ValueError, match=message):
            recipe(tmp_path, **options)


class TestEnds:
    def test_a_console_without_unicode_ends_no_run(self):
        code = "import sys\nfrom scratch_gpt2.cli import run_main\nfor encoding in ('ascii', 'cp1252'):\n"
        code += "    sys.stdout.reconfigure(encoding=encoding, errors='strict')\n"
        code += "    run_main(lambda: print('zażółć 猫'))\n    print('end')\n"
        done = run_python(code)
        assert done.returncode == 0, done.stderr
        assert [line[-2:] for line in done.stdout.splitlines()] == [" ?", "nd"] * 2

    def test_a_closed_standard_output_ends_silently(self):
        code = "from scratch_gpt2.cli import run_main\nrun_main(lambda: [print('line') for _ in range(100_000)])"
        command = f"{sys.executable} -c '{code.replace(chr(39), chr(34))}' | head -1; echo ${{PIPESTATUS[0]}}"
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
        assert done.stdout == "line\n141\n"
        assert "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr

    @pytest.mark.parametrize(
        "error",
        [
            OSError(errno.ENOSPC, "No space left on device"),
            SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
            RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 61370752 vs 61370644"),
        ],
        ids=lambda error: type(error).__name__,
    )
    def test_a_full_disk_ends_in_a_sentence(self, error, capsys):
        def main():
            raise error

        with pytest.raises(SystemExit, match="1"):
            run_main(main)
        sentence = "error: there is no space left on the disk; free some, and run the command again ("
        assert capsys.readouterr().err.startswith(sentence)

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("missing.txt", "missing.txt does not exist; check the path."),
            (".", " is a folder; give a file."),
            ("file.txt/x", "file.txt/x is inside a file, not a folder; check the path."),
        ],
    )
    def test_a_file_that_cannot_be_opened_ends_in_a_sentence(self, name, message, tmp_path, capsys):
        (tmp_path / "file.txt").touch()
        with pytest.raises(SystemExit, match="1"):
            run_main((tmp_path / name).read_text)
        said = capsys.readouterr().err
        assert said.startswith(f"error: {tmp_path}")
        assert said.endswith(f"{message}\n")

    def test_bugs_keep_their_traceback(self):
        with pytest.raises(ZeroDivisionError):
            run_main(lambda: 1 / 0)


SCRIPTS = sorted(path for path in EXAMPLES.glob("*.py") if not path.name.startswith("_"))


class TestAnswersBeforeTheImports:
    """What examples/_quick.py answers from a script's source is what the script would answer."""

    @pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
    def test_every_script_has_its_dataclasses_and_description(self, script, monkeypatch):
        real = script_dataclasses(script.stem, monkeypatch)
        groups, description = command_help.script_groups(script)
        assert description == sys.modules[script.stem].__doc__
        assert command_help.format_help("s", description, groups) == command_help.format_help("s", description, real)
        assert "examples:\n    " in command_help.format_help("s", description, groups)

    @pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
    def test_no_script_imports_torch_to_answer(self, script):
        code = "import runpy, sys\ntry:\n    runpy.run_path(sys.argv[1], run_name='__main__')\n"
        code += "finally:\n    assert not {'torch', 'transformers'} & sys.modules.keys()"
        for argument, exit_code in (("--help", 0), ("--no_such_option", 2)):
            command = [sys.executable, "-c", code, str(script), argument]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == exit_code and "AssertionError" not in done.stderr
            assert (done.stdout if argument == "--help" else done.stderr).startswith(("usage: ", "error: --no_such"))

    def test_a_mistyped_option_of_training_arguments(self):
        script = str(EXAMPLES / "pretrain.py")
        text = "error: --learnig_rate is not an option; did you mean --learning_rate?\n"
        assert command_help.answer(script, ["--learnig_rate", "1"]) == (text, 2)
        for known in (
            ["--learning_rate", "1"],
            ["--learning-rate=1"],
            ["--no_bf16"],
            ["--help-all"],
            ["a.yaml"],
            ["-5"],
        ):
            assert command_help.answer(script, known) is None
