import copy
import json
import math
import re
import runpy
import sys
import unicodedata
from pathlib import Path

import peft
import pytest
import sacrebleu
import torch
from model_fixtures import TINY, fill, tiny_model, twins, write_chain
from transformers import GPT2LMHeadModel
from warm_python import run_two

from scratch_gpt2 import ScratchGPT2Config, ScratchGPT2ForCausalLM, prediction
from scratch_gpt2.data.instructions import as_conversation, encode_prompt
from scratch_gpt2.evaluation.models import load_causal_lm, load_tokenizer_of
from scratch_gpt2.evaluation.progress import ProgressFile
from scratch_gpt2.evaluation.responses import (
    UnicodeWords,
    encode_reference,
    reference_loss,
    reference_metrics,
    short_responses,
)
from scratch_gpt2.prediction import Response, batches_by_length, encode_prompts, respond

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "respond.py"
ROWS = [
    {"instruction": "Where is the rat?", "input": "", "output": "Under the hat."},
    {"instruction": "Where is the cat, and where is the hat that the rat sat on?", "output": "On the mat."},
    {"instruction": "Name it.", "input": "The cat's hat is on the mat.", "output": "A hat."},
    {"prompt": "Hat?", "completion": "The cat sat on the mat, and the rat sat on the hat."},
    {
        "messages": [
            {"role": "user", "content": "Where?"},
            {"role": "assistant", "content": "There."},
            {"role": "user", "content": "Is it?"},
            {"role": "assistant", "content": "It is."},
        ]
    },
]
CONVERSATIONS = [as_conversation(row, f"row {number}") for number, row in enumerate(ROWS, start=1)]
SIZES = TINY | {"vocab_size": 290, "n_positions": 512}


@pytest.fixture(scope="module")
def pair(tiny_tokenizer):
    """transformers' GPT-2 and ours with the same weights, and the tiny tokenizer's end of text."""
    eos = tiny_tokenizer.eos_token_id
    return twins(sizes=SIZES, bos_token_id=eos, eos_token_id=eos, pad_token_id=eos)


@pytest.fixture
def folder(tmp_path, tiny_tokenizer):
    """A model with random weights, its tokenizer and some rows."""
    save(tiny_model(**SIZES, eos_token_id=tiny_tokenizer.eos_token_id), tiny_tokenizer, tmp_path / "model")
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    return tmp_path


def save(model, tokenizer, folder):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def run(folder, *arguments, model="model", output="out.json"):
    sys.argv = ["respond.py", "--model", str(folder / model), "--data", str(folder / "rows.json")]
    sys.argv += ["--output", str(folder / output), *arguments]
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    return json.loads((folder / output).read_text())


@pytest.fixture(autouse=True)
def same_argv(monkeypatch):
    monkeypatch.setattr(sys, "argv", sys.argv)


def run_that_fails(capsys, folder, *arguments, **names):
    with pytest.raises(SystemExit):
        run(folder, *arguments, **names)
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]


def test_metrics_worked_by_hand():
    references = ["the cat sat on a mat", "Yes."]
    responses = ["the cat sat on the mat", " Yes.\n"]
    metrics = reference_metrics(responses, references)
    # Longest common subsequences: 5 of 6 words (the cat sat on mat) in both texts, and 1 of 1.
    assert metrics["rouge_l"] == pytest.approx(100 * (5 / 6 + 1) / 2)
    # n-grams in the references: 5 + 2 of 6 + 2 (the full stop is a word), 3 + 1 of 5 + 1, 2 of 4, 1 of 3.
    assert metrics["bleu"] == pytest.approx(100 * (7 / 8 * 4 / 6 * 2 / 4 * 1 / 3) ** 0.25)
    assert metrics["exact_match"] == 50.0


def test_rouge_l_is_f1_and_bleu_punishes_what_is_short():
    metrics = reference_metrics(["a b c d"], ["a x b x c x d x"])
    assert metrics["rouge_l"] == pytest.approx(100 * 2 * 1 * 0.5 / (1 + 0.5))
    metrics = reference_metrics(["a b c d"], ["a b c d e"])
    assert metrics["bleu"] == pytest.approx(100 * math.exp(1 - 5 / 4))
    assert metrics["exact_match"] == 0.0


def test_empty_responses_score_nothing():
    assert reference_metrics(["", ""], ["a", "b"]) == {"rouge_l": 0.0, "bleu": 0.0, "exact_match": 0.0}
    with pytest.raises(ValueError, match="There are no responses"):
        reference_metrics([], [])


