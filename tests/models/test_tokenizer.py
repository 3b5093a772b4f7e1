"""The conventions of tokenizers hold wherever one comes from, and what stands around a prompt and an answer is exact."""

import json
import shutil
import sys

import pytest
import tokenizers

from dplora_jax.errors import InputError
from dplora_jax.models.tokenizer import continuation, load_tokenizer, split
from tests.conftest import GOLDEN, write_tokenizer
from tests.hub_stand_in import run_python
from tests.models.gguf_writing import BYTE_LEVEL, BYTES, SENTENCEPIECE, write

TEMPLATE = "{% for m in messages %}<|pad|>{{ m.role }}:{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}bot:{% endif %}"
END = BYTE_LEVEL["eos_token_id"]
PAD = BYTE_LEVEL["padding_token_id"]


def spelled(text):
    """The ids of ASCII `text` that no merge shortens."""
    return [BYTES.index({" ": "Ġ", "\n": "Ċ"}.get(c, c)) for c in text]


def from_gguf(directory, base=BYTE_LEVEL, template=None, **changes):
    keys = {f"tokenizer.ggml.{key}": value for key, value in (base | changes).items()}
    return load_tokenizer(write(directory / "t.gguf", {}, **keys, **{"tokenizer.chat_template": template}))


def digits(directory, settings, **config):
    """A tokenizer.json that splits digits and can join "12", with `settings` as its tokenizer_config.json."""
    vocabulary = {token: index for index, token in enumerate([*BYTES, "12", "<pad>"])}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [("1", "2")]))
    splits = [tokenizers.pre_tokenizers.Digits(True), tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)]
    made.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(splits)
    directory.mkdir(exist_ok=True)
    made.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def closing(directory):
    """A tokenizer that closes a text as ChatGLM-6B's does, with [gMASK] and its BOS: here <pad> and b."""
    digits(directory, {"pad_token": "<pad>", "eos_token": "12"})
    made = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    pad = made.token_to_id("<pad>")
    made.post_processor = tokenizers.processors.TemplateProcessing("$A <pad> b", None, [("<pad>", pad), ("b", 98)])
    made.save(str(directory / "tokenizer.json"))
    return load_tokenizer(directory)


def refusal(call, *args, **options):
    """The one sentence with which `call` is refused."""
    with pytest.raises(InputError) as caught:
        call(*args, **options)
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert sentence.endswith(".")
    return sentence


def test_it_pads_and_truncates_on_the_right(tmp_path):
    write_tokenizer(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    for sides in ({}, {"padding_side": "left", "truncation_side": "left"}):
        path.write_text(json.dumps(settings | sides))
        tokenizer = load_tokenizer(tmp_path)
        table = tokenizer(["profit rose sharply", "loss"], padding=True)
        assert table["input_ids"] == [[2, 5, 9, 13, 3], [2, 8, 3, 0, 0]]
        assert table["attention_mask"] == [[1] * 5, [1, 1, 1, 0, 0]]
        assert tokenizer("profit rose sharply", truncation=True, max_length=4).input_ids == [2, 5, 9, 3]


def test_a_gguf_file_keeps_the_conventions(tmp_path):
    table = from_gguf(tmp_path)(["abc", "a"], padding=True)
    assert table["input_ids"] == [spelled("abc"), [*spelled("a"), PAD, PAD]]


def test_a_missing_pad_token_is_eos_else_unknown_else_refused(tmp_path):
    assert from_gguf(tmp_path, padding_token_id=None).pad_token_id == END
    none = {"padding_token_id": None, "eos_token_id": None}
    assert from_gguf(tmp_path, unknown_token_id=5, **none).pad_token_id == 5
    assert "has no pad token" in refusal(from_gguf, tmp_path, **none)


def test_no_torch_is_imported(tmp_path):
    write_tokenizer(tmp_path)
    keys = {f"tokenizer.ggml.{key}": value for key, value in BYTE_LEVEL.items()}
    path = write(tmp_path / "t.gguf", {}, **keys)
    code = f"""
    import sys
    from dplora_jax.models.tokenizer import continuation, load_tokenizer, split
    for place in ({str(path)!r}, {str(tmp_path)!r}):
        print(continuation(load_tokenizer(place), "profit")[1])
    print("torch" in sys.modules)
    """
    done = run_python(code, JAX_PLATFORMS="cpu")
    assert done.stdout.split() == ["6", "3", "False"], done.stderr


@pytest.mark.parametrize("name", ["GPT2Tokenizer", "PreTrainedTokenizerFast", "NoSuchTokenizer"])
def test_tokenizer_json_is_taken_as_it_stands(tmp_path, name):
    # SmolLM2 says GPT2Tokenizer, from which transformers would build one that joins digits.
    tokenizer = load_tokenizer(digits(tmp_path, {"tokenizer_class": name, "pad_token": "<pad>"}, model_type="llama"))
    assert tokenizer.tokenize("12") == ["1", "2"]
    assert tokenizer.pad_token == "<pad>"


def test_special_tokens_that_only_the_class_knows_are_kept(tmp_path):
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.pad_token, tokenizer.sep_token, tokenizer.unk_token) == ("[PAD]", "[SEP]", "[UNK]")
    assert tokenizer("profit", "cost").token_type_ids == [0, 0, 0, 1, 1]


