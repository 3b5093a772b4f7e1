"""Metrics of predictions: of labels, and of answers in words."""

import re
import string
from collections import Counter

import numpy as np


def accuracy(predicted, labels):
    """The share of `predicted` [N] that equals `labels` [N]."""
    return float(np.mean(predicted == labels))


def macro_f1(predicted, labels, classes):
    """The mean over `classes` labels of F1; a class that is neither there nor predicted counts 0, as in scikit-learn.

    >>> round(macro_f1(np.array([0, 1, 1, 2]), np.array([0, 1, 2, 2]), 3), 4)
    0.7778
    """
    scores = []
    for label in range(classes):
        hits = np.sum((predicted == label) & (labels == label))
        scores.append(2 * hits / max(1, np.sum(predicted == label) + np.sum(labels == label)))
    return float(np.mean(scores))


def token_f1(answer, reference):
    """F1 of the words of two texts, as SQuAD counts them (Rajpurkar et al. 2016): case, punctuation and articles aside.

    >>> round(token_f1("The heart, mostly.", "a heart"), 4)
    0.6667
    """
    one, other = _words(answer), _words(reference)
    if not one or not other:
        return float(one == other)
    return _f1(sum((Counter(one) & Counter(other)).values()), len(one), len(other))


def rouge_l(answer, reference):
    """ROUGE-L's F-measure (Lin 2004) with beta 1, of lower-case words and numbers without stemming, as rouge-score has it.

    >>> round(rouge_l("police killed the gunman", "police kill the gunman"), 4)
    0.75
    """
    one, other = (re.findall(r"[a-z0-9]+", text.lower()) for text in (answer, reference))
    if not one or not other:
        return 0.0
    row = [0] * (len(other) + 1)  # lengths of common subsequences with the first words of `other`
    for word in one:
        new = [0]
        for index, theirs in enumerate(other):
            new.append(row[index] + 1 if word == theirs else max(row[index + 1], new[-1]))
        row = new
    return _f1(row[-1], len(one), len(other))


def _f1(common, one, other):
    return 2 * common / (one + other) if common else 0.0


def _words(text):
    kept = "".join(c for c in text.lower() if c not in string.punctuation)
    return [word for word in kept.split() if word not in ("a", "an", "the")]
