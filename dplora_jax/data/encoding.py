"""From records to arrays of tokens. Letters: N records, T tokens of a row."""

import itertools

import numpy as np

from dplora_jax.data.records import UNIT
from dplora_jax.errors import InputError
from dplora_jax.models import tokenizer as tokenizers


def classification(tokenizer, records, max_length, most_rows=1):
    """Tokenise `records` for a classifier -> dict of int32 `input_ids`, `attention_mask` [N, T = max_length], `labels` [N].

    Every row is padded to the public `max_length`, never to the longest: shapes tell nothing of the texts. Longer texts
    are cut, special tokens kept; with `most_rows` above 1 they go on in up to so many rows, and `unit` [N] numbers each row's
    record. Raises InputError where the tokenizer cannot do that.
    """
    names = ("input_ids", "attention_mask")
    if not len(records.texts):
        of_rows = ("labels", UNIT) if most_rows > 1 else ("labels",)
        nothing = np.zeros((0, max_length), np.int32)
        return dict.fromkeys(names, nothing) | dict.fromkeys(of_rows, nothing[:, 0])
    options = {"padding": "max_length", "truncation": True, "max_length": max_length, "return_tensors": "np"}
    if most_rows > 1 and not tokenizer.is_fast:
        raise InputError("`unit_rows` cuts texts by a fast tokenizer, and this model's is none: give unit_rows=1.")
    several = {"return_overflowing_tokens": True} if most_rows > 1 else {}
    encoded = tokenizers.tokens(tokenizer, list(records.texts), **options, **several)
    table = {name: encoded[name].astype(np.int32) for name in names}
    if most_rows == 1:
        return table | {"labels": np.asarray(records.labels, np.int32)}
    record = np.asarray(encoded["overflow_to_sample_mapping"], np.int32)
    kept = np.arange(len(record)) - np.searchsorted(record, record) < most_rows
    table |= {"labels": np.asarray(records.labels, np.int32)[record], UNIT: record}
    return {name: array[kept] for name, array in table.items()}


def documents(tokenizer, asked, max_length, most_rows):
    """Plain texts (`tasks.Asked` without prompts) in up to `most_rows` rows each -> what `right_answers` gives, and `unit` [N],
    the number of each row's text. A row begins with the token that the one before ended with, so that each token is predicted
    once."""
    rows, numbers = [], []
    for number, one in enumerate(asked):
        ids, start = tokenizers.split(tokenizer, "", one.answers[one.right])
        for index, first in enumerate(range(0, max(1, len(ids) - 1), max(1, max_length - 1))[:most_rows]):
            rows.append((ids[first : first + max_length], 1 if index else start, False))
            numbers.append(number)
    return _table(rows, max_length) | {UNIT: np.array(numbers, np.int32)}


def right_answers(tokenizer, asked, max_length, ends=False, chat=False):
    """Each of `asked` (`tasks.Asked`) as its prompt with the right answer -> dict of int32 `input_ids`, `attention_mask`,
    `loss_mask` [N, T = max_length], the last 1 where a token of the answer stands.

    `ends` puts EOS behind an answer that has room for it; `chat` puts prompts into the tokenizer's chat template. A record that
    is too long loses the beginning of its prompt, but no more than leaves half a row of it, and then the end of its answer.
    """
    return _table([_row(tokenizer, one, one.right, max_length, ends, chat) for one in asked], max_length)


def all_answers(tokenizer, asked, max_length, chat=False):
    """Every answer of every one of `asked` behind its prompt, as `right_answers` has one: N is the count of all answers.

    Raises InputError where an answer alone fills a row: its likelihood would be another's.
    """
    rows = [_row(tokenizer, one, index, max_length, False, chat) for one in asked for index in range(len(one.answers))]
    if any(cut for _, _, cut in rows):
        raise InputError(f"an answer that is scored whole does not fit in max_length={max_length} tokens; raise it.")
    return _table(rows, max_length)


def prompts(tokenizer, asked, max_length, chat=False):
    """The prompts of `asked` alone, padded on the right -> dict of int32 `input_ids`, `attention_mask` [N, T = max_length]; where
    there is no prompt, the text is what is to be continued."""
    rows = []
    for one in asked:
        prompt, text = one.prompts[one.right], one.answers[one.right]
        ids, _ = (
            tokenizers.continuation(tokenizer, prompt, chat=chat) if prompt else tokenizers.split(tokenizer, "", text)
        )
        rows.append((_shortened(tokenizer, ids, max_length), 0, False))
    table = _table(rows, max_length)
    return {name: table[name] for name in ("input_ids", "attention_mask")}