@pytest.mark.parametrize(
    ("language", "text", "words"),
    [
        ("Russian", "Москва — столица России.", ["москва", "столица", "россии"]),
        ("Hindi", "दिल्ली भारत की राजधानी है।", ["दिल्ली", "भारत", "की", "राजधानी", "है"]),
        ("Chinese", "北京是中国的首都。", list("北京是中国的首都")),
        ("Japanese", "東京はカレーが100円。", [*"東京はカレーが", "100", "円"]),
        ("Thai", "น้ำดี", ["น้", "ำ", "ดี"]),
        ("German", "Die Straße für Fußgänger", ["die", "straße", "für", "fußgänger"]),
        ("English", "It's 3.5 B-52_s!", ["it", "s", "3", "5", "b", "52", "s"]),
    ],
)
def test_words_of_all_scripts(language, text, words):
    """rouge_score's own tokenizer finds no word in the first five, and f, r in für."""
    assert UnicodeWords().tokenize(text) == words
    metrics = reference_metrics([text], [text])
    assert (metrics["rouge_l"], metrics["exact_match"]) == (100.0, 100.0)


@pytest.mark.parametrize(
    ("response", "reference", "rouge_l"),
    [
        ("Сидней", "Канберра", 0.0),
        ("fár", "für", 0.0),
        ("Der Hund ist groß", "Der Hund ist klein", 75.0),
        ("Столица — Москва", "Москва — столица", 50.0),
        ("दिल्ली राजधानी है", "दिल्ली भारत की राजधानी है", 100 * 2 * 3 / (3 + 5)),
        ("我喜欢猫", "我喜欢狗和猫", 100 * 2 * 4 / (4 + 6)),
    ],
)
def test_rouge_l_of_wrong_answers_in_other_languages(response, reference, rouge_l):
    assert reference_metrics([response], [reference])["rouge_l"] == pytest.approx(rouge_l)


def test_bleu_of_chinese_counts_characters():
    """The figure is that of sacrebleu's tokenizer for Chinese."""
    responses, references = ["北京是中国的首都。", "我喜欢猫"], ["北京是中国首都。", "我喜欢狗和猫"]
    expected = sacrebleu.corpus_bleu(responses, [references], tokenize="zh").score
    assert reference_metrics(responses, references)["bleu"] == pytest.approx(expected) == pytest.approx(52.9043513)


def test_the_composition_of_characters_does_not_count():
    composed = "Die Straße für Fußgänger"
    decomposed = unicodedata.normalize("NFD", composed)
    assert decomposed != composed
    metrics = reference_metrics([decomposed], [composed])
    assert metrics == {"rouge_l": 100.0, "bleu": pytest.approx(100.0), "exact_match": 100.0}


def test_bleu_needs_four_words():
    """Yes and . are two; a set of short answers has a BLEU of 0 although all of them are right."""
    answers = ["Yes.", "No.", "Canberra"]
    assert reference_metrics(answers, answers) == {"rouge_l": 100.0, "bleu": 0.0, "exact_match": 100.0}
    assert short_responses(answers) == 3
    assert short_responses(["One two three.", "one two three", "北京是中", "北京是"]) == 2


def test_batches_go_from_long_to_short():
    assert batches_by_length([3, 9, 5, 9, 1], 2) == [[1, 3], [2, 0], [4]]
    with pytest.raises(ValueError, match="batch_size is 0 but must be at least 1"):
        batches_by_length([3], 0)


@pytest.mark.parametrize("batch_size", [2, 5])
def test_answers_do_not_depend_on_the_batch(pair, tiny_tokenizer, batch_size):
    prompts = [encode_prompt(tiny_tokenizer, c.prompt) for c in CONVERSATIONS]
    assert len({len(ids) for ids in prompts}) == 5
    expected = [greedy(pair[0], ids, 12, tiny_tokenizer.eos_token_id) for ids in prompts]
    assert len(set(map(tuple, expected))) > 1
    for model in pair:
        for start in range(0, 5, batch_size):
            part = slice(start, start + batch_size)
            answers = respond(model, tiny_tokenizer, prompts[part], max_new_tokens=12, do_sample=False)
            texts = [tiny_tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in expected[part]]
            assert [answer.text for answer in answers] == texts


