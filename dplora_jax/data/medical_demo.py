"""An embedded SYNTHETIC corpus of medical questions and answers, so that language models train without a download.

No record is real and nothing here is advice: conditions, causes and remedies are made up, and drawn for each condition at random.
The test split asks about conditions that the training split does not have. What can be learned is how such answers
are written, not what they say.
"""

import random

from dplora_jax.data.drawing import pick, shuffled

DESCRIPTION = "synthetic medical questions and answers made by a program: no record is real, and none is advice"
CONDITIONS = {"train": 250, "test": 30}  # with four questions each
_STARTS = (
    "Bel", "Cor", "Dav", "Fen", "Gar", "Hol", "Jor", "Kel", "Lan", "Mor", "Nev", "Ost", "Pel", "Quil", "Ren",
    "Sav", "Tor", "Ulm", "Ves", "Wex", "Yar", "Zel",
)  # fmt: skip
_MIDDLES = (
    "a", "e", "i", "o", "u", "ia", "el", "or", "an", "ul",
)  # fmt: skip
_ENDS = (
    "dan", "lic", "mont", "nova", "pine", "rick", "stad", "tova", "vale", "wyn",
)  # fmt: skip
_KINDS = ("fever", "syndrome", "disease", "palsy", "anemia", "rash")
_ORGANS = {
    "the skin": ("itching at night", "dry, red patches", "blisters on the hands", "peeling of the soles"),
    "the lungs": ("a dry cough", "shortness of breath on stairs", "wheezing in cold air", "pain when breathing in"),
    "the stomach": ("nausea in the morning", "pain after meals", "loss of appetite", "a feeling of fullness"),
    "the joints": ("stiff fingers", "swollen knees", "pain that moves from joint to joint", "cracking shoulders"),
    "the nerves": ("numb toes", "tremor of one hand", "sudden dizziness", "tingling in the arms"),
    "the eyes": ("blurred vision", "sensitivity to light", "tears without a cause", "halos around lamps"),
}
_CAUSES = (
    "an inherited change in a single gene", "an infection that is passed on by ticks", "too little of a vitamin in the diet",
    "an immune system that attacks healthy tissue", "long contact with solvents at work", "a virus that spreads in schools",
)  # fmt: skip
_RISKS = (
    "children under ten", "adults over sixty", "people who work outdoors", "people with a parent who has it",
    "pregnant women", "smokers",
)  # fmt: skip
_REMEDIES = (
    "rest and plenty of fluids", "a course of tablets for six weeks", "physical therapy twice a week",
    "an ointment every evening", "a diet without salt", "injections once a month",
)  # fmt: skip
_COURSES = ("clears up within weeks", "lasts for years", "comes and goes", "gets better with age")


def _condition(rng):
    name = f"{pick(rng, _STARTS)}{pick(rng, _MIDDLES)}{pick(rng, _ENDS)} {pick(rng, _KINDS)}"
    organ = pick(rng, tuple(_ORGANS))
    symptoms = shuffled(rng, _ORGANS[organ])
    remedies = shuffled(rng, _REMEDIES)
    return {
        "name": name, "organ": organ, "first": symptoms[0], "second": symptoms[1], "third": symptoms[2],
        "cause": pick(rng, _CAUSES), "risk": pick(rng, _RISKS), "remedy": remedies[0], "other": remedies[1],
        "course": pick(rng, _COURSES),
    }  # fmt: skip


_QUESTIONS = (
    ("What is {name}?", "{name} is a condition of {organ}. It is caused by {cause} and usually {course}."),
    (
        "What are the symptoms of {name}?",
        "People with {name} most often have {first} and {second}. Some also notice {third}. See a doctor if these last.",
    ),
    (
        "Who is at risk of {name}?",
        "{name} can affect anyone, but it is most common in {risk}. It is caused by {cause}.",
    ),
    (
        "How is {name} treated?",
        "There is no single cure for {name}. Treatment begins with {remedy}. If that does not help, doctors add {other}.",
    ),
)


def generate(seed=0):
    """The records of each split, `{"train": (questions, answers), "test": ...}`; the same for a seed everywhere."""
    rng, seen, parts = random.Random(seed), set(), {}
    for split, count in CONDITIONS.items():
        records = []
        while len(records) < len(_QUESTIONS) * count:
            condition = _condition(rng)
            if condition["name"] in seen:
                continue
            seen.add(condition["name"])
            records += [(question.format(**condition), answer.format(**condition)) for question, answer in _QUESTIONS]
        records = shuffled(rng, records)
        parts[split] = [question for question, _ in records], [answer for _, answer in records]
    return parts
