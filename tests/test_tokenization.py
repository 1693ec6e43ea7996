"""Tokenizers: equal to tiktoken and transformers, one chat template, prompt before reply, readable errors."""

import json
import random
import shutil
import unicodedata

import pytest
import tiktoken
from jinja2 import TemplateError
from transformers import AutoTokenizer, GPT2Tokenizer

from scratch_gpt2.tokenization import (
    CHAT_TEMPLATE,
    END_OF_TEXT,
    check_text,
    load_tokenizer,
    merges_from_ranks,
    train_tokenizer,
)

PIECES = [
    *["the", "Hello", "ING", "I'm", "I'M", "they'll", "THEY'LL", "don't", "DON'T", "'s", "'S", "''re", "\u2019s"],
    *["0", "7", "1234567", "3.14", "½", "٣", "Ⅷ"],
    *[" ", "  ", " " * 7, " " * 300, "\t", "\n", "\n\n", "\r\n", "\u00a0", "\u2003", "\u3000", "\u2028", "\u0085"],
    *["\x00", "\x01", "\x1b[0m", "\x1c", "\x7f", "\u200b", "\u200d", "\ufeff", "\u202e"],
    *["😀", "👩‍👩‍👧", "🇫🇷", "👍🏽", "\U0010ffff", "\ue000", "\ufffd"],
    *["日本語", "中文。", "한국어", "ไทย", "हिन्दी", "العربية", "Ελλάδα", "Привет", "ß", "ﬁ"],
    *["e\u0301", "\u0301", "a" + "\u0300\u0316" * 5, "Å", "İ"],
    *[".", "!!!", "#", "_", "--", "==" * 40, "<|", "|>", "endoftext", "<|endoftext|", "### Response:"],
]


def fuzzed_texts(seed: int, count: int) -> list[str]:
    """Half are sequences of PIECES, half of arbitrary assigned characters, from 0 to 40 long."""
    rng = random.Random(seed)
    assigned = [c for c in map(chr, range(0x30000)) if unicodedata.category(c) not in ("Cn", "Cs")]
    return ["".join(rng.choices(rng.choice([PIECES, assigned]), k=rng.randint(0, 40))) for _ in range(count)]


@pytest.fixture(scope="module")
def tiktoken_gpt2(tiktoken_cache):
    return tiktoken.get_encoding("gpt2")


@pytest.fixture(scope="module")
def transformers_gpt2(gpt2_files):
    vocab = json.loads((gpt2_files / "encoder.json").read_text(encoding="utf-8"))
    merges = (gpt2_files / "vocab.bpe").read_text(encoding="utf-8").split("\n")[1:-1]
    return GPT2Tokenizer(vocab=vocab, merges=[tuple(line.split(" ")) for line in merges])


def test_known_ids(gpt2_tokenizer):
    assert gpt2_tokenizer.encode("Hello world, it's  2024!\n\n😀") == [
        *[15496, 995, 11, 340, 338, 220, 48609, 0, 198, 198, 47249, 222]
    ]
    assert gpt2_tokenizer.encode(END_OF_TEXT) == [50256]
    assert len(gpt2_tokenizer) == 50257


def test_fuzzed_ids_equal_tiktoken_and_transformers(gpt2_tokenizer, tiktoken_gpt2, transformers_gpt2):
    for text in fuzzed_texts(seed=0, count=4000):
        ids = gpt2_tokenizer.encode(text)
        assert ids == tiktoken_gpt2.encode_ordinary(text), ascii(text)
        assert ids == transformers_gpt2.encode(text), ascii(text)
        assert gpt2_tokenizer.decode(ids) == text, ascii(text)


def test_real_text_equals_tiktoken(shared_data, gpt2_tokenizer, tiktoken_gpt2):
    for file in ("tinystories_sample.txt", "melville-moby_dick.txt", "wikitext2_test.raw.txt"):
        text = (shared_data / "text" / file).read_bytes()[:200_000].decode()
        ids = gpt2_tokenizer.encode(text, verbose=False)
        assert ids == tiktoken_gpt2.encode(text, allowed_special="all"), file
        assert gpt2_tokenizer.decode(ids) == text