@torch.no_grad()
def greedy(model, ids, number, eos):
    """The most likely tokens one by one, without padding or cache."""
    ids = list(ids)
    start = len(ids)
    while len(ids) < start + number:
        token = model(torch.tensor([ids])).logits[0, -1].argmax().item()
        if token == eos:
            break
        ids.append(token)
    return ids[start:]


def chain_model(tokenizer, *tokens):
    """After each of `tokens` it writes the next: the embedding of one, normalized, is the head's row of the other."""
    ids = tokenizer.convert_tokens_to_ids(list(tokens))
    model = tiny_model(**SIZES | {"n_embd": 64}, tie_word_embeddings=False)
    write_chain(model, ids)
    return model


def test_an_answer_ends_at_eos_or_is_cut_off(tiny_tokenizer):
    model = chain_model(tiny_tokenizer, "Ċ", "x", "y", tiny_tokenizer.eos_token)
    prompts = [encode_prompt(tiny_tokenizer, c.prompt) for c in CONVERSATIONS[:2]]
    for number, expected in ((8, Response("xy", True)), (3, Response("xy", True)), (2, Response("xy", False))):
        assert respond(model, tiny_tokenizer, prompts, max_new_tokens=number, do_sample=False) == [expected] * 2


def test_other_tokens_that_end_a_turn(tiny_tokenizer):
    model = chain_model(tiny_tokenizer, "Ċ", "x", "y", "z")
    model.generation_config.eos_token_id = [tiny_tokenizer.convert_tokens_to_ids("y"), 5]
    prompts = [encode_prompt(tiny_tokenizer, CONVERSATIONS[0].prompt)]
    assert respond(model, tiny_tokenizer, prompts, max_new_tokens=4, do_sample=False) == [Response("x", True)]


def test_the_loss_of_the_references_is_that_of_each_token_alone(pair, tiny_tokenizer):
    """Against log-probabilities from transformers' logits, row by row without padding."""
    losses = []
    for conversation in CONVERSATIONS:
        row = encode_reference(tiny_tokenizer, conversation)
        with torch.no_grad():
            log_probs = pair[0](torch.tensor([row["input_ids"]])).logits[0].double().log_softmax(-1)
        for position, label in enumerate(row["labels"]):
            if label != -100:
                losses.append(-log_probs[position - 1, label].item())
    for model in pair:
        for batch_size in (1, 2, 5):
            result = reference_loss(model, tiny_tokenizer, CONVERSATIONS, batch_size)
            assert result.tokens == len(losses)
            assert result.loss == pytest.approx(sum(losses) / len(losses), rel=1e-6)
            assert result.perplexity == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
            assert result.too_long == 0


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary(tiny_tokenizer):
    model = ScratchGPT2ForCausalLM(ScratchGPT2Config(**SIZES)).eval()
    for parameter in model.parameters():
        parameter.data.zero_()
    assert reference_loss(model, tiny_tokenizer, CONVERSATIONS).perplexity == pytest.approx(290, rel=1e-5)


def test_the_last_answer_and_its_eos_are_what_is_scored(tiny_tokenizer):
    row = encode_reference(tiny_tokenizer, CONVERSATIONS[4])
    scored = [label for label in row["labels"] if label != -100]
    assert tiny_tokenizer.decode(scored) == "It is.<|endoftext|>"
    assert row["labels"][-len(scored) :] == scored == row["input_ids"][-len(scored) :]


def test_what_a_template_writes_after_eos_is_not_scored(tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role[0] + ':' + m.content + eos_token + '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}a:{% endif %}"
    )
    row = encode_reference(tokenizer, CONVERSATIONS[0])
    assert tokenizer.decode(row["input_ids"]) == "u:Where is the rat?<|endoftext|>\na:Under the hat.<|endoftext|>"
    assert tokenizer.decode([i for i in row["labels"] if i != -100]) == "Under the hat.<|endoftext|>"
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}{{ add_generation_prompt }}"
    with pytest.raises(ValueError, match="row 1: in this chat template the answer does not follow its prompt"):
        encode_reference(tokenizer, CONVERSATIONS[0])


