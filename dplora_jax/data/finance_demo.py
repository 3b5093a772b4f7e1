"""An embedded SYNTHETIC corpus of finance headlines with a sentiment, so that everything runs without a download.

No record is real: companies, places and persons are made up, and a label follows from how its sentence was made. What
moves decides whether the move is good: costs that fall are good news, a profit that falls is not. So a bag of words
cannot solve it; the meaning of the sentence can. The test split shares no template and no entity with the training
split, and about a fifth of its metrics and verbs are new.

Half of each label's records come from templates of movement (a metric, a direction, numbers); the other half tell an
event in a frame ("Falcon Steel was fined for fraud"), where the test's words are new too: only their meaning helps.
"""

import math
import random

from dplora_jax.data.drawing import between, pick, shuffled
from dplora_jax.data.finance_demo_words import (
    CURRENCIES,
    DAYS,
    GAP_VERBS,
    METRICS,
    MOVES,
    PERCENTS,
    PERIODS,
    TEST,
    TRAIN,
    UNSEEN_METRICS,
    UNSEEN_VERBS,
    VERBS,
    Split,
)

LABEL_NAMES = ("negative", "neutral", "positive")
DESCRIPTION = (
    "synthetic finance headlines made by a program: no record is real, and a score here says nothing of real text"
)
SPLIT_COUNTS = {"train": (1120, 960, 1120), "test": (280, 240, 280)}  # records by label, in the order of LABEL_NAMES


def _amounts(rng: random.Random, unit: str, direction: int) -> tuple[str, str]:
    """The amounts now and before, as text, the former larger where `direction` is 1."""
    small = between(rng, 11, 80)
    large = math.ceil(small * (1.1 + 0.6 * rng.random()))
    now, before = (large, small) if direction > 0 else (small, large)
    if unit == "n":
        return str(now * 3), str(before * 3)
    if unit == "p":
        return f"{now // 10}.{now % 10}%", f"{before // 10}.{before % 10}%"
    return f"{now // 10}.{now % 10} million {pick(rng, CURRENCIES)}", f"{before // 10}.{before % 10} million"


def _subject(rng: random.Random, split: Split, template: str) -> tuple[str, str, str]:
    """The kind of the subject ("firm", "bank" or "place"), its name, and the name with its preposition."""
    kind = pick(rng, ("firm", "firm", "bank") if "{C}" in template else ("firm", "firm", "bank", "place"))
    name = pick(rng, {"firm": split.firms, "bank": split.banks, "place": split.places}[kind])
    return kind, name, f"in {name}" if kind == "place" else f"at {name}"


def _slots(rng: random.Random, split: Split, template: str, sign: int) -> dict[str, str]:
    """The text of every slot for a record of the given sign (1 good news, -1 bad news)."""
    kind, subject, at = _subject(rng, split, template)
    pool = METRICS[kind] + (UNSEEN_METRICS[kind] if split.unseen else ())
    good = rng.random() < 0.5
    metric = pick(rng, [m for m in pool if m.good == good])
    opposite = pick(rng, [m for m in pool if m.good != good])
    way = sign if good else -sign
    verbs = {d: VERBS[d] + (UNSEEN_VERBS[d] if split.unseen else ()) for d in (1, -1)}
    if metric.gap and (opposite.gap or "{O}" not in template):
        verbs = {d: (GAP_VERBS[d],) for d in (1, -1)}
    verb, other = pick(rng, verbs[way]), pick(rng, verbs[-way])
    first, second = (verb, other) if rng.random() < 0.5 else (other, verb)
    now, before = _amounts(rng, metric.unit, way)
    new, old = ("profit", "loss") if sign > 0 else ("loss", "profit")
    hit, hid = ("beat", "missed") if sign > 0 else ("missed", "beat")
    slots = {"C": subject, "own": subject + ("'" if subject.endswith("s") else "'s"), "at": at}
    slots |= {"M": metric.name, "O": opposite.name, "A": now, "B": before, "cash": _amounts(rng, "m", 1)[0]}
    slots |= {"V": verb.past, "v": verb.base, "N": verb.noun, "W": other.past, "w": other.base, "X": other.noun}
    slots |= {"U": first.past, "L": second.past, "R": pick(rng, MOVES[way]), "S": pick(rng, MOVES[-way])}
    slots |= {"side": "above" if way > 0 else "below", "new": new, "old": old, "hit": hit, "hid": hid}
    slots |= {"P": pick(rng, PERCENTS), "T": pick(rng, PERIODS), "D": pick(rng, DAYS), "n": str(between(rng, 2, 9))}
    return slots | {"F": pick(rng, split.places), "E": pick(rng, split.persons)}


def _template(rng: random.Random, split: Split, label: int, turn: int) -> str:
    """A template of movement and an event in its frame by turns, so that both have half of a label's records."""
    if turn % 2:
        frame = split.frames[turn // 2 % len(split.frames)]
        return frame.replace("{event}", pick(rng, split.events[label]))
    templates = split.neutral if label == 1 else split.signed
    return templates[turn // 2 % len(templates)]


def _split_records(rng: random.Random, split: Split, counts: tuple[int, int, int]) -> tuple[list[str], list[int]]:
    """Distinct records, `counts` of them by label, in random order."""
    records = []
    for label, count in enumerate(counts):
        made: dict[str, int] = {}
        turn = 0
        while len(made) < count:
            template = _template(rng, split, label, turn)
            turn += 1
            sign = label - 1 or pick(rng, (-1, 1))
            text = template.format(**_slots(rng, split, template, sign))
            made[text[0].upper() + text[1:]] = label
        records += made.items()
    records = shuffled(rng, records)
    return [text for text, _ in records], [label for _, label in records]


def generate(seed: int = 0) -> dict[str, tuple[list[str], list[int]]]:
    """The records of each split, `{"train": (texts, labels), "test": (texts, labels)}`; the same for a seed everywhere.

    A label indexes `LABEL_NAMES`. All texts are distinct, and at most 24 word-pieces of MiniLM's tokenizer long.
    """
    return {
        name: _split_records(random.Random(seed * 2 + i), split, SPLIT_COUNTS[name])
        for i, (name, split) in enumerate((("train", TRAIN), ("test", TEST)))
    }