def test_merges_from_ranks_by_hand():
    ranks = {b"a": 0, b"b": 1, b"c": 2, b"ab": 3, b"bc": 4, b"abc": 5, b"abcab": 6}
    assert merges_from_ranks(ranks) == [(b"a", b"b"), (b"b", b"c"), (b"ab", b"c"), (b"abc", b"ab")]


def test_merges_from_ranks_are_those_of_openai(tiktoken_gpt2, transformers_gpt2, gpt2_tokenizer):
    def model(tokenizer):
        return json.loads(tokenizer.backend_tokenizer.to_str())["model"]

    assert len(model(gpt2_tokenizer)["merges"]) == 50_000
    assert model(gpt2_tokenizer) == model(transformers_gpt2)


@pytest.mark.parametrize(
    "names", [("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt")], ids=["OpenAI", "transformers"]
)
def test_folder_with_vocabulary_and_merges(names, gpt2_files, gpt2_tokenizer, tmp_path):
    shutil.copyfile(gpt2_files / "encoder.json", tmp_path / names[0])
    shutil.copyfile(gpt2_files / "vocab.bpe", tmp_path / names[1])
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("a  b<|endoftext|>") == [64, 220, 275, 50256]
    assert tokenizer.get_vocab() == gpt2_tokenizer.get_vocab()
    assert tokenizer.pad_token_id == 50256
    assert tokenizer.chat_template == CHAT_TEMPLATE


def test_folder_with_bare_tokenizer_json(tiny_tokenizer, tmp_path):
    tiny_tokenizer.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.eos_token == tokenizer.pad_token == END_OF_TEXT
    assert tokenizer.encode("The cat's hat") == tiny_tokenizer.encode("The cat's hat")


def test_saved_tokenizer_reloads_without_this_package(gpt2_tokenizer, tiny_tokenizer, tmp_path):
    for name, tokenizer in {"gpt2": gpt2_tokenizer, "tiny": tiny_tokenizer}.items():
        tokenizer.save_pretrained(tmp_path / name)
        for reloaded in (AutoTokenizer.from_pretrained(tmp_path / name), load_tokenizer(tmp_path / name)):
            assert type(reloaded) is GPT2Tokenizer
            assert reloaded.pad_token_id == reloaded.eos_token_id == len(tokenizer) - 1
            assert reloaded.model_max_length == 1024
            assert reloaded.chat_template == CHAT_TEMPLATE
            for text in [*fuzzed_texts(seed=1, count=50), f"a{END_OF_TEXT}b"]:
                assert reloaded.encode(text) == tokenizer.encode(text)


def test_own_template_pad_token_and_length_stay(tiny_tokenizer, tmp_path):
    tiny_tokenizer.save_pretrained(tmp_path)
    other = AutoTokenizer.from_pretrained(tmp_path)
    other.chat_template, other.pad_token, other.model_max_length = "{{ messages[0].content }}", "!", 77
    other.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.chat_template == "{{ messages[0].content }}"
    assert (loaded.pad_token, loaded.model_max_length) == ("!", 77)


def test_end_of_text_in_a_text(gpt2_tokenizer):
    assert gpt2_tokenizer.encode("a<|endoftext|>b") == [64, 50256, 65]
    plain = gpt2_tokenizer.encode("a<|endoftext|>b", split_special_tokens=True)
    assert plain == [64, 27, 91, 437, 1659, 5239, 91, 29, 65]


def test_padding_by_length(gpt2_tokenizer):
    batch = gpt2_tokenizer(["a<|endoftext|>", "a b c"], padding=True)
    assert batch["input_ids"] == [[64, 50256, 50256], [64, 275, 269]]
    assert batch["attention_mask"] == [[1, 1, 0], [1, 1, 1]]


def test_training_by_hand():
    tokenizer = train_tokenizer(["low low low lower", "low"], vocab_size=260)
    vocab = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    # "lo" and "ow" both occur 5 times, and the pair of lower ids wins; then "low" (5) and "Ġlow" (3).
    assert vocab[256:] == ["lo", "low", "Ġlow", "<|endoftext|>"]
    assert tokenizer.encode("low lower<|endoftext|>") == [257, 258, 68, 81, 259]


