"""The tokenizers of the families that people fine-tune today give the ids of transformers' own classes, here without torch."""

import json

import pytest

from dplora_jax import models
from dplora_jax.errors import InputError
from tests.models.gguf_writing import BYTE_LEVEL, PIECES, TEXTS

SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "<|endoftext|>", "<|padding|>"]
WORDS = {token: index for index, token in enumerate([*SPECIAL, *BYTE_LEVEL["tokens"][:259]])}
MERGES = [tuple(merge.split()) for merge in BYTE_LEVEL["merges"]]
LIKELY = [*((name, 0.0) for name in SPECIAL[:4]), *((p, float(s)) for p, s in PIECES.items()), ("<mask>", 0.0)]
GEMMA = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{b:02X}>" for b in range(256)), *PIECES]
CASES = {  # model_type: transformers' class and what it is made of
    "roberta": ("RobertaTokenizer", {"vocab": WORDS, "merges": MERGES}),
    "gpt_neox": ("GPTNeoXTokenizer", {"vocab": WORDS, "merges": MERGES}),
    "qwen3": ("Qwen2Tokenizer", {"vocab": WORDS, "merges": MERGES}),
    "xlm-roberta": ("XLMRobertaTokenizer", {"vocab": LIKELY}),
    "gemma3_text": (
        "GemmaTokenizer",
        {"vocab": {t: i for i, t in enumerate(GEMMA)}, "merges": [("a", "b"), ("ab", "c")]},
    ),
}


def written(directory, model_type, settings=(), **options):
    """A tokenizer's folder as its class writes it, with `settings` changed in tokenizer_config.json."""
    import transformers

    name, made_of = CASES[model_type]
    getattr(transformers, name)(**made_of, **options).save_pretrained(directory)
    (directory / "config.json").write_text(json.dumps({"model_type": model_type}))
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(settings)))
    return directory


def assert_as_transformers(directory):
    import transformers

    theirs, ours = transformers.AutoTokenizer.from_pretrained(directory), models.load_tokenizer(directory)
    assert [ours(text).input_ids for text in TEXTS] == [theirs(text).input_ids for text in TEXTS]
    assert ours.pad_token is not None


@pytest.mark.parametrize("model_type", CASES)
def test_ids_are_those_of_the_familys_own_class(model_type, tmp_path):
    assert_as_transformers(written(tmp_path, model_type))


@pytest.mark.parametrize("said", [True, False])
@pytest.mark.parametrize("model_type", ["roberta", "gpt_neox"])
def test_a_space_before_a_text_is_as_the_class_sets_it(model_type, said, tmp_path):
    assert_as_transformers(written(tmp_path, model_type, {"add_prefix_space": said}, add_prefix_space=not said))


def test_an_xlm_roberta_whose_files_contradict_each_other_is_refused(tmp_path):
    folder = written(tmp_path, "xlm-roberta", {"add_prefix_space": False})
    with pytest.raises(InputError, match=r"add_prefix_space=False, but tokenizer\.json puts a space"):
        models.load_tokenizer(folder)
