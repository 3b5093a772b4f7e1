"""A model's folder made by an enemy: it reads nothing outside itself, and every damage is one sentence."""

import json
import math
import struct

import numpy as np
import pytest
import safetensors.numpy

from dplora_jax import models
from dplora_jax.errors import InputError
from dplora_jax.models import hf_checkpoint, parameters, pretrained, safetensors_file, sentence
from experiments.plan import models as plan_models
from tests.conftest import GOLDEN, write_tokenizer
from tests.models.checkpoints import CONFIG, TENSORS, write


def refusal(call, *args):
    """The one sentence with which `call` is refused."""
    with pytest.raises(InputError) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def outside(tmp_path):
    """A folder with private weights, beside a model's folder without any."""
    write(tmp_path / "private")
    write(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    return tmp_path / "private" / "model.safetensors"


@pytest.mark.parametrize("name", ["../private/model.safetensors", "{absolute}", "sub/../../private/model.safetensors"])
def test_an_index_reads_no_weights_elsewhere(outside, tmp_path, name):
    named = name.format(absolute=outside)
    (tmp_path / "model" / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict.fromkeys(TENSORS, named)})
    )
    for call in (models.from_pretrained, models.file_digests):
        assert "only a plain name" in refusal(call, tmp_path / "model")


def test_a_link_reads_no_weights_elsewhere(outside, tmp_path):
    (tmp_path / "model" / "model.safetensors").symlink_to(outside)
    for call in (models.from_pretrained, models.file_digests):
        assert "is a link" in refusal(call, tmp_path / "model")


@pytest.mark.parametrize("name", ["config.json", "modules.json", "model.safetensors.index.json"])
def test_a_link_reads_no_document_elsewhere(tmp_path, name):
    folder = write(tmp_path / "model")
    (tmp_path / "private.json").write_text("{}")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to("../private.json")
    assert "is a link" in refusal(models.from_pretrained, folder)


def test_a_plan_reads_nothing_elsewhere(tmp_path):
    folder = write(tmp_path / "model")
    (tmp_path / "private.json").write_text('{"model_type": "bert"}')
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("../private.json")
    assert "is a link" in refusal(plan_models.default_task, folder)


def modules(directory, *listed):
    (directory / "modules.json").write_text(json.dumps(listed))
    return directory