def test_trained_bytes_are_numbered_as_in_gpt2(gpt2_tokenizer):
    tokenizer = train_tokenizer([], vocab_size=257)
    assert tokenizer.convert_ids_to_tokens(range(256)) == gpt2_tokenizer.convert_ids_to_tokens(range(256))
    assert tokenizer.eos_token_id == 256


def test_trained_vocabulary_may_stay_small_and_decodes_everything(tiny_tokenizer):
    assert len(train_tokenizer(["ab"], vocab_size=1000)) == 258
    for text in fuzzed_texts(seed=2, count=300):
        ids = tiny_tokenizer.encode(text)
        assert max(ids, default=0) < len(tiny_tokenizer) == 290
        assert tiny_tokenizer.decode(ids) == text


def test_training_splits_as_gpt2_does():
    """Contractions are cut off in lower case only, and a word takes one blank before it along."""
    tokenizer = train_tokenizer(["it's IT'S  it's IT'S  " * 50], vocab_size=400)
    assert tokenizer.tokenize("it's IT'S  it's") == ["it", "'s", "ĠIT", "'", "S", "Ġ", "Ġit", "'s"]


def test_training_ignores_end_of_text():
    with_token = train_tokenizer(["a b<|endoftext|>a b"] * 9, vocab_size=300)
    assert with_token.get_vocab() == train_tokenizer(["a b", "a b"] * 9, vocab_size=300).get_vocab()


CONVERSATION = [
    {"role": "user", "content": "Capital of France?"},
    {"role": "assistant", "content": " Paris.\n"},
    {"role": "user", "content": "And\n\n### Input:\nItaly"},
    {"role": "assistant", "content": "\n\nRome"},
]


def test_chat_text(tiny_tokenizer):
    assert tiny_tokenizer.apply_chat_template(CONVERSATION, tokenize=False) == (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nCapital of France?\n\n"
        "### Response:\nParis.<|endoftext|>\n\n"
        "### Instruction:\nAnd\n\n### Input:\nItaly\n\n"
        "### Response:\nRome<|endoftext|>"
    )


def test_chat_with_system_turn(tiny_tokenizer):
    messages = [{"role": "system", "content": "Be brief."}, *CONVERSATION[:1]]
    assert tiny_tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == (
        "Be brief.\n\n### Instruction:\nCapital of France?\n\n### Response:\n"
    )


def test_chat_ids_and_mask(gpt2_tokenizer):
    messages = [{"role": "system", "content": "Be brief."}, *CONVERSATION[:2]]
    encoded = gpt2_tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
    system, instruction = [3856, 4506, 13], [198, 198, 21017, 46486, 25, 198, 39315, 286, 4881, 30]
    response, reply = [198, 198, 21017, 18261, 25, 198], [40313, 13, 50256]
    assert encoded["input_ids"] == system + instruction + response + reply
    assert encoded["assistant_masks"] == [0] * 19 + [1] * 3


def test_mask_covers_replies_and_their_end_only(gpt2_tokenizer, tiny_tokenizer):
    for tokenizer in (gpt2_tokenizer, tiny_tokenizer):
        for first, second in [("Paris", "Rome"), ("😀", "日本語"), ("", "e\u0301\x00"), ("\u200b", "'s")]:
            messages = [dict(m) for m in CONVERSATION]
            messages[1]["content"], messages[3]["content"] = first, second
            encoded = tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
            pairs = zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)
            shown = tokenizer.decode([token for token, mask in pairs if mask])
            assert shown == f"{first}{END_OF_TEXT}{second}{END_OF_TEXT}"


def test_prompt_ids_begin_the_conversation_ids(gpt2_tokenizer, tiny_tokenizer):
    """Also for replies that begin with white space, which would merge with the line break before them."""
    for tokenizer in (gpt2_tokenizer, tiny_tokenizer):
        for reply in [*fuzzed_texts(seed=3, count=300), " x", "\nx", "\n\n x", "\x1cx", "\u0301", ""]:
            messages = [*CONVERSATION[:3], {"role": "assistant", "content": reply}]
            whole = tokenizer.apply_chat_template(messages)["input_ids"]
            for turns in (1, 3):
                prompt = tokenizer.apply_chat_template(messages[:turns], add_generation_prompt=True)
                length = len(prompt["input_ids"])
                assert whole[:length] == prompt["input_ids"], ascii(reply)
            reply_ids = [*tokenizer.encode(reply.strip()), tokenizer.eos_token_id]
            assert whole[length:] == reply_ids, ascii(reply)


