"""A golden Llama whose tokens are single characters."""

import json
import shutil

import tokenizers

from tests.conftest import GOLDEN


def write(place, characters):
    """Write the model with a tokenizer that knows these `characters` into `place` -> `place`."""
    shutil.copytree(GOLDEN / "llama_tiny", place)
    words = ["<pad>", "<unk>", "<s>", *characters]
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("."), "isolated")
    made.decoder = tokenizers.decoders.Fuse()
    made.save(str(place / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "bos_token": "<s>",
    }
    (place / "tokenizer_config.json").write_text(json.dumps(settings))
    return place
