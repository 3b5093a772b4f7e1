"""The safetensors files of a checkpoint's directory, one or sharded, read tensor by tensor under Hugging Face's names."""

import safetensors

from dplora_jax.errors import InputError
from dplora_jax.models.family import read_json

OLD_NAMES = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}  # of the first BERT checkpoints


class SafetensorsCheckpoint:
    """A directory's model*.safetensors, opened together; nothing is read before it is asked for."""

    def __init__(self, directory):
        self.directory = directory
        index = directory / "model.safetensors.index.json"
        names = (
            sorted(set(read_json(index).get("weight_map", {}).values())) if index.exists() else ["model.safetensors"]
        )
        if not index.exists() and not (directory / names[0]).exists():
            pickled = any(directory.glob("pytorch_model*.bin"))
            converted = (
                " (pytorch_model.bin is a pickle, which can run code, and is not read: load it once with transformers and call "
                "save_pretrained, which writes safetensors)"
                if pickled
                else ""
            )
            raise InputError(f"{directory} holds no model.safetensors{converted}.")
        self._files = {}
        for name in names:
            try:
                file = safetensors.safe_open(directory / name, "np")
            except (safetensors.SafetensorError, OSError) as error:
                raise InputError(f"{directory / name} cannot be read ({error}): copy or download it again.") from None
            self._files.update(dict.fromkeys(file.keys(), file))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._files.clear()

    def _find(self, name):
        """The name under which the files hold tensor `name`: as it is, without its model prefix, or in an old spelling."""
        for candidate in (name, name.split(".", 1)[-1]):
            for new, old in (("", ""), *OLD_NAMES.items()):
                spelled = candidate.removesuffix(new) + old if new and candidate.endswith(new) else candidate
                if spelled in self._files:
                    return spelled
        return None

    def has(self, name):
        """Whether a tensor of that Hugging Face name is there."""
        return self._find(name) is not None

    def shape(self, name):
        """The tensor's shape, a tuple; InputError where it is missing."""
        return tuple(self._slice(name).get_shape())

    def read(self, name, rows=slice(None)):
        """The tensor of that name, or the given rows of its first axis, as a numpy array; InputError where it is missing."""
        return self._slice(name)[rows]

    def _slice(self, name):
        found = self._find(name)
        if found is None:
            raise InputError(f"{self.directory}: the checkpoint has no tensor {name}.")
        return self._files[found].get_slice(found)
