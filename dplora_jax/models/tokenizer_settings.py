"""Options of tokenizer_config.json that win over what tokenizer.json says of the same thing, as in transformers' own classes."""

import json
import pathlib
import warnings

from dplora_jax.errors import InputError
from dplora_jax.files import find, read_json, to_json
from dplora_jax.models.sentence import lower_cases

# BertTokenizer's options: the names in tokenizer_config.json, and in the BertNormalizer of tokenizer.json.
BERT = {
    "do_lower_case": "lowercase",
    "strip_accents": "strip_accents",
    "tokenize_chinese_chars": "handle_chinese_chars",
}
BYTE_LEVEL = (
    "GPT2Tokenizer",
    "GPTNeoXTokenizer",
    "Qwen2Tokenizer",
    "RobertaTokenizer",
)  # whose classes set add_prefix_space


def follow(directory, tokenizer, by_class):
    """Bring `tokenizer`, read from tokenizer.json, to what the other files of `directory` say where their library obeys these.

    `by_class` is the tokenizer of the class that the files name, or None. Raises InputError where the two cannot be reconciled.
    """
    path = find(directory, "tokenizer_config.json")
    settings = read_json(path) if path else {}
    kind, backend = type(by_class).__name__, tokenizer.backend_tokenizer
    if kind == "BertTokenizer":
        options = {theirs: getattr(by_class, name) for name, theirs in BERT.items()}
        changed = backend.normalizer is not None and _changed(backend.normalizer, "BertNormalizer", options)
        if changed:
            backend.normalizer = changed
        elif any(settings.get(name) is not None for name in BERT):
            warnings.warn(
                f"{directory}: tokenizer.json's own normaliser is kept, which is not BERT's: {', '.join(BERT)} of "
                "tokenizer_config.json do nothing.",
                stacklevel=2,
            )
    elif kind in BYTE_LEVEL and backend.pre_tokenizer is not None:
        options = {"add_prefix_space": bool(by_class.add_prefix_space)}
        backend.pre_tokenizer = _changed(backend.pre_tokenizer, "ByteLevel", options) or backend.pre_tokenizer
    elif kind in ("LlamaTokenizer", "XLMRobertaTokenizer") and isinstance(settings.get("add_prefix_space"), bool):
        prepends = any(_prepends(part) for part in (backend.normalizer, backend.pre_tokenizer) if part is not None)
        if prepends != settings["add_prefix_space"]:
            raise InputError(
                f"{path}: add_prefix_space={settings['add_prefix_space']}, but tokenizer.json "
                f"{'puts a space' if prepends else 'puts none'} before a text: make the two agree."
            )


def lower_case(directory, tokenizer):
    """Let `tokenizer` lower-case a text first where `directory` holds a sentence model that does."""
    if lower_cases(directory):
        from tokenizers import normalizers

        backend = tokenizer.backend_tokenizer
        normaliser = [] if backend.normalizer is None else [backend.normalizer]
        backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), *normaliser])


def end_ids(tokenizer):
    """The ids that end an answer: the tokenizer's EOS, with which answers are trained, and those at which transformers stops: the
    eos_token_id of generation_config.json, else of config.json, one or several, where the tokenizer comes from a directory."""
    named, place = [tokenizer.eos_token_id], tokenizer.name_or_path
    if place and pathlib.Path(place).is_dir():
        path = find(place, "generation_config.json") or find(place, "config.json")
        eos_id = read_json(path).get("eos_token_id") if path else None
        named += eos_id if isinstance(eos_id, list) else [eos_id]
    return tuple(sorted({end for end in named if type(end) is int and end >= 0}))


def _nodes(state):
    """Every normaliser or pre-tokeniser in a serialised one, those inside a sequence too."""
    yield state
    for part in (*state.get("normalizers", ()), *state.get("pretokenizers", ())):
        yield from _nodes(part)


def _changed(part, kind, options):
    """`part` with `options` set in every node of `kind`; None where it has none."""
    state = json.loads(part.__getstate__())
    nodes = [node for node in _nodes(state) if node.get("type") == kind]
    if not nodes:
        return None
    for node in nodes:
        node.update(options)
    part.__setstate__(to_json(state).encode())
    return part


def _prepends(part):
    """Whether `part` puts a space before a text."""
    return any(
        node.get("type") == "Prepend" or node.get("prepend_scheme") in ("always", "first")
        for node in _nodes(json.loads(part.__getstate__()))
    )
