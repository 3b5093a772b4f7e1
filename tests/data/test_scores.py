"""Metrics of answers and labels, against values worked out by hand or by the reference implementations."""

import numpy as np
import pytest

from dplora_jax.data.scores import accuracy, macro_f1, rouge_l, token_f1


@pytest.mark.parametrize(
    ("answer", "reference", "f1", "rouge"),
    [
        ("the cat sat", "the cat sat", 1.0, 1.0),
        ("", "a cat", 0.0, 0.0),
        ("The Cat!", "cat", 1.0, 2 / 3),  # articles and punctuation count for ROUGE alone
        ("cat dog", "dog cat", 1.0, 0.5),  # and so does order
        ("rest and fluids", "fluids, rest, and time", 6 / 7, 4 / 7),
        ("x x x", "x", 0.5, 0.5),
        ("non-steroidal drug", "nonsteroidal drug", 1.0, 0.4),
    ],
)
def test_answers(answer, reference, f1, rouge):
    assert token_f1(answer, reference) == pytest.approx(f1)
    assert rouge_l(answer, reference) == pytest.approx(rouge)
    assert rouge_l(reference, answer) == pytest.approx(rouge)


def test_labels():
    predicted, labels = np.array([0, 1, 1, 2]), np.array([0, 1, 2, 2])
    assert accuracy(predicted, labels) == 0.75
    assert macro_f1(predicted, labels, 3) == pytest.approx((1 + 2 / 3 + 2 / 3) / 3)
    assert macro_f1(predicted, labels, 4) == pytest.approx((1 + 2 / 3 + 2 / 3) / 4)
