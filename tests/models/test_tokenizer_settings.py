"""Where tokenizer_config.json and tokenizer.json disagree, the ids are those that transformers' own class gives."""

import json

import pytest
import tokenizers
import transformers
from tokenizers import normalizers, pre_tokenizers

from dplora_jax.errors import InputError
from dplora_jax.models import tokenizer_settings
from dplora_jax.models.tokenizer import load_tokenizer

WORDS = [
    "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "loan", "Loan", "uber", "über", "Über", "日", "##本", "##語", "本", "語",
]  # fmt: skip
TEXT = "Loan Über 日本語"


def bert(directory, settings, normalizer=None):
    """A lower-casing BERT tokenizer.json, with `settings` in its tokenizer_config.json."""
    made = tokenizers.Tokenizer(
        tokenizers.models.WordPiece({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]")
    )
    made.normalizer = normalizer or normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    directory.mkdir(exist_ok=True)
    made.save(str(directory / "tokenizer.json"))
    (directory / "config.json").write_text('{"model_type": "bert"}')
    (directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"} | settings))
    return directory


@pytest.mark.parametrize(
    ("settings", "tokens"),
    [
        ({}, "loan uber 日 本 語"),
        ({"do_lower_case": False}, "Loan Über 日 本 語"),  # accents stay with the case
        ({"strip_accents": False}, "loan über 日 本 語"),
        ({"tokenize_chinese_chars": False}, "loan uber 日 ##本 ##語"),
        ({"do_lower_case": False, "strip_accents": True}, "Loan [UNK] 日 本 語"),
    ],
)
def test_berts_options_win_over_tokenizer_json(tmp_path, settings, tokens):
    place = bert(tmp_path, settings)
    ours, theirs = load_tokenizer(place), transformers.AutoTokenizer.from_pretrained(place)
    assert ours.tokenize(TEXT) == theirs.tokenize(TEXT) == tokens.split()
    assert ours(TEXT).input_ids == theirs(TEXT).input_ids


def test_berts_defaults_win_over_a_cased_tokenizer_json(tmp_path):
    place = bert(tmp_path, {}, normalizers.BertNormalizer(lowercase=False, strip_accents=False))
    assert load_tokenizer(place).tokenize(TEXT) == ["loan", "uber", "日", "本", "語"]


def test_a_class_without_options_leaves_tokenizer_json_alone(tmp_path):
    place = bert(tmp_path, {"tokenizer_class": "PreTrainedTokenizerFast", "do_lower_case": False, "pad_token": "[PAD]"})
    assert load_tokenizer(place).tokenize(TEXT) == ["loan", "uber", "日", "本", "語"]


def test_a_normaliser_that_has_no_such_options_is_kept_and_said(tmp_path):
    place = bert(tmp_path, {"do_lower_case": True}, normalizers.NFC())
    with pytest.warns(UserWarning, match="own normaliser is kept"):
        assert load_tokenizer(place).tokenize(TEXT)[0] == "Loan"


def test_a_sentence_model_may_lower_case_before_a_cased_tokenizer(tmp_path):
    place = bert(tmp_path, {"do_lower_case": False})
    (place / "modules.json").write_text("[]")
    for lower, tokens in ((False, "Loan Über"), (True, "loan über")):
        (place / "sentence_bert_config.json").write_text(json.dumps({"do_lower_case": lower}))
        assert load_tokenizer(place).tokenize("Loan Über") == tokens.split()


@pytest.mark.parametrize(
    ("files", "ends"),
    [
        ({}, (3,)),
        ({"config": {"eos_token_id": 4}}, (3, 4)),
        ({"generation_config": {"eos_token_id": [3, 1]}, "config": {"eos_token_id": 4}}, (1, 3)),
        ({"generation_config": {}, "config": {"eos_token_id": 4}}, (3,)),
        ({"generation_config": {"eos_token_id": None}}, (3,)),
        ({"generation_config": {"eos_token_id": ["x", True, -1, 2]}}, (2, 3)),
    ],
)
def test_an_answer_ends_where_the_tokenizer_or_the_generation_config_says(tmp_path, files, ends):
    place = bert(tmp_path, {"eos_token": "[SEP]"})
    for name, document in files.items():
        (place / f"{name}.json").write_text(json.dumps({"model_type": "bert"} | document))
    assert tokenizer_settings.end_ids(load_tokenizer(place)) == ends


@pytest.mark.parametrize(
    "files",
    [
        {"chat_template.jinja": "B{{ messages[0].content }}"},
        {"special_tokens_map.json": '{"eos_token": "[MASK]"}'},
        {"added_tokens.json": '{"new": 15}'},
    ],
)
def test_of_two_files_the_one_that_transformers_reads_counts(tmp_path, files):
    place = bert(tmp_path, {"chat_template": "A{{ messages[0].content }}", "eos_token": "[SEP]"})
    for name, content in files.items():
        (place / name).write_text(content)
    ours, theirs = load_tokenizer(place), transformers.AutoTokenizer.from_pretrained(place)
    assert (ours.chat_template, ours.eos_token, len(ours)) == (theirs.chat_template, theirs.eos_token, len(theirs))
    assert (ours.chat_template, ours.eos_token, len(ours)) != ("A{{ messages[0].content }}", "[SEP]", 15)


BYTES = {token: i for i, token in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), "<|endoftext|>"])}


@pytest.mark.parametrize(("kind", "model_type"), [("GPT2Tokenizer", "gpt2"), ("Qwen2Tokenizer", "qwen2")])
@pytest.mark.parametrize("settings", [{}, {"add_prefix_space": False}, {"add_prefix_space": True}])
@pytest.mark.parametrize("stored", [False, True])
def test_a_space_before_a_text_is_as_the_class_says(tmp_path, kind, model_type, settings, stored):
    made = tokenizers.Tokenizer(tokenizers.models.BPE(BYTES, []))
    split = pre_tokenizers.ByteLevel(add_prefix_space=stored, use_regex=model_type == "gpt2")
    made.pre_tokenizer = split if model_type == "gpt2" else pre_tokenizers.Sequence([pre_tokenizers.Digits(), split])
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind} | settings))
    ours, theirs = load_tokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert ours.tokenize("ab") == theirs.tokenize("ab") == ["Ġ"] * settings.get("add_prefix_space", False) + ["a", "b"]


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("wanted", [None, False, True])
def test_a_llama_tokenizer_that_contradicts_itself_is_refused(tmp_path, stored, wanted):
    made = tokenizers.Tokenizer(tokenizers.models.BPE({"<unk>": 0, "▁": 1, "a": 2}, [], unk_token="<unk>"))
    steps = [normalizers.Prepend("▁")] if stored else []
    made.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    settings = {"tokenizer_class": "LlamaTokenizer", "unk_token": "<unk>", "add_prefix_space": wanted}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    if wanted in (None, stored):
        assert load_tokenizer(tmp_path).tokenize("a") == ["▁"] * stored + ["a"]
    else:
        with pytest.raises(InputError, match=f"add_prefix_space={wanted}"):
            load_tokenizer(tmp_path)
