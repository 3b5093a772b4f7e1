"""The embedded corpus: reproducible, balanced, its splits apart, and not solved by counting words."""

import hashlib
import re
from collections import Counter

import numpy as np

from dplora_jax.data import finance_demo
from dplora_jax.data import finance_demo_words as words

PARTS = finance_demo.generate()
TEXTS = {name: texts for name, (texts, _) in PARTS.items()}
LABELS = {name: np.array(labels) for name, (_, labels) in PARTS.items()}
SHA256 = "9c7f24001eeeee9aa618955641449004d745cb2fe62ec2de333c81357ab2fccc"


def tokens(text: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", text.lower())


def test_seed_0_makes_the_same_corpus_everywhere():
    everything = "\n".join(
        f"{label}\t{text}" for texts, labels in PARTS.values() for text, label in zip(texts, labels, strict=True)
    )
    assert hashlib.sha256(everything.encode()).hexdigest() == SHA256
    assert finance_demo.generate(1)["train"] != PARTS["train"]


def test_records_are_distinct_and_counted_by_label():
    assert len(set(TEXTS["train"] + TEXTS["test"])) == 4000
    assert np.bincount(LABELS["train"]).tolist() == [1120, 960, 1120]
    assert np.bincount(LABELS["test"]).tolist() == [280, 240, 280]


def test_records_are_short():
    # Measured with MiniLM's tokenizer, and not to grow: 24 word-pieces at most, its two marks included.
    assert max(len(tokens(text)) for texts in TEXTS.values() for text in texts) <= 22


def test_records_are_filled_in_sentences():
    for text in TEXTS["train"] + TEXTS["test"]:
        assert not re.search(r"[{}]|  | ,|\ba [aeiou]|\ba (8|11|18)(\.\d)?%", text), text
        assert text[0].isupper() or text[0].isdigit()
        assert text[-1] in ".?"


def test_splits_share_no_entity_template_or_event():
    def parts_of(split):
        entities = split.firms + split.banks + split.places + split.persons
        return (
            {w for name in entities for w in name.split()},
            {*split.signed, *split.neutral, *split.frames},
            sum(split.events, ()),
        )

    for train, test in zip(parts_of(words.TRAIN), parts_of(words.TEST), strict=True):
        assert not set(train) & set(test)
    for names in (words.TRAIN.firms + words.TRAIN.banks, words.TRAIN.persons, words.TRAIN.places):
        assert not [text for text in TEXTS["test"] if any(name in text for name in names)]


def test_unseen_metrics_and_verbs_are_in_the_test_alone():
    unseen = [metric.name for metrics in words.UNSEEN_METRICS.values() for metric in metrics]
    unseen += [verb.past for verbs in words.UNSEEN_VERBS.values() for verb in verbs]
    for name in unseen:
        word = re.compile(rf"\b{name}\b", re.IGNORECASE)
        assert not any(word.search(text) for text in TEXTS["train"])
        assert any(word.search(text) for text in TEXTS["test"])


def test_what_moves_decides_whether_the_move_is_good():
    """Read back from the plainest sentences, without the generator: a metric, a verb, a percentage."""
    up = {"rose", "grew", "increased", "climbed", "jumped"}
    down = {"fell", "dropped", "declined", "shrank", "sank"}
    good = {"profit", "sales", "orders", "revenue", "cash flow", "exports", "customer deposits", "hiring"}
    bad = {"costs", "debt", "penalties", "unpaid bills", "unemployment", "bad loans", "late deliveries", "poverty"}
    seen = Counter()
    for text, label in zip(TEXTS["train"], LABELS["train"], strict=True):
        found = re.fullmatch(r".+'s? ([a-z -]+) (\w+) (again|[\d.]+%) in .+\.", text)
        if found and found[1] in good | bad and found[2] in up | down:
            seen[found[1] in good, found[2] in up] += 1
            assert label == (2 if (found[1] in good) == (found[2] in up) else 0), text
    assert len(seen) == 4
    assert min(seen.values()) >= 3


def bag(texts: list[str], vocabulary: dict[str, int]) -> np.ndarray:
    counts = np.zeros((len(texts), len(vocabulary)))
    for row, text in enumerate(texts):
        for token in tokens(text):
            if token in vocabulary:
                counts[row, vocabulary[token]] += 1
    return counts / np.linalg.norm(counts, axis=1, keepdims=True).clip(1e-9)


def macro_f1(truth: np.ndarray, guess: np.ndarray) -> float:
    scores = []
    for label in range(3):
        hits = np.sum((truth == label) & (guess == label))
        scores.append(2 * hits / max(1, np.sum(truth == label) + np.sum(guess == label)))
    return float(np.mean(scores))


def test_counting_words_does_not_solve_it():
    vocabulary = {token: i for i, token in enumerate(sorted({t for text in TEXTS["train"] for t in tokens(text)}))}
    train, test = (bag(TEXTS[name], vocabulary) for name in ("train", "test"))
    target = np.eye(3)[LABELS["train"]]
    weights = np.zeros((len(vocabulary), 3))
    for _ in range(300):
        scores = np.exp(train @ weights)
        weights -= 10.0 * (train.T @ (scores / scores.sum(1, keepdims=True) - target) / len(train) + 1e-4 * weights)
    assert macro_f1(LABELS["train"], (train @ weights).argmax(1)) > 0.7  # it did learn what words can tell
    assert macro_f1(LABELS["test"], (test @ weights).argmax(1)) < 0.6
