"""A tokenizer from the metadata of a GGUF file: byte-level BPE as of GPT-2, or SentencePiece's BPE as of Llama 2."""

from dplora_jax.errors import InputError

GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
WORD_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = {"splits": [WORD_SPLIT % r"\p{N}{1,3}"], "ignore_merges": True, "bos": True}
# What `tokenizer.ggml.pre` stands for, as in the tokenizer.json of the model that it is named after: the splits, one
# after the other; whether a whole word of the vocabulary needs no merges; whether BOS is added where the file does not
# say; whether the text is first brought into the normal form NFC.
PRE_TOKENIZERS = {
    "gpt-2": {"splits": [GPT2_SPLIT]},
    "smollm": {"splits": [r"\p{N}", GPT2_SPLIT]},
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), LLAMA3),
    "qwen2": {"splits": [WORD_SPLIT % r"\p{N}"], "nfc": True},
}
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4  # of `tokenizer.ggml.token_type`
SPACE = "▁"
MOST_CHARACTERS = 512  # of a SentencePiece token, which is cut at every place to find its merges


def build(path, metadata, special):
    """The transformers.PreTrainedTokenizerFast of `metadata`, whose `special` {"bos", "eos", "unk", "pad": id or None}.

    `path` is for messages. Raises InputError on a kind of tokenizer or pre-tokenizer that is not supported and on
    metadata that contradict themselves.
    """
    import tokenizers
    import transformers

    def get(key, default=None):
        return metadata.get(f"tokenizer.ggml.{key}", default)

    kind, pre, tokens = get("model"), get("pre"), get("tokens")
    if kind not in ("gpt2", "llama"):
        raise InputError(f"{path}: tokenizer.ggml.model={kind!r} is not supported; known: 'gpt2', 'llama'.")
    if kind == "gpt2" and pre not in tuple(PRE_TOKENIZERS):
        raise InputError(f"{path}: tokenizer.ggml.pre={pre!r} is not supported; known: {', '.join(PRE_TOKENIZERS)}.")
    types = get("token_type") or [NORMAL] * len(tokens or ())
    if not tokens or not isinstance(types, list) or not len(set(tokens)) == len(tokens) == len(types):
        raise InputError(f"{path}: its tokens are missing, or not different, or not as many as their types.")
    names = {name: None if index is None else tokens[index] for name, index in special.items()}
    bos = get("add_bos_token", kind == "llama" or PRE_TOKENIZERS[pre].get("bos", False))
    eos = get("add_eos_token", False)
    for name, added in (("bos", bos), ("eos", eos)):
        if added and names[name] is None:
            raise InputError(f"{path}: it adds a {name.upper()} token to each text but has none.")
    length = metadata.get(f"{metadata.get('general.architecture')}.context_length")
    try:
        if kind == "gpt2":
            backend = _byte_level(tokens, get("merges"), PRE_TOKENIZERS[pre])
        else:
            merges = _pairs(get("merges")) if get("merges") else _merges(tokens, get("scores"), types)
            backend = _sentencepiece(tokens, merges, names["unk"], get("add_space_prefix", True))
        for token, token_type in zip(tokens, types, strict=True):
            if token_type in (CONTROL, USER_DEFINED):
                backend.add_tokens([tokenizers.AddedToken(token, normalized=False, special=token_type == CONTROL)])
        return transformers.PreTrainedTokenizerFast(
            tokenizer_object=backend,
            **{f"{name}_token": token for name, token in names.items()},
            add_bos_token=bos,
            add_eos_token=eos,
            chat_template=metadata.get("tokenizer.chat_template"),
            model_max_length=length if type(length) is int else None,
        )
    except Exception as error:  # the library's own have no class of their own
        raise InputError(f"{path}: its tokenizer cannot be built ({' '.join(str(error).split())}).") from None


def _pairs(merges):
    return [tuple(merge.split(" ", 1)) for merge in merges]


def _byte_level(tokens, merges, options):
    """Byte-level BPE behind the splits of `options`."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    vocabulary = {token: index for index, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocabulary, _pairs(merges), ignore_merges=options.get("ignore_merges", False)))
    if options.get("nfc"):
        backend.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(Regex(split), "isolated") for split in options["splits"]]
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(tokens, merges, unknown, add_space):
    """SentencePiece's BPE: spaces are written ▁, unknown characters as their bytes; `add_space` before a text."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    vocabulary = {token: index for index, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    steps = [normalizers.Prepend(SPACE)] if add_space else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if add_space else steps)
    return backend


def _merges(tokens, scores, types):
    """The merges that the tokens' scores stand for: each token from any two others that make it, the best score first.

    SentencePiece merges the best-scored token that two neighbours make; equal pieces from different pairs go by the
    longer left part, as in transformers' converter.
    """
    if any(len(token) > MOST_CHARACTERS for token in tokens):
        raise ValueError(f"a token has more than {MOST_CHARACTERS} characters")
    normal = {token: score for token, score, kind in zip(tokens, scores, types, strict=True) if kind == NORMAL}
    cuts = ((token, at) for token in normal for at in range(1, len(token)))
    pairs = [(token[:at], token[at:]) for token, at in cuts if token[:at] in normal and token[at:] in normal]
    return sorted(pairs, key=lambda pair: (-normal["".join(pair)], -len(pair[0])))
