"""From a table's cells to records: who touches which."""

import decimal

import pytest

from dplora_jax.data import records, tasks
from dplora_jax.data.tables import Table
from dplora_jax.errors import InputError

WRITTEN = ["4.0", "2.00", "01234.0", "007", "1e5", "NA", "null", "True", " spaced ", "2023-01-05"]


def table(**columns):
    return Table("here", list(columns), columns)


def test_the_rule_for_labels_touches_labels_alone():
    of = table(q=WRITTEN, a=WRITTEN, bank=WRITTEN)
    found = records.rows(of, tasks.own_table(tasks.ANSWERS), {"prompt": "q", "answer": "a"}, "bank")
    assert found.texts == found.answers == found.groups == WRITTEN
    of = table(
        text=WRITTEN, label=["4.0", " 4 ", 4.0, decimal.Decimal("4.00"), "01234.0", "x ", "1e5", "NA", "True", "4"]
    )
    labels = records.rows(of, tasks.own_table(tasks.LABELS), {"text": "text", "label": "label"}).labels
    assert labels == ["4", "4", "4", "4", "01234", "x", "1e5", "NA", "True", "4"]


@pytest.mark.parametrize(
    ("cell", "kind"), [(4.0, "float"), (["x"], "list"), ({}, "dict"), (decimal.Decimal("4"), "Decimal")]
)
@pytest.mark.parametrize("role", ["prompt", "answer", "group"])
def test_what_is_no_string_is_no_text(cell, kind, role):
    columns = {"prompt": ["a"], "answer": ["b"], "group": ["c"]} | {role: [cell]}
    with pytest.raises(InputError, match=rf"column '{role}' that are not text \({kind}\)"):
        records.rows(
            table(**columns), tasks.own_table(tasks.ANSWERS), {"prompt": "prompt", "answer": "answer"}, "group"
        )


def test_a_choice_without_its_text_is_refused_and_not_asked_as_none():
    of = table(goal=["g", None], sol1=["a", "b"], sol2=["c", "d"], label=["0", "1"])
    with pytest.raises(InputError, match="1 rows with nothing in column 'goal'"):
        records.choices(of, tasks.TASKS["piqa"])
    of = table(goal=["g"], sol1=["a"], sol2=["c"], label=["0"], more=[None])
    assert records.choices(of, tasks.TASKS["piqa"])["label"] == ["0"]


@pytest.mark.parametrize("role", ["prompt", "answer"])
def test_half_a_character_is_found_before_a_tokenizer_fails_on_it(role):
    columns = {"prompt": ["a", "b"], "answer": ["c", "d"]} | {role: ["\U0001f600", "secret \ud83d"]}
    with pytest.raises(InputError, match=f"half a character .* in column '{role}' of record 2") as caught:
        records.rows(table(**columns), tasks.own_table(tasks.ANSWERS), {"prompt": "prompt", "answer": "answer"})
    assert "secret" not in str(caught.value)
