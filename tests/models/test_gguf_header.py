"""Which types of a GGUF file's tensors are read."""

import contextlib
import errno

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from dplora_jax.errors import StorageError
from dplora_jax.models import gguf_file, safetensors_file
from dplora_jax.models.gguf_header import AS_STORED, TYPES
from tests.models.gguf_writing import write


def test_every_type_that_the_library_decodes_is_read_by_rows(tmp_path):
    read = set(AS_STORED)
    for kind in Type:
        block, size = gguf.GGML_QUANT_SIZES[kind]
        stored = np.random.default_rng(0).integers(0, 256, (4, 512 // block * size), dtype=np.uint8)
        with np.errstate(all="ignore"), contextlib.suppress(NotImplementedError):
            expected = gguf.quants.dequantize(stored, kind)
            read.add(kind)
        if kind in AS_STORED or kind not in read:
            continue
        with gguf_file.GgufCheckpoint(write(tmp_path / "m.gguf", {"output.weight": (stored, kind)})) as checkpoint:
            assert checkpoint.shape("lm_head.weight") == (4, 512)
            np.testing.assert_array_equal(checkpoint.read("lm_head.weight"), expected)
            np.testing.assert_array_equal(checkpoint.read("lm_head.weight", slice(1, 3)), expected[1:3])
    assert read == set(TYPES)


@pytest.mark.parametrize("kind", [Type.Q5_0, Type.Q5_1, Type.TQ1_0, Type.TQ2_0, Type.MXFP4])
def test_what_the_library_quantises_comes_back(tmp_path, kind):
    scale = 0.5 ** np.arange(4)[:, None]
    values = scale * np.random.default_rng(0).choice([-1.0, 0.0, 1.0], (4, 512))  # every type holds these
    stored = gguf.quants.quantize(values.astype(np.float32), kind)
    with gguf_file.GgufCheckpoint(write(tmp_path / "m.gguf", {"output.weight": (stored, kind)})) as checkpoint:
        np.testing.assert_allclose(checkpoint.read("lm_head.weight"), values, atol=0.07)


def test_what_the_machine_refuses_is_not_the_weights_fault(tmp_path, monkeypatch):
    (tmp_path / "model.safetensors").touch()

    def refuse(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(StorageError):
        gguf_file.config(tmp_path / "m.gguf")
    monkeypatch.setattr(safetensors_file.safetensors, "safe_open", refuse)
    with pytest.raises(StorageError):
        safetensors_file.SafetensorsCheckpoint(tmp_path)
