"""The safetensors files of a checkpoint's directory, one or sharded, read tensor by tensor under Hugging Face's names."""

import re
import warnings

import safetensors

from dplora_jax.errors import InputError, storage
from dplora_jax.files import find, inside, read_json

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOATS = ("F64", "F32", "F16", "BF16")
# Tensors that a model may leave unread: another task's head, and constants that some versions of a library saved along.
IDLE = re.compile(
    r"(.*\.)?((cls|pooler|lm_head|score|classifier|output_layer|qa_outputs)\..+|inv_freq|position_ids|attn\.(masked_)?bias)"
)
OLD_NAMES = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}  # of the first BERT checkpoints


def weight_files(directory):
    """The names of the files in `directory` that hold its tensors; none where it has none. InputError on a damaged index."""
    index = find(directory, INDEX)
    if find(directory, WHOLE):  # transformers reads it whatever an index beside it says
        if index is not None:
            warnings.warn(f"{directory} holds both {WHOLE}, which is read, and {INDEX}, which is not.", stacklevel=2)
        return [WHOLE]
    if index is None:
        return []
    placed = read_json(index).get("weight_map")
    if not isinstance(placed, dict) or not placed or not all(isinstance(name, str) for name in placed.values()):
        raise InputError(f"{index}: weight_map must name the file of each tensor: copy or download it again.")
    return sorted(set(placed.values()))


class SafetensorsCheckpoint:
    """A directory's model*.safetensors, opened together; nothing is read before it is asked for."""

    def __init__(self, directory):
        self.directory = directory
        names = weight_files(directory)
        if not names:
            raise InputError(
                f"{directory} holds no model.safetensors (a pytorch_model.bin is a pickle, which can run code, and is not read: "
                "load it once with transformers and call save_pretrained, which writes safetensors)."
            )
        self._files, self._asked = {}, set()
        for name in names:
            try:
                file = safetensors.safe_open(inside(directory, name), "np")
            except (safetensors.SafetensorError, OSError) as error:
                raise storage(error) or InputError(
                    f"{directory / name} cannot be read ({error}): copy or download it again."
                ) from None
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

    def refuse_unread(self, idle=""):
        """Raise InputError where a tensor was never asked for that some logit may depend on: the model is then another one.
        `idle` is a pattern of those that none does in the model's family."""
        left = self._files.keys() - self._asked
        left = sorted(name for name in left if not (IDLE.fullmatch(name) or re.fullmatch(idle, name)))
        if left:
            raise InputError(
                f"{self.directory}: tensor {left[0]} has no place in the model that config.json describes"
                f"{f', nor have {len(left) - 1} more' if left[1:] else ''}."
            )

    def _slice(self, name):
        stored_name = self._find(name)
        if stored_name is None:
            raise InputError(f"{self.directory}: the checkpoint has no tensor {name}.")
        self._asked.add(stored_name)
        tensor = self._files[stored_name].get_slice(stored_name)
        if tensor.get_dtype() not in FLOATS:
            raise InputError(
                f"{self.directory}: tensor {stored_name} is {tensor.get_dtype()}, not one of {', '.join(FLOATS)}."
            )
        return tensor
