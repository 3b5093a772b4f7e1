"""Tables of instructions and of conversations, in the hub's columns, as records."""

import json
import string

import numpy as np
import pytest
import tokenizers

from dplora_jax.data import encoding, partition, sources, tasks
from dplora_jax.data.sources import Source, benchmark, load
from dplora_jax.errors import InputError
from dplora_jax.models import load_tokenizer
from tests import letters

# Ann asks twice, Ben once; replies without a question, replies to replies and questions without a reply are no pair.
MESSAGES = [
    ("a1", None, "ann", "prompter", "en", "What is a bond?"),
    ("a2", "a1", "eve", "assistant", "en", "A loan."),
    ("a3", "a1", "ben", "assistant", "de", "A debt."),
    ("a4", "a2", "ann", "prompter", "en", "Who lends?"),
    ("a5", "a4", "eve", "assistant", "en", "You do."),
    ("a6", "a5", "eve", "assistant", "en", "Indeed."),
    ("b2", "b1", "eve", "assistant", "en", "Of what is lost."),
    ("c1", None, "ben", "prompter", "de", "Wie geht es?"),
    ("c2", "c1", "ann", "assistant", "en", "Gut."),
    ("d1", None, "dan", "prompter", "en", "Anyone?"),
]
NAMES = ("message_id", "parent_id", "user_id", "role", "lang", "text")


def write(folder, name, rows):
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def messages(prefix=""):
    return [dict(zip(NAMES, row, strict=True)) | {"text": prefix + row[-1]} for row in MESSAGES]


def test_a_reply_is_a_record_of_who_asked(tmp_path):
    write(tmp_path, "train.jsonl", messages())
    write(tmp_path, "validation.jsonl", messages("Once: "))
    corpus = load(Source("oasst1", str(tmp_path), group_column="lang", unit_column="user_id"))
    assert list(zip(corpus.train.texts, corpus.train.answers, corpus.train.units, strict=True)) == [
        ("What is a bond?", "A loan.", "ann"),
        ("What is a bond?", "A debt.", "ann"),
        ("Who lends?", "You do.", "ann"),
        ("Wie geht es?", "Gut.", "ben"),
    ]
    assert corpus.train.groups == ("en", "en", "en", "de")
    assert corpus.train.count == 2
    assert corpus.test.texts[0] == "Once: What is a bond?"


def test_the_rows_of_aya_are_their_writers(tmp_path):
    rows = [{"inputs": f"q{i}", "targets": f"a{i}", "user_id": f"u{i % 3}", "language": "Thai"} for i in range(9)]
    write(tmp_path, "train.jsonl", rows)
    write(tmp_path, "test.jsonl", [{"inputs": "q", "targets": "a"}])
    corpus = load(Source("aya", str(tmp_path), unit_column="user_id"))
    assert (len(corpus.train.texts), corpus.train.count) == (9, 3)
    parts = partition.partition("iid", corpus.train.labels, None, 3, 0, corpus.train.units)
    assert [len({corpus.train.units[i] for i in part}) for part in parts] == [1, 1, 1]


def test_an_input_stands_behind_its_instruction_unless_it_is_empty(tmp_path):
    rows = [("Add.", "1 and 2"), ("Sing.", ""), ("Dance.", "  "), ("Sit.", None), *((f"Do {i}.", "") for i in range(6))]
    write(tmp_path, "train.jsonl", [{"instruction": a, "input": b, "output": "ok"} for a, b in rows])
    write(tmp_path, "test.jsonl", [{"instruction": "Add.", "input": "3 and 4", "output": "7"}])
    corpus = load(Source("alpaca_gpt4", str(tmp_path)))
    assert corpus.train.texts[:4] == ("Add. 1 and 2", "Sing.", "Dance.", "Sit.")
    assert corpus.test.texts == ("Add. 3 and 4",)
    given = load(Source("alpaca_gpt4", str(tmp_path), test_data=str(tmp_path / "test.jsonl")))
    assert given.test.texts == corpus.test.texts
    assert len(tasks.asked(corpus.task, corpus.test)[0].answers) == 1


@pytest.mark.parametrize(
    ("task", "row", "sentence"),
    [
        ("code_alpaca", {"instruction": "Sort.", "output": "x"}, "no column 'input'"),
        (
            "code_alpaca",
            {"instruction": "Sort.", "input": [1], "output": "x"},
            "column 'instruction' that are not text",
        ),
        ("oasst1", {"prompt": "Sort.", "answer": "x"}, "no column 'message_id'"),
        ("oasst1", dict(zip(NAMES, MESSAGES[-1], strict=True)), "has no text in it"),
    ],
)
def test_a_table_of_another_kind_is_one_sentence(task, row, sentence, tmp_path):
    write(tmp_path, "train.jsonl", [row] * 4)
    with pytest.raises(InputError, match=sentence):
        load(Source(task, str(tmp_path)))


def test_a_public_table_that_holds_the_private_instructions_is_refused_with_and_without_their_inputs(tmp_path):
    rows = [{"instruction": f"i{i}", "input": f"x{i}", "output": f"o{i}"} for i in range(20)]
    write(tmp_path, "test.jsonl", rows)
    for text in ("i{}", "i{} x{}"):
        texts = tuple(text.format(i, i) for i in range(9))
        private = [sources.Records(texts, np.zeros(9, np.int32), answers=tuple(f"o{i}" for i in range(9)))]
        with pytest.raises(InputError, match="is refused as a public test set"):
            benchmark("code_alpaca", str(tmp_path), private=private)


CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chat_tokenizer(place):
    """A model's folder whose tokenizer knows printable characters and speaks ChatML -> its tokenizer."""
    letters.write(place, "\n" + string.printable[:95])
    marks = ("<|im_start|>", "<|im_end|>")
    made = tokenizers.Tokenizer.from_file(str(place / "tokenizer.json"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    made.add_special_tokens([tokenizers.AddedToken(mark, special=True) for mark in marks])
    made.save(str(place / "tokenizer.json"))
    path = place / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | {"eos_token": marks[1], "chat_template": CHATML}
    path.write_text(json.dumps(settings))
    return load_tokenizer(place)


def test_the_loss_is_on_the_reply_alone_in_the_chat_template(tmp_path):
    """The template opens the reply before it, and its end of turn stands behind it."""
    tokenizer = chat_tokenizer(tmp_path / "model")
    write(tmp_path, "train.jsonl", messages())
    corpus = load(Source("oasst1", str(tmp_path), test_fraction=0.25))
    asked = tasks.asked(corpus.task, corpus.train, chat=True)
    rows = encoding.right_answers(tokenizer, asked, 96, ends=True, chat=True)
    for number, answer in enumerate(corpus.train.answers):
        kept = rows["input_ids"][number][rows["loss_mask"][number] == 1]
        assert tokenizer.decode(kept) == answer + "<|im_end|>"
        before = rows["input_ids"][number][: int(np.argmax(rows["loss_mask"][number]))]
        assert tokenizer.decode(before).endswith(f"{corpus.train.texts[number]}<|im_end|>\n<|im_start|>assistant\n")
