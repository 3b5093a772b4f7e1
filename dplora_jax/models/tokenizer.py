"""Every convention of tokenizers: where one is read from, how it pads, and what stands before a prompt and after an answer."""

from dplora_jax.errors import InputError
from dplora_jax.files import find, read_json
from dplora_jax.models import gguf_file, pretrained, tokenizer_files, tokenizer_settings


def load_tokenizer(name_or_path):
    """The tokenizer of the same place as the model's, a transformers tokenizer; torch is not imported.

    It pads and truncates on the right, and has a pad token: its own, else EOS, else the unknown token. Raises InputError
    when there is none of these, and where the place holds no tokenizer that can be read without running its own code.
    """
    place = pretrained.locate(name_or_path)
    if place.is_file():
        tokenizer = gguf_file.tokenizer(place)
    else:
        with tokenizer_files.copied(place) as copies:
            tokenizer = _from_directory(place, copies)
        tokenizer.name_or_path = str(place)
        tokenizer_settings.lower_case(place, tokenizer)
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token is None:
        raise InputError(
            f"{place}: the tokenizer has no pad token, and no EOS or unknown token that could stand for it: set pad_token in "
            "tokenizer_config.json."
        )
    return tokenizer


def _from_directory(directory, copies):
    """The tokenizer of a directory, whose files' `copies` transformers reads: tokenizer.json as it stands, or what it makes of
    the other files."""
    import transformers

    try:
        by_class = transformers.AutoTokenizer.from_pretrained(copies, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # each of transformers' readers has its own
        by_class, reason = None, type(error).__name__
    if (copies / "tokenizer.json").exists():
        return _from_json(directory, copies, by_class)
    own_code = _own_code(directory)
    if own_code:
        raise InputError(
            f"{directory}: its tokenizer is the code {own_code}, and a model's own code is never run: convert it to a fast "
            "tokenizer and save its tokenizer.json there."
        )
    if by_class is None:
        raise InputError(f"{directory} holds no tokenizer that transformers can read ({reason}).")
    # From a config.json alone, transformers makes a tokenizer that knows no word.
    files = by_class.vocab_files_names.values()
    if not any((copies / name).exists() for name in files):
        raise InputError(f"{directory} holds no tokenizer: it has none of {', '.join(files)}.")
    return by_class


def _from_json(directory, copies, by_class):
    """The tokenizer of tokenizer.json in `copies`, with the special tokens that only the class of `by_class` (or None) knows.

    AutoTokenizer builds the class that the config names from the words and merges alone. SmolLM2's class is GPT-2's,
    which does not split digits as its tokenizer.json does, so the same text would become other tokens. The options that every
    version of these classes sets on a tokenizer.json are followed.
    """
    import transformers

    try:
        tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(copies, local_files_only=True)
    except Exception as error:
        raise InputError(
            f"{directory} holds no tokenizer that transformers can read ({type(error).__name__})."
        ) from None
    if by_class is not None:
        words = tokenizer.get_vocab()
        for name in by_class.SPECIAL_TOKENS_ATTRIBUTES:
            if getattr(tokenizer, name) is None and getattr(by_class, name) in words:
                setattr(tokenizer, name, getattr(by_class, name))
        tokenizer.model_input_names = by_class.model_input_names
    tokenizer_settings.follow(directory, tokenizer, by_class)
    return tokenizer


def _own_code(directory):
    """The reference to the Python class that a directory names for its tokenizer, or None."""
    for name in ("tokenizer_config.json", "config.json"):
        path = find(directory, name)
        auto_map = read_json(path).get("auto_map") if path else None
        named = auto_map.get("AutoTokenizer") if isinstance(auto_map, dict) else auto_map
        for reference in named if isinstance(named, list) else [named]:
            if reference:
                return reference
    return None


def tokens(tokenizer, text, **options):
    """`tokenizer(text, **options)`, with no warning or error of which says anything of a private text: transformers' own tell
    how many tokens it has, and others may quote it. Raises InputError with the type of what went wrong."""
    try:
        return tokenizer(text, verbose=False, **options)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of tokenizers' Rust is not an Exception
        kind = type(error).__name__
    # Raised outside the handler, so that not even the error's context holds what was said.
    raise InputError(f"the model's tokenizer fails on a text ({kind}): mend its files, or take another model.")


def continuation(tokenizer, prompt, answer=None, chat=False):
    """The token ids of a prompt and, where it is given, an answer and EOS -> (ids, where in them the answer starts).

    The two are tokenised apart, so that the ids of the prompt alone are how the whole begins. The prompt has what the
    tokenizer puts around a text (BOS, where it adds one), but no EOS behind it. With `chat` it is one message of the
    user in the tokenizer's chat template, which writes BOS itself, followed by what opens the reply. Raises InputError
    when the tokenizer lacks that template, or EOS to end an answer.
    """
    ids = _chat_prompt(tokenizer, prompt) if chat else _plain_prompt(tokenizer, prompt)
    if answer is None:
        return ids, len(ids)
    if tokenizer.eos_token_id is None:
        raise InputError(
            "the tokenizer has no EOS token, so an answer cannot end: set eos_token in tokenizer_config.json."
        )
    return [*ids, *tokens(tokenizer, answer, add_special_tokens=False).input_ids, tokenizer.eos_token_id], len(ids)


def split(tokenizer, prompt, answer, chat=False):
    """The token ids of a prompt with what follows it, no EOS behind -> (ids, where in them the answer starts).

    The two are tokenised as one text and cut after as many tokens as the prompt alone has, as EleutherAI's evaluation harness
    does it; apart, where the tokenizer closes a prompt with tokens that open the reply. With no prompt the answer follows BOS,
    else EOS, so that its first token is predicted from something. With `chat` the prompt is a message as in `continuation`, and
    the answer the reply.
    """
    if chat:
        ids = _chat_prompt(tokenizer, prompt)
        return [*ids, *tokens(tokenizer, answer.removeprefix(" "), add_special_tokens=False).input_ids], len(ids)
    if not prompt:
        before = _plain_prompt(tokenizer, "")  # BOS, and what else opens a reply
        if not before:
            first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
            before = [] if first is None else [first]
        return [*before, *tokens(tokenizer, answer, add_special_tokens=False).input_ids], max(1, len(before))
    before, bare = _plain_prompt(tokenizer, prompt), tokens(tokenizer, prompt, add_special_tokens=False).input_ids
    if bare and before[-1] != bare[-1]:
        return [*before, *tokens(tokenizer, answer, add_special_tokens=False).input_ids], len(before)
    ids = _plain_prompt(tokenizer, prompt + answer)
    return ids, min(len(before), len(ids) - 1)


def _plain_prompt(tokenizer, prompt):
    encoded = tokens(tokenizer, prompt, return_special_tokens_mask=True)
    ids, added = encoded.input_ids, encoded.special_tokens_mask
    # ChatGLM's tokens behind the prompt open the reply, so only EOS goes; one that the prompt itself spells stays.
    return ids[:-1] if added and added[-1] and ids[-1] == tokenizer.eos_token_id else ids


def _chat_prompt(tokenizer, prompt):
    if not tokenizer.chat_template:
        raise InputError(
            "the tokenizer has no chat template: leave chat out, or take the model's instruction-tuned variant."
        )
    try:
        messages = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except Exception as error:  # jinja2's, or what the template itself raises, which may be the message
        text, kind = None, type(error).__name__
    if text is None:
        raise InputError(
            f"the tokenizer's chat template fails on a user's message ({kind}): leave chat out, or mend chat_template in "
            "tokenizer_config.json."
        )
    return tokens(tokenizer, text, add_special_tokens=False).input_ids