def test_conversations_that_are_too_long_are_counted(pair, tiny_tokenizer):
    short = [c for c in CONVERSATIONS if len(encode_reference(tiny_tokenizer, c)["input_ids"]) <= 150]
    assert 0 < len(short) < 5
    model = tiny_model(**SIZES | {"n_positions": 150})
    result = reference_loss(model, tiny_tokenizer, CONVERSATIONS)
    assert result.too_long == 5 - len(short)
    assert result.loss == pytest.approx(reference_loss(model, tiny_tokenizer, short).loss, rel=1e-6)
    with pytest.raises(ValueError, match="All 5 conversations are longer than the model's 20 positions"):
        reference_loss(tiny_model(**SIZES | {"n_positions": 20}), tiny_tokenizer, CONVERSATIONS)


def test_prompts_that_leave_no_room_are_left_out(tiny_tokenizer):
    lengths = [len(encode_prompt(tiny_tokenizer, c.prompt)) for c in CONVERSATIONS]
    fitting, prompts = encode_prompts(tiny_tokenizer, CONVERSATIONS, longest=sorted(lengths)[2])
    assert fitting == [c for c, length in zip(CONVERSATIONS, lengths, strict=True) if length <= sorted(lengths)[2]]
    assert [len(ids) for ids in prompts] == [length for length in lengths if length <= sorted(lengths)[2]]
    assert encode_prompts(tiny_tokenizer, CONVERSATIONS, longest=None)[0] == CONVERSATIONS
    bad = as_conversation({"instruction": "<|endoftext|>", "output": "a"}, "rows.json, row 7")
    with pytest.raises(ValueError, match="row 7: A chat message must not contain"):
        encode_prompts(tiny_tokenizer, [bad], longest=None)


def test_models_of_every_kind_are_loaded(tmp_path, pair, tiny_tokenizer):
    theirs, ours = pair
    for name, model, targets in (("theirs", theirs, ["c_attn"]), ("ours", ours, ["q_proj"])):
        save(model, tiny_tokenizer, tmp_path / name)
        base = type(model).from_pretrained(tmp_path / name)
        adapted = peft.get_peft_model(base, peft.LoraConfig(target_modules=targets, task_type="CAUSAL_LM", r=2))
        fill(adapted)
        adapted.save_pretrained(tmp_path / f"{name}-lora")
        # What the adapter's folder does not hold is the base's.
        expected = peft.PeftModel.from_pretrained(
            type(model).from_pretrained(tmp_path / name), tmp_path / f"{name}-lora"
        )
        loaded = load_causal_lm(str(tmp_path / f"{name}-lora"))
        assert type(loaded.get_base_model()) is type(model) and not loaded.training
        ids = torch.tensor([[5, 6, 7]])
        with torch.no_grad():
            torch.testing.assert_close(loaded(ids).logits, expected.eval()(ids).logits)
            assert not torch.allclose(loaded(ids).logits, model(ids).logits)
        assert load_tokenizer_of(str(tmp_path / f"{name}-lora")).get_vocab() == tiny_tokenizer.get_vocab()
        answers = respond(loaded, tiny_tokenizer, [[5, 6], [7]], max_new_tokens=3, do_sample=False)
        assert len(answers) == 2
        assert reference_loss(loaded, tiny_tokenizer, CONVERSATIONS).tokens > 0
    assert type(load_causal_lm(str(tmp_path / "theirs"))) is ScratchGPT2ForCausalLM
    assert type(theirs) is GPT2LMHeadModel


def test_script(folder, tiny_tokenizer, capsys):
    model = chain_model(tiny_tokenizer, "Ċ", "A", "Ġhat", ".", tiny_tokenizer.eos_token)
    save(model, tiny_tokenizer, folder / "model")
    answers = run(folder, "--max_new_tokens", "8", "--batch_size", "2")
    out = capsys.readouterr().out.splitlines()
    assert answers == [
        {"instruction": "Where is the rat?", "input": "", "output": "Under the hat.", "response": "A hat."},
        {"instruction": ROWS[1]["instruction"], "input": "", "output": "On the mat.", "response": "A hat."},
        {"instruction": "Name it.", "input": ROWS[2]["input"], "output": "A hat.", "response": "A hat."},
        {"instruction": "Hat?", "input": "", "output": ROWS[3]["completion"], "response": "A hat."},
        {"instruction": "Is it?", "input": "", "output": "It is.", "response": "A hat."},
    ]
    assert out[0] == "5 answers, 5 ended by the model, 0 cut off"
    # F1 of the common words: 1 of 3 and 2, none, 2 of 2, 1 of 13 and 2, none.
    assert out[1] == f"ROUGE-L       {20 * (0.4 + 0 + 1 + 2 / 15 + 0):8.2f}"
    assert out[2].startswith("BLEU ")
    assert out[2].endswith(" of the whole set; 5 answers with fewer than 4 words, which BLEU expects")  # A hat .
    assert out[3] == "exact match      20.00 %"
    assert out[4].startswith("perplexity ") and out[4].endswith(" tokens)")
    assert sorted(file.name for file in folder.iterdir()) == ["model", "out.json", "rows.json"]