def test_a_model_of_unknown_kind_is_read_from_its_tokenizer_json(tmp_path):
    tokenizer = load_tokenizer(digits(tmp_path, {"pad_token": "<pad>"}, model_type="no_such_model"))
    assert tokenizer.tokenize("12") == ["1", "2"]


@pytest.mark.parametrize("file", ["tokenizer_config.json", "config.json"])
def test_a_models_own_code_is_never_run(tmp_path, file):
    (tmp_path / "tokenization_own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    settings = {"auto_map": {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]}, "pad_token": "<pad>"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "chatglm"}))
    (tmp_path / file).write_text(json.dumps(settings | {"tokenizer_class": "OwnTokenizer"}))
    sentence = refusal(load_tokenizer, tmp_path)
    assert "the code tokenization_own.OwnTokenizer" in sentence
    assert "save its tokenizer.json" in sentence
    directory = digits(tmp_path, settings)
    assert load_tokenizer(directory).tokenize("12") == ["1", "2"]
    assert not (tmp_path / "ran").exists()


def test_a_directory_without_tokenizer_is_refused_not_given_an_empty_vocabulary():
    sentence = refusal(load_tokenizer, GOLDEN / "bert_tiny_classifier")
    assert "holds no tokenizer: it has none of" in sentence
    assert "tokenizer.json" in sentence


@pytest.mark.parametrize(
    ("damaged", "words"),
    [("{", "tokenizer.json is not valid JSON"), ('{"version": "1.0"}', "no tokenizer that transformers can read")],
)
def test_a_damaged_tokenizer_is_one_sentence(tmp_path, damaged, words):
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text(damaged)
    assert words in refusal(load_tokenizer, tmp_path)


def test_an_answer_follows_the_prompts_ids_and_ends_with_eos(tmp_path):
    tokenizer = from_gguf(tmp_path)
    prompt, start = continuation(tokenizer, "12")
    assert (prompt, start) == ([256], 1)
    whole, start = continuation(tokenizer, "12", "34")
    # Together "1234" is one token; the prompt's own ids must stay.
    assert (whole, start) == ([256, *spelled("34"), END], 1)
    assert continuation(tokenizer, "", "") == ([END], 0)


@pytest.mark.parametrize(
    ("options", "before"),
    [
        ({}, []),
        ({"add_bos_token": True, "bos_token_id": PAD}, [PAD]),
        ({"add_bos_token": True, "add_eos_token": True, "bos_token_id": PAD}, [PAD]),
        ({"add_eos_token": True}, []),
        ({"add_bos_token": True}, [END]),
    ],
)
def test_bos_stands_first_where_the_tokenizer_adds_it_and_no_eos_ends_a_prompt(tmp_path, options, before):
    tokenizer = from_gguf(tmp_path, **options)
    assert continuation(tokenizer, "ab") == ([*before, *spelled("ab")], len(before) + 2)
    assert continuation(tokenizer, "ab", "c") == ([*before, *spelled("abc"), END], len(before) + 2)
    assert continuation(tokenizer, "ab<|end|>")[0] == [*before, *spelled("ab"), END]


def test_a_sentencepiece_prompt_has_bos(tmp_path):
    tokenizer = from_gguf(tmp_path, SENTENCEPIECE)
    ids, start = continuation(tokenizer, "ab", "ca")
    assert tokenizer.convert_ids_to_tokens(ids) == ["<s>", "▁ab", "▁", "ca", "</s>"]
    assert start == 2


def test_what_a_tokenizer_puts_behind_the_prompt_opens_the_answer(tmp_path):
    tokenizer = closing(tmp_path)
    ids, start = continuation(tokenizer, "a", "c")
    assert (ids, start) == ([97, tokenizer.pad_token_id, 98, 99, tokenizer.eos_token_id], 3)


def test_a_chat_prompt_is_the_template_with_the_opening_of_a_reply(tmp_path):
    tokenizer = from_gguf(tmp_path, template=TEMPLATE, add_bos_token=True)
    expected = [PAD, *spelled("user:hi\nbot:")]
    assert continuation(tokenizer, "hi", chat=True) == (expected, len(expected))
    assert continuation(tokenizer, "hi", "ok", chat=True) == ([*expected, *spelled("ok"), END], len(expected))


def test_what_a_tokenizer_lacks_is_named(tmp_path):
    plain = from_gguf(tmp_path)
    assert "no chat template" in refusal(continuation, plain, "a", chat=True)
    failing = from_gguf(tmp_path, template="{{ raise_exception('only\n systems') }}")
    assert "chat template fails on a user's message (TemplateError)" in refusal(continuation, failing, "a", chat=True)
    endless = from_gguf(tmp_path, eos_token_id=None)
    assert continuation(endless, "a") == (spelled("a"), 1)
    assert "no EOS token" in refusal(continuation, endless, "a", "b")


def test_an_answer_is_split_from_its_prompt_as_one_text_or_apart_where_the_prompt_is_closed(tiny_bert):
    tokenizer = load_tokenizer(tiny_bert)  # [CLS] and [SEP] around every text
    ids, start = split(tokenizer, "profit", " rose again")
    assert tokenizer.convert_ids_to_tokens(ids) == ["[CLS]", "profit", "[SEP]", "rose", "again"]
    assert start == 3


def test_an_answer_without_a_prompt_follows_what_opens_a_reply(tmp_path, tiny_bert):
    ids, start = split(load_tokenizer(tiny_bert), "", "profit rose")
    assert (len(ids), start) == (4, 2)
    assert split(from_gguf(tmp_path), "", "ab") == ([END, *spelled("ab")], 1)  # EOS, where there is no BOS
    assert split(from_gguf(tmp_path, add_bos_token=True, bos_token_id=PAD), "", "ab") == ([PAD, *spelled("ab")], 1)


def test_text_of_a_chatglm_follows_its_opening_tokens_and_counts_itself_alone(tmp_path):
    tokenizer = closing(tmp_path)
    assert split(tokenizer, "", "cd") == ([tokenizer.pad_token_id, 98, 99, 100], 2)
    assert split(tokenizer, "a", "c") == ([97, tokenizer.pad_token_id, 98, 99], 3)


def test_the_tokenizer_pads_to_the_right_without_torch(tiny_bert, tmp_path):
    shutil.copytree(tiny_bert, tmp_path / "left")
    settings = json.loads((tmp_path / "left" / "tokenizer_config.json").read_text()) | {"padding_side": "left"}
    (tmp_path / "left" / "tokenizer_config.json").write_text(json.dumps(settings))
    had_torch = "torch" in sys.modules
    for directory in (tiny_bert, tmp_path / "left"):
        table = load_tokenizer(directory)(["profit rose sharply", "loss"], padding=True)
        assert table["input_ids"] == [[2, 5, 9, 13, 3], [2, 8, 3, 0, 0]]
        assert table["attention_mask"] == [[1] * 5, [1, 1, 1, 0, 0]]
    assert had_torch or "torch" not in sys.modules