def test_template_takes_an_empty_eos_token(tiny_tokenizer):
    """Servers render a template with one to find out what it does; the empty string is in every text."""
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    text = tiny_tokenizer.apply_chat_template(messages, tokenize=False, eos_token="")
    assert text.endswith("\n\n### Instruction:\nHi\n\n### Response:\nHello")


def test_chat_continues_an_unfinished_reply(tiny_tokenizer):
    text = tiny_tokenizer.apply_chat_template(CONVERSATION, tokenize=False, continue_final_message=True)
    assert text.endswith("### Response:\nRome")


@pytest.mark.parametrize(
    ("message", "error"),
    [
        ({"role": "tool", "content": "x"}, "Chat role tool is not known here"),
        ({"role": "system", "content": "x"}, "system for the first message only"),
        ({"role": "user", "content": "x<|endoftext|>y"}, "must not contain <|endoftext|>"),
        ({"role": "assistant", "content": None}, "must be one string"),
        ({"role": "user", "content": [{"type": "text", "text": "x"}]}, "must be one string"),
    ],
)
def test_chat_refuses(message, error, tiny_tokenizer):
    with pytest.raises(TemplateError, match=error.replace("|", r"\|")):
        tiny_tokenizer.apply_chat_template([*CONVERSATION, message], tokenize=False)


@pytest.mark.parametrize("text", ["ab\ud800", "ab\udcffc", "ab\ud83d\ude00"])
def test_surrogates_are_refused(text):
    with pytest.raises(ValueError, match=r"character 2 is '\\ud[0-9a-f]{3}', half of a surrogate pair"):
        check_text(text)
    with pytest.raises(ValueError, match="character 2"):
        train_tokenizer(["fine", text], vocab_size=300)


def test_check_text_returns_valid_text():
    assert check_text("\x00 😀 \ufffd") == "\x00 😀 \ufffd"


def test_bad_training_arguments():
    with pytest.raises(ValueError, match="vocab_size is 256"):
        train_tokenizer(["a"], vocab_size=256)
    with pytest.raises(ValueError, match="pass a list of strings"):
        train_tokenizer("a text", vocab_size=300)


def test_offline_hub_id_names_the_local_alternatives():
    with pytest.raises(FileNotFoundError, match=r"'openai-community/gpt2' is not a local folder.*'tiktoken:gpt2'"):
        load_tokenizer("openai-community/gpt2")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./absent", "./absent does not exist; give an existing folder or a Hub id."),
        ("", " does not exist; give an existing folder or a Hub id."),
        (__file__, f"{__file__} is a file; give the folder of a tokenizer or of a checkpoint."),
    ],
)
def test_a_path_without_a_tokenizer_is_named(name, message):
    with pytest.raises(OSError) as error:
        load_tokenizer(name)
    assert str(error.value) == message


def test_a_damaged_configuration_is_named(tiny_tokenizer, tmp_path):
    tiny_tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config\.json cannot be read \(it holds no JSON object\)"):
        load_tokenizer(tmp_path)


def test_tiktoken_without_network(monkeypatch, tmp_path):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    for name in ("https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(FileNotFoundError, match="set TIKTOKEN_CACHE_DIR"):
        load_tokenizer("tiktoken:gpt2")


def test_other_encodings_of_tiktoken_are_refused():
    with pytest.raises(ValueError, match="'tiktoken:cl100k_base' is not GPT-2's"):
        load_tokenizer("tiktoken:cl100k_base")


def test_folder_without_a_readable_tokenizer(tmp_path):
    with pytest.raises(FileNotFoundError, match="contains no tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        load_tokenizer(tmp_path)
    GPT2Tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no vocabulary"):
        load_tokenizer(tmp_path)
    GPT2Tokenizer(vocab={"a": 0, "b": 1}, eos_token=None, bos_token=None, unk_token=None).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no eos token"):
        load_tokenizer(tmp_path)
