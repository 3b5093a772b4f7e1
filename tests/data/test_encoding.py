"""What a tokenizer or its template says of a text that it fails on reaches no message, no log and no cause of an error."""

import io
import logging

import numpy as np
import pytest

from dplora_jax.data import encoding, tasks
from dplora_jax.data.records import Records
from dplora_jax.errors import InputError
from dplora_jax.models.tokenizer import load_tokenizer, split

MARKER = "Mrs Marker's cyst"
RECORDS = Records((MARKER,), np.zeros(1, np.int32))
ASKED = [tasks.Asked((MARKER,), (f" {MARKER}",))]


class Panic(BaseException):
    """As tokenizers' Rust raises, which is no Exception."""


class Failing:
    """A tokenizer that quotes what it fails on; with a template, that is what fails."""

    bos_token_id = eos_token_id = pad_token_id = 0

    def __init__(self, error, template=None):
        self.error, self.chat_template = error, template

    def __call__(self, text, **_):
        raise self.error(f"cannot tokenise {text}")

    def apply_chat_template(self, messages, **_):
        raise self.error(f"cannot render {messages}")


CALLS = {
    "a classifier's": lambda t: encoding.classification(t, RECORDS, 8),
    "with its answer": lambda t: encoding.right_answers(t, ASKED, 8),
    "in a chat": lambda t: encoding.right_answers(t, ASKED, 8, chat=True),
    "every answer": lambda t: encoding.all_answers(t, ASKED, 8),
    "a question": lambda t: encoding.questions(t, ASKED, 8),
    "a question in a chat": lambda t: encoding.questions(t, ASKED, 8, chat=True),
    "a label's word": lambda t: encoding.label_words(t, ASKED[0]),
    "a prompt": lambda t: encoding.prompts(t, ASKED, 8),
    "a prompt in a chat": lambda t: encoding.prompts(t, ASKED, 8, chat=True),
    "its length": lambda t: encoding.most_tokens(t, ASKED),
}


# A template is Python's, and raises Exceptions alone.
ERRORS = [(c, e) for c in CALLS for e in (ValueError, UnicodeError, Panic) if not ("chat" in c and e is Panic)]


@pytest.mark.parametrize(("call", "error"), ERRORS)
def test_of_a_tokenizers_or_a_templates_error_the_type_is_told_alone(call, error):
    with pytest.raises(InputError, match=error.__name__) as caught:
        CALLS[call](Failing(error, "{{ messages }}"))
    assert MARKER not in str(caught.value)
    assert caught.value.__context__ is None
    assert caught.value.__cause__ is None


def test_a_template_that_raises_the_message_itself_tells_no_word_of_it(tiny_bert):
    tokenizer = load_tokenizer(tiny_bert)
    tokenizer.chat_template = "{{ raise_exception(messages[0]['content']) }}"
    with pytest.raises(InputError, match=r"user's message \(TemplateError\): leave chat out") as caught:
        split(tokenizer, MARKER, "a", chat=True)
    assert MARKER not in str(caught.value)
    assert caught.value.__context__ is None


@pytest.mark.parametrize("chat", [False, True])
def test_no_warning_counts_the_tokens_of_a_long_record(tiny_bert, chat, monkeypatch):
    """transformers would say how many they are, whatever level its user's environment asks for."""
    tokenizer, said, log = load_tokenizer(tiny_bert), io.StringIO(), logging.getLogger("transformers")
    tokenizer.chat_template, tokenizer.model_max_length = "{{ messages[0]['content'] }}", 4
    monkeypatch.setattr(log, "handlers", [logging.StreamHandler(said)])
    monkeypatch.setattr(log, "level", logging.DEBUG)
    monkeypatch.setattr(logging.root.manager, "disable", 0)
    log.manager._clear_cache()
    asked = [tasks.Asked(("profit rose sharply again today",), (" cost fell sharply again today",))]
    encoding.right_answers(tokenizer, asked, 8, chat=chat)
    assert said.getvalue() == ""
    tokenizer("profit rose sharply again today")
    assert "7 > 4" in said.getvalue(), "this version of transformers no longer warns: the test shows nothing"