@pytest.mark.parametrize("path", ["../private", "{absolute}", "linked", "", ".", None, 5, "1_Pooling\n"])
def test_a_sentence_models_module_lies_in_its_folder(tmp_path, path):
    private = tmp_path / "private"
    private.mkdir()
    (private / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    folder = write(tmp_path / "model")
    (folder / "linked").symlink_to(private)
    path = path.format(absolute=private) if isinstance(path, str) else path
    refusal(sentence.pooling, modules(folder, {"type": "a.Pooling", "path": path}))


@pytest.mark.parametrize("module", [{}, [], 5, {"type": 5}, {"type": None, "path": "1_Pooling"}, {"type": "a.Pooling"}])
def test_a_module_of_another_kind_is_one_sentence(tmp_path, module):
    refusal(sentence.pooling, modules(tmp_path, module))


@pytest.mark.parametrize("placed", [None, [], 5, "x", {}, {"a": 5}, {"a": ["b"]}, {"a": None}])
def test_a_weight_map_of_another_kind_is_one_sentence(tmp_path, placed):
    (write(tmp_path) / "model.safetensors").unlink()
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": placed}))
    assert "weight_map must name" in refusal(safetensors_file.weight_files, tmp_path)


WRONG = (5, "x", [], {}, [1], {"a": 1}, True, -1, 0.5, math.nan, math.inf, 10**400, 2**31, [None], {"factor": 10**400})


@pytest.mark.parametrize(
    "family",
    [
        *("bert_tiny_classifier", "gpt2_tiny", "variants/qwen2", "chatglm_tiny", "chatglm2_tiny"),
        *(f"families/{name}" for name in ("roberta_mlm", "distilbert_mlm", "modernbert_mlm", "qwen3_window", "gemma2")),
        *(f"families/{name}" for name in ("gemma3", "gpt_neox", "phi3_long", "olmo3", "llama_yarn")),
    ],
)
def test_a_value_of_another_kind_is_one_sentence_or_harmless(family):
    with safetensors_file.SafetensorsCheckpoint(GOLDEN / family) as checkpoint:
        hf, refused = json.loads((GOLDEN / family / "config.json").read_text()), 0
        for name in hf:
            for value in WRONG:
                try:
                    document = hf | {name: value}
                    pretrained.check_kinds(document)
                    pretrained.build(document, checkpoint, None, np.float32)
                except InputError:
                    refused += 1
    assert refused > len(WRONG)


@pytest.mark.parametrize("value", [5, "BertForSequenceClassification", [5], [["a"]], {"a": 1}])
def test_a_config_is_checked_before_any_of_it_is_used(tmp_path, value):
    assert "architectures" in refusal(models.from_pretrained, write(tmp_path, architectures=value))
    assert "id2label" in refusal(models.from_pretrained, write(tmp_path, id2label=[value]))
    assert "num_labels" in refusal(models.from_pretrained, write(tmp_path, id2label=None, num_labels=2**60))


@pytest.mark.parametrize("name", ["num_hidden_layers", "hidden_size", "vocab_size", "intermediate_size"])
def test_no_memory_is_taken_for_what_config_alone_says_is_there(tmp_path, monkeypatch, name):
    monkeypatch.setattr(parameters, "_aligned_empty", None)
    assert "tensor" in refusal(models.from_pretrained, write(tmp_path, **{name: 12 * 2**18, "num_attention_heads": 12}))


def test_a_number_of_layers_is_one_sentence_where_it_lacks(tmp_path):
    for value in (None, "x", 2**40):
        assert "must be a whole number" in refusal(
            pretrained.depth, write(tmp_path, num_hidden_layers=value, n_layer=None)
        )


def header(text):
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize(
    "content",
    [struct.pack("<Q", 2**60) + b"{}", struct.pack("<Q", 2**63), header(b"[" * 100_000), header(b'{"a":' * 100_000),
     header(b"\xff"),
     header(b'{"a": {"dtype": "F32", "shape": [4611686018427387904, 4], "data_offsets": [0, 0]}}'), header(b'{"a": 5}')],
)  # fmt: skip
def test_a_hostile_header_of_weights_is_one_sentence(tmp_path, content):
    (write(tmp_path) / "model.safetensors").write_bytes(content)
    refusal(models.from_pretrained, tmp_path)


@pytest.mark.parametrize("shape", [(0, 4611686018427387904), (2**40, 0), ()])
def test_a_head_that_claims_any_number_of_labels_is_one_sentence(tmp_path, shape):
    tensors = {name: value for name, value in TENSORS.items() if name != "classifier.weight"}
    safetensors.numpy.save_file(tensors, write(tmp_path) / "model.safetensors")
    whole = (tmp_path / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    said = json.loads(whole[8 : 8 + length]) | {
        "classifier.weight": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}
    }
    if not shape:
        said["classifier.weight"]["data_offsets"] = [len(whole) - 8 - length, len(whole) - 4 - length]
    (tmp_path / "model.safetensors").write_bytes(
        header(json.dumps(said).encode()) + whole[8 + length :] + bytes(4 * (not shape))
    )
    with pytest.raises(InputError, match="not a classifier's head"):
        models.from_pretrained(tmp_path, label_names=("a", "b"))


def test_a_pipe_in_place_of_weights_is_not_waited_for(tmp_path):
    import os

    (write(tmp_path) / "model.safetensors").unlink()
    os.mkfifo(tmp_path / "model.safetensors")
    assert "is not a file" in refusal(models.from_pretrained, tmp_path)


SECRETS = "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nhunter2\n"


@pytest.fixture
def secret_vocabulary(tmp_path):
    (tmp_path / "id_rsa").write_text(SECRETS)
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder, tmp_path / "id_rsa"


@pytest.mark.parametrize("settings", ["tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("option", ["vocab", "vocab_file", "tokenizer_file", "gguf_file", "name_or_path"])
def test_a_tokenizers_settings_name_no_file(secret_vocabulary, settings, option):
    folder, secret = secret_vocabulary
    said = {"tokenizer_class": "BertTokenizer", "pad_token": "[PAD]", "unk_token": "[UNK]"}
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    (folder / settings).write_text(json.dumps(said | {option: str(secret)}))
    assert "holds no tokenizer" in refusal(models.load_tokenizer, folder)
    (folder / "vocab.txt").write_text(SECRETS.replace("hunter2", "profit"))
    words = models.load_tokenizer(folder).get_vocab()
    assert "profit" in words
    assert "hunter2" not in words


def test_a_tokenizers_class_gets_no_arguments_from_its_settings(secret_vocabulary):
    folder, secret = secret_vocabulary
    said = {
        "tokenizer_class": "BertTokenizer",
        "init_inputs": [str(secret)],
        "fast_tokenizer_files": ["tokenizer.../../id_rsa"],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    assert "holds no tokenizer" in refusal(models.load_tokenizer, folder)


@pytest.mark.parametrize("name", ["vocab.txt", "tokenizer.json", "chat_template.jinja", "special_tokens_map.json"])
def test_a_tokenizers_file_is_no_link(secret_vocabulary, name):
    folder, secret = secret_vocabulary
    write_tokenizer(folder)
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(secret)
    assert "is a link" in refusal(models.load_tokenizer, folder)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "config.json"])
@pytest.mark.parametrize(
    "content", [b"[" * 100_000, b'{"a":' * 100_000, b"\xff\xfe", b"[]", b'{"a": ' + b"9" * 5000 + b"}"]
)
def test_a_tokenizers_malformed_document_is_one_sentence(tmp_path, name, content):
    (tmp_path / "config.json").write_text("{}")
    write_tokenizer(tmp_path)
    (tmp_path / name).write_bytes(content)
    assert name in refusal(models.load_tokenizer, tmp_path)


def test_an_export_copies_no_file_that_it_does_not_know(tmp_path):
    source, out = write(tmp_path / "model"), tmp_path / "out"
    out.mkdir()
    write_tokenizer(source)
    for name in (
        "tokenizer_notes",
        "vocab.private",
        "customers.model",
        "LICENSE_KEY",
        "chat_template_log",
        "NOTICE.key",
    ):
        (source / name).write_text("TOP SECRET")
    hf_checkpoint.copy_side_files(source, out)
    assert {path.name for path in out.iterdir()} == {"tokenizer.json", "tokenizer_config.json"}


@pytest.mark.parametrize("name", ["LICENSE", "tokenizer.json", "generation_config.json"])
def test_an_export_copies_nothing_from_elsewhere(tmp_path, name):
    source, out = write(tmp_path / "model"), tmp_path / "out"
    out.mkdir()
    (tmp_path / "id_rsa").write_text("TOP SECRET")
    (source / name).symlink_to("../id_rsa")
    assert "is a link" in refusal(hf_checkpoint.copy_side_files, source, out)
    assert not list(out.iterdir())