def test_script_leaves_out_what_has_no_room(folder, tiny_tokenizer, capsys):
    lengths = sorted(len(encode_prompt(tiny_tokenizer, c.prompt)) for c in CONVERSATIONS)
    room = 512 - lengths[3]
    assert len(run(folder, "--max_new_tokens", str(room))) == 4
    first = capsys.readouterr().out.splitlines()[0]
    assert first == f"1 of 5 prompts leave fewer than {room} of the model's 512 positions for the answer: skipped"
    (error,) = run_that_fails(capsys, folder, "--max_new_tokens", "511", "--overwrite")
    assert error == (
        "error: 5 of 5 prompts leave fewer than 511 of the model's 512 positions for the answer; choose a smaller "
        "--max_new_tokens."
    )


@pytest.mark.parametrize("sampling", [(), ("--temperature", "1.5")])
def test_a_stopped_run_continues(folder, monkeypatch, capsys, sampling):
    options = ("--max_new_tokens", "6", "--batch_size", "2", *sampling)
    expected = run(folder, *options, output="unbroken.json")
    assert len({row["response"] for row in expected}) > 1
    answered = []

    def respond_twice(model, tokenizer, prompts, **options):
        if len(answered) == 2:
            raise KeyboardInterrupt
        answered.append(len(prompts))
        return respond(model, tokenizer, prompts, **options)

    monkeypatch.setattr(prediction, "respond", respond_twice)
    with pytest.raises(SystemExit) as stopped:
        run(folder, *options)
    assert stopped.value.code == 130 and not (folder / "out.json").exists()
    unfinished = folder / "out.json.unfinished.jsonl"
    assert len(unfinished.read_text().splitlines()) == 1 + 4
    with open(unfinished, "a") as file:
        file.write('{"row"')
    answered.clear()
    assert run(folder, *options) == expected
    assert answered == [1] and not unfinished.exists()


