"""A tokenizer's files, as they are handed to transformers: copies, since what it opens is named by the files themselves.

tokenizer_config.json and special_tokens_map.json may set any argument of a tokenizer's class, the paths of other files among
them (`vocab`, `gguf_file`, `sp_model_kwargs`, ...), and transformers follows links.
"""

import contextlib
import pathlib
import tempfile

from dplora_jax import files

TEXTS = (
    "vocab.txt", "merges.txt", "tokenizer.model", "sentencepiece.bpe.model", "spiece.model", "ice_text.model",
    "tekken.json", "chat_template.jinja",
)  # fmt: skip
DOCUMENTS = ("tokenizer.json", "added_tokens.json", "vocab.json", "chat_template.json")
SETTINGS = ("tokenizer_config.json", "special_tokens_map.json")
NAMES = (*DOCUMENTS, *SETTINGS, *TEXTS)
# Settings that are text or hold some and name no file, beside those whose name ends in `_token`.
WORDS = (
    "tokenizer_class", "model_type", "chat_template", "model_input_names", "padding_side", "truncation_side",
    "truncation_strategy", "added_tokens_decoder", "additional_special_tokens", "extra_special_tokens", "never_split",
    "wordpieces_prefix", "errors",
)  # fmt: skip


@contextlib.contextmanager
def copied(directory):
    """A folder for the length of the block with what a tokenizer is made of, from the model's `directory`: files that are known
    by name, and of the settings those that cannot name another file. Raises InputError where one is malformed."""
    with tempfile.TemporaryDirectory(prefix="dplora_jax-tokenizer-") as copies:
        copies = pathlib.Path(copies)
        for name in (*NAMES, "config.json"):
            path = files.find(directory, name)
            if path is not None:
                (copies / name).write_bytes(_content(path))
        yield copies


def _content(path):
    content = files.read_bytes(path)
    if path.name in DOCUMENTS:
        files.parse_json(content, path)
    elif path.name in SETTINGS:
        return files.to_json(_harmless(files.parse_json(content, path))).encode()
    elif path.name == "config.json":  # it may name the tokenizer's class
        settings = files.parse_json(content, path)
        return files.to_json(
            {name: settings[name] for name in ("model_type", "tokenizer_class") if name in settings}
        ).encode()
    return content


def _harmless(settings):
    """`settings` without text that a tokenizer's class could take for a file's name."""
    return {
        name: value
        for name, value in settings.items()
        if name in WORDS or name.endswith("_token") or value is None or isinstance(value, bool | int | float)
    }