def questions(tokenizer, asked, max_length, shared=(), chat=False):
    """The prompts of `asked` with the tokens `shared` behind them (`label_words`), for a model whose next token is the label ->
    dict of int32 `input_ids`, `attention_mask` [N, T = max_length], `labels` [N]: which answer is right."""
    prompts = [tokenizers.continuation(tokenizer, one.prompts[one.right], chat=chat)[0] for one in asked]
    table = _table([(_shortened(tokenizer, [*ids, *shared], max_length), 0, False) for ids in prompts], max_length)
    del table["loss_mask"]
    return table | {"labels": np.array([one.right for one in asked], np.int32)}


def label_words(tokenizer, asked, chat=False):
    """How the answers of one `Asked` differ: (the tokens that they all begin with, the token of each that follows these).

    Raises InputError where two of them go on alike.
    """
    pairs = zip(asked.prompts, asked.answers, strict=True)
    split = [tokenizers.split(tokenizer, prompt, answer, chat) for prompt, answer in pairs]
    answers = [ids[start:] for ids, start in split]
    together = itertools.takewhile(lambda tokens: len(set(tokens)) == 1, zip(*answers, strict=False))
    shared = tuple(tokens[0] for tokens in together)
    words = [next(iter(ids[len(shared) :]), None) for ids in answers]
    for (one, word), (other, its) in itertools.combinations(zip(asked.answers, words, strict=True), 2):
        if None in (word, its) or word == its:
            raise InputError(
                f"the labels {one.strip()!r} and {other.strip()!r} begin with the same token, and this model is to say one of "
                "them by its next token: rename one, or give objective=classifier."
            )
    return shared, tuple(words)


def most_tokens(tokenizer, asked, chat=False):
    """The most tokens that any answer of `asked` has, and of any prompt with its answer."""
    pairs = [
        tokenizers.split(tokenizer, p, a, chat) for one in asked for p, a in zip(one.prompts, one.answers, strict=True)
    ]
    return max(len(ids) - start for ids, start in pairs), max(len(ids) for ids, _ in pairs)


def check_length(max_length, model, tokenizer):
    """Raise InputError unless rows of `max_length` tokens fit the model and leave room for a token of text."""
    least, most = tokenizer.num_special_tokens_to_add() + 1, model.config.max_positions
    if not least <= max_length <= most:
        raise InputError(f"max_length={max_length} must lie in {least}..{most} for this model.")


def check_ids(model, tokenizer):
    """Raise InputError unless each id that the tokenizer may give has its row of the model's embeddings: a lookup beyond them is
    NaN in every family, and so is all that is made of it."""
    rows, names = model.config.vocab_size, {index: word for word, index in tokenizer.get_vocab().items()}
    around = tokenizer("").input_ids  # a post-processor may put in ids of its own
    least, largest = min((*names, *around)), max((*names, *around))
    if least < 0 or largest >= rows:
        strange = largest if largest >= rows else least
        raise InputError(
            f"the tokenizer has the id {strange} ({names.get(strange, 'put around each text')!r}), and the model's embeddings "
            f"have {rows} rows, for ids 0 to {rows - 1}: take the model's own tokenizer, or resize the embeddings for it "
            "(resize_token_embeddings in transformers) and save the model again."
        )


def _row(tokenizer, one, index, max_length, ends, chat):
    """(ids, where the answer starts, whether its end was cut) of one answer behind its prompt."""
    ids, start = tokenizers.split(tokenizer, one.prompts[index], one.answers[index], chat)
    answer = ids[start:]
    if ends and tokenizer.eos_token_id is not None:
        answer = [*answer, tokenizer.eos_token_id]
    prompt = _shortened(tokenizer, ids[:start], max(max_length - len(answer), max_length // 2))
    room = max_length - len(prompt)
    return [*prompt, *answer[:room]], len(prompt), len(ids) - start > room


def _shortened(tokenizer, ids, room):
    """The last `room` of a prompt's tokens, the first of which stays where it is BOS."""
    if len(ids) <= room:
        return ids
    first = [ids[0]] if ids[0] == tokenizer.bos_token_id and room > 1 else []
    return [*first, *ids[len(ids) - room + len(first) :]]


def _table(rows, max_length):
    names = ("input_ids", "attention_mask", "loss_mask")
    table = {name: np.zeros((len(rows), max_length), np.int32) for name in names}
    for index, (ids, start, _) in enumerate(rows):
        table["input_ids"][index, : len(ids)] = ids
        table["attention_mask"][index, : len(ids)] = 1
        table["loss_mask"][index, start : len(ids)] = 1
    return table
