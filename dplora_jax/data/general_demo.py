"""An embedded SYNTHETIC corpus of short entries about places, so that language models train without a download.

No place is real. The test split tells of places that the training split does not have, in sentences of the same kinds.
"""

import random

from dplora_jax.data.drawing import between, pick, shuffled

DESCRIPTION = "synthetic entries of a gazetteer made by a program: no place is real"
COUNTS = {"train": 1000, "test": 120}
_STARTS = (
    "Al", "Bran", "Cal", "Dun", "El", "Fair", "Glen", "Har", "Il", "Kil", "Lang", "Mar", "Nor", "Oak", "Port",
    "Rav", "Stan", "Thorn", "Ul", "West",
)  # fmt: skip
_ENDS = (
    "by", "den", "ford", "gate", "ham", "holm", "ley", "mere", "mouth", "ness", "sted", "thorpe", "ton", "vik",
    "worth",
)  # fmt: skip
_SIDES = ("northern", "southern", "eastern", "western", "central")
_LANDS = ("Ardenia", "Belmark", "Corvana", "Drosland", "Estoria")
_KINDS = ("village", "market town", "port", "mining town", "parish", "seaside resort")
_RIVERS = ("Arl", "Brenn", "Dosa", "Iver", "Lune", "Sarn", "Tave")
_TRADES = (
    "weaving", "shipbuilding", "slate quarrying", "dairy farming", "paper making", "herring fishing", "glass blowing",
)  # fmt: skip
_SIGHTS = (
    "a stone bridge with seven arches", "the ruins of a small abbey", "a wooden windmill", "a museum of clocks",
    "a lighthouse that is no longer in use", "a church with a crooked tower",
)  # fmt: skip
_EVENTS = ("a fire destroyed most of it", "the railway reached it", "it was given a charter", "its harbour silted up")


def _entry(rng):
    name = f"{pick(rng, _STARTS)}{pick(rng, _ENDS)}"
    year = between(rng, 1180, 1890)
    people = f"{between(rng, 1, 48)},{between(rng, 0, 999):03d}"
    fact = pick(rng, (f"It has a population of {people}.", f"In {year}, {pick(rng, _EVENTS)}."))
    return name, (
        f"{name} is a {pick(rng, _KINDS)} in {pick(rng, _SIDES)} {pick(rng, _LANDS)}, on the river {pick(rng, _RIVERS)}. "
        f"{fact} It is known for {pick(rng, _TRADES)} and for {pick(rng, _SIGHTS)}."
    )


def generate(seed=0):
    """The texts of each split, `{"train": texts, "test": texts}`; the same for a seed everywhere."""
    rng = random.Random(seed)
    names = shuffled(rng, sorted({start + end for start in _STARTS for end in _ENDS}))
    held = set(names[: len(names) // 5])
    parts = {split: [] for split in COUNTS}
    while any(len(parts[split]) < count for split, count in COUNTS.items()):
        name, text = _entry(rng)
        split = "test" if name in held else "train"
        if len(parts[split]) < COUNTS[split] and text not in parts[split]:
            parts[split].append(text)
    return parts