def test_a_stopped_run_of_another_model_is_not_continued(folder, tiny_tokenizer, monkeypatch, capsys):
    def stop(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(prediction, "respond", stop)
    with pytest.raises(SystemExit):
        run(folder)
    (error,) = run_that_fails(capsys, folder, "--max_new_tokens", "5")
    assert "out.json.unfinished.jsonl was begun with max_new_tokens 256, not 5; choose another file" in error
    save(fill(tiny_model(**SIZES), seed=1), tiny_tokenizer, folder / "model")
    (error,) = run_that_fails(capsys, folder)
    assert "was begun with weights '" in error


def test_progress_file(tmp_path):
    file = tmp_path / "new" / "progress.jsonl"
    first = ProgressFile(file, {"a": 1})
    assert first.records == []
    first.append([{"row": 1}, {"row": 2}])
    assert file.read_text() == '{"a": 1}\n{"row": 1}\n{"row": 2}\n'
    with open(file, "a") as opened:
        opened.write('{"row": 3')
    again = ProgressFile(file, {"a": 1})
    assert again.records == [{"row": 1}, {"row": 2}]
    again.append([{"row": 3}])
    assert ProgressFile(file, {"a": 1}).records == [{"row": 1}, {"row": 2}, {"row": 3}]
    for text in ('{"a', ""):  # stopped in its first line
        file.write_text(text)
        assert ProgressFile(file, {"a": 1}).records == []
        assert file.read_text() == '{"a": 1}\n'
    for text in ("[1]\n", '{"a": 1}\nno JSON\n', '{"a": 1}\n\xff\n'):
        file.write_bytes(text.encode("latin-1"))
        with pytest.raises(
            ValueError, match="is not the progress file of a stopped run; choose another file or delete this one"
        ):
            ProgressFile(file, {"a": 1})
        assert file.read_bytes() == text.encode("latin-1")


def test_nothing_is_replaced_without_being_told(folder, capsys):
    rows = folder / "rows.json"
    content = rows.read_bytes()
    for overwrite in ((), ("--overwrite",)):
        (error,) = run_that_fails(capsys, folder, *overwrite, output="rows.json")
        assert error == f"error: {rows} is an input of this command and would be replaced; choose another output."
    assert rows.read_bytes() == content
    (folder / "out.json").write_text("[]")
    (error,) = run_that_fails(capsys, folder, "--max_new_tokens", "2")
    assert error == f"error: {folder / 'out.json'} exists; choose another name, or add --overwrite to replace it."
    assert len(run(folder, "--max_new_tokens", "2", "--overwrite")) == 5


def test_an_output_that_cannot_be_written_is_found_before_the_work(folder, capsys, monkeypatch):
    monkeypatch.setattr(prediction, "respond", None)
    (error,) = run_that_fails(capsys, folder, output="rows.json/out.json")
    assert error.endswith("out.json cannot be written (Not a directory); choose another folder.")


def test_a_missing_package_is_found_before_the_work(folder, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "rouge_score", None)
    (error,) = run_that_fails(capsys, folder, model="nothing")
    assert error == "error: Reference metrics need two packages: pip install rouge_score sacrebleu."


def test_several_processes_answer_once(folder):
    options = ("--model", folder / "model", "--data", folder / "rows.json", "--max_new_tokens", "2")
    both = run_two(EXAMPLE, *options, "--output", folder / "out.json")
    assert [done.returncode for done in both] == [0, 0], both
    assert [(done.stdout.count("5 answers,"), done.stdout.count("ROUGE-L")) for done in both] == [(1, 1), (0, 0)]
    assert len(json.loads((folder / "out.json").read_text())) == 5
    assert not (folder / "out.json.unfinished.jsonl").exists()


def test_an_infinite_perplexity_is_a_number(tiny_tokenizer):
    """The head gives token 0 a logit of 4,000 and the others 0: a loss of 4,000, whose exponential is no float."""
    model = tiny_model(**SIZES, tie_word_embeddings=False)
    with torch.no_grad():
        model.model.norm.weight.zero_()
        model.model.norm.bias.fill_(1.0)
        model.lm_head.weight.zero_()
        model.lm_head.weight[0] = 4000 / model.config.n_embd
    loss = reference_loss(model, tiny_tokenizer, CONVERSATIONS)
    assert loss.loss == pytest.approx(4000) and loss.perplexity == math.inf


def test_bad_input(folder, capsys):
    for arguments, expected in (
        (("--batch_size", "0"), "batch_size is 0 but must be at least 1."),
        (("--max_new_tokens", "0"), "max_new_tokens is 0 but must be at least 1."),
        (("--temperature", "-1"), "temperature is -1.0 but must be at least 0."),
    ):
        assert run_that_fails(capsys, folder, *arguments) == [f"error: {expected}"]
    (error,) = run_that_fails(capsys, folder, output="out.jsonl")
    assert error.startswith("error: --output is '") and error.endswith("out.jsonl' but must end with .json.")
    rows = folder / "rows.json"
    rows.write_text('[{"instruction": "a", "output": "b"}, {"instruction": "a"}]')
    (error,) = run_that_fails(capsys, folder)
    assert error.startswith(f"error: {rows}, row 2 has no text in 'output'; its columns are instruction.")
    rows.write_text(json.dumps(ROWS))
    (error,) = run_that_fails(capsys, folder, model="nothing")
    assert error == f"error: {folder / 'nothing'} does not exist; give an existing folder or a Hub id."
    assert sorted(file.name for file in folder.iterdir()) == ["model", "rows.json"]


def longest_common_subsequence(a, b):
    lengths = [0] * (len(b) + 1)
    for word in a:
        above = list(lengths)
        for i, other in enumerate(b):
            lengths[i + 1] = above[i] + 1 if word == other else max(above[i + 1], lengths[i])
    return lengths[-1]


def test_real_rows(shared_data):
    """110 answers that come with the data; 17 of them are the reference, letter by letter."""
    rows = json.loads((shared_data / "instruction-data-with-response.json").read_text())
    responses, references = ([row[name] for row in rows] for name in ("model_response", "output"))
    metrics = reference_metrics(responses, references)
    assert metrics["exact_match"] == pytest.approx(100 * 17 / 110)
    f1 = []
    for texts in zip(responses, references, strict=True):
        a, b = (re.findall(r"[^\W_]+", text.lower()) for text in texts)
        f1.append(2 * longest_common_subsequence(a, b) / (len(a) + len(b)))
    assert metrics["rouge_l"] == pytest.approx(100 * sum(f1) / 110)
