"""What is asked of a record: where a public table lies, its columns, and how a row becomes prompts, answers and a metric.

A task is one `Task`; a new one is a function from a row to `Asked`, and a line in TASKS.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from dplora_jax.data import instructions


class Asked(NamedTuple):
    """A record as a language model meets it: `answers[i]` may follow `prompts[i]`, and `right` is the one that should."""

    prompts: tuple[str, ...]
    answers: tuple[str, ...]
    right: int = 0


class Hub(NamedTuple):
    """A public table on the Hugging Face hub, at a branch or tag and in a folder of its repository."""

    repository: str
    revision: str = "main"
    folder: str | None = None


SCRIPT = "refs/convert/parquet"  # `datasets` refuses repositories that are scripts; this branch holds the hub's own conversion
LABELS, ANSWERS, TEXT, CHOICES = "labels", "answers", "text", "choices"


@dataclass(frozen=True)
class Task:
    """A kind of text with what is asked of it.

    Attributes:
      kind: "labels" (a text and its label: accuracy, macro-F1), "answers" (a prompt and its answer: perplexity of the reference,
        token F1 and ROUGE-L of a greedy one), "text" (text alone: perplexity) or "choices" (several answers of which one is
        right, to evaluate on and not to train on: accuracy by likelihood, plain and by length).
      ask: the row as `Asked`. Of a "choices" task the row is the table's own; of the others it has the keys "text" and "label"
        (a number), "prompt" and "answer", or "text".
      hub: where the table is, if the hub has it in a form that needs no code.
      columns: the table's column for each key; a row without one of them is of another table.
      label_names: the labels' names, in the order of their numbers.
      read: a cell of the label or answer column as text.
      keep: which of a text's lines are records; all that are not blank, if None.
      rows: a step over the whole table, from its columns {name: cells} to those of the table that is used in its place.
      needs: the columns that `rows` reads.
    """

    kind: str
    ask: Callable[[dict], Asked]
    hub: Hub | None = None
    columns: tuple[tuple[str, str], ...] = ()
    label_names: tuple[str, ...] = ()
    read: Callable[[object], str] | None = None
    keep: Callable[[str], bool] | None = None
    rows: Callable[[dict[str, list]], dict[str, list]] | None = None
    needs: tuple[str, ...] = ()

    @property
    def column(self):
        """The column of each key, as a dict."""
        return dict(self.columns)

    @property
    def codes(self):
        """The number of each label's text in a public table: its name, capital or not, or the number itself."""
        names = enumerate(self.label_names)
        return {text: i for i, name in names for text in (str(i), name, name.capitalize(), name.upper())}


def label_of(value):
    """The label that a cell names: 1, 1.0 and "1.0" are all "1"; a missing value is ""."""
    if value is None or value != value:
        return ""
    return re.sub(r"^(-?\d+)\.0+$", r"\1", str(value).strip())


SENTIMENT = "Overall, the sentiment of this news is"  # a base model reads more from it than from "Sentiment:"


def label_words(names, lead="Label:"):
    """`ask` of a text and its label: one of the labels' words follows the text and, on a line of its own, `lead`.

    >>> label_words(("bad", "good"), "Sentiment:")({"text": "Profit rose.", "label": 1}).prompts[0]
    'Profit rose.\\nSentiment:'
    """

    def ask(row):
        return Asked((f"{row['text']}\n{lead}",) * len(names), tuple(f" {n}" for n in names), row["label"])

    return ask


def question_answer(row):
    """A question and its answer, as EleutherAI's evaluation harness writes most of its tasks."""
    return Asked((f"Question: {row['prompt']}\nAnswer:",), (f" {row['answer']}",))


def instruction(row):
    """An instruction and its reply in the words of Alpaca (Taori et al. 2023), as FlowerTune's challenges have them."""
    opening = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    )
    return Asked((f"{opening}\n### Instruction:\n{row['prompt']}\n### Response:",), (f" {row['answer']}",))


def plain_text(row):
    """Text that follows nothing."""
    return Asked(("",), (row["text"],))


def _sentiment(hub, text, label, names, **more):
    return Task(LABELS, label_words(names, SENTIMENT), hub, (("text", text), ("label", label)), names, **more)


def _questions(hub, prompt, answer, **more):
    return Task(ANSWERS, question_answer, hub, (("prompt", prompt), ("answer", answer)), **more)


def _instructions(repository, prompt, answer, **more):
    return Task(ANSWERS, instruction, Hub(repository), (("prompt", prompt), ("answer", answer)), **more)


def _text(hub, **more):
    return Task(TEXT, plain_text, hub, (("text", "text"),), **more)


def _choices(ask, hub, *columns):
    return Task(CHOICES, ask, hub, tuple((name, name) for name in columns))


def _fiqa_label(score):
    """FinGPT's three classes of FiQA's score in [-1, 1] (Yang et al. 2023, arXiv 2306.06031): cut at -0.1 and 0.1."""
    try:
        number = float(score)
    except (TypeError, ValueError):
        return label_of(score)
    return "" if math.isnan(number) else "negative" if number < -0.1 else "neutral" if number < 0.1 else "positive"


def _nwgi_label(name):
    """FinGPT's three classes of NWGI's seven: what is mild is neutral."""
    strength, _, side = label_of(name).lower().rpartition(" ")
    return "neutral" if strength == "mildly" else side


def _first_answer(value):
    """The first of several reference answers, which TREC's LiveQA keeps in a list of records."""
    while isinstance(value, list | tuple):
        value = value[0] if value else None
    if isinstance(value, dict):
        value = next((text for name, text in value.items() if name.lower() == "answer"), None)
    return value if isinstance(value, str) else ""


def _number(value):
    """A cell as a whole number; -1 where it is not one, as in tables whose labels are kept back."""
    text = label_of(value)
    return int(text) if re.fullmatch("[0-9]{1,9}", text) else -1


def boolq(row):
    """Clark et al. 2019, in the harness's words; a table without passages asks the question alone."""
    passage = row.get("passage")
    passage = f"{passage}\n" if passage and isinstance(passage, str) else ""
    right = label_of(row["answer"]).lower() in ("true", "1", "yes")
    return Asked((f"{passage}Question: {row['question'].rstrip('?')}?\nAnswer:",) * 2, (" no", " yes"), int(right))


def piqa(row):
    """Bisk et al. 2020, in the harness's words."""
    return Asked(
        (f"Question: {row['goal']}\nAnswer:",) * 2, (f" {row['sol1']}", f" {row['sol2']}"), _number(row["label"])
    )


def winogrande(row):
    """Sakaguchi et al. 2020, scored in part (Trinh and Le 2018, arXiv 1806.02847): the same end after either beginning."""
    before, _, after = row["sentence"].partition("_")
    prompts = tuple(before + row[name] for name in ("option1", "option2"))
    return Asked(prompts, (f" {after.strip()}",) * 2, _number(row["answer"]) - 1)


JOINED = {"rows": instructions.with_input, "needs": ("instruction", "input")}
PAIRED = {"rows": instructions.replies, "needs": ("message_id", "parent_id", "role", "text")}
SENTIMENTS = ("negative", "neutral", "positive")
TASKS = {
    "financial_phrasebank": _sentiment(
        Hub("takala/financial_phrasebank", SCRIPT, "sentences_50agree"), "sentence", "label", SENTIMENTS
    ),
    "twitter_financial_news_sentiment": _sentiment(
        Hub("zeroshot/twitter-financial-news-sentiment"), "text", "label", ("bearish", "bullish", "neutral")
    ),
    "fiqa_sa": _sentiment(Hub("pauri32/fiqa-2018"), "sentence", "sentiment_score", SENTIMENTS, read=_fiqa_label),
    "nwgi": _sentiment(Hub("oliverwang15/news_with_gpt_instructions"), "news", "label", SENTIMENTS, read=_nwgi_label),
    "meddialog": _questions(Hub("lighteval/med_dialog", SCRIPT, "healthcaremagic"), "src", "tgt"),
    "medquad": _questions(Hub("lavita/MedQuAD"), "question", "answer"),
    "liveqa": _questions(
        Hub("hyesunyun/liveqa_medical_trec2017"), "NIST_PARAPHRASE", "REFERENCE_ANSWERS", read=_first_answer
    ),
    "mediqa_ans": _questions(None, "question", "answer"),
    "alpaca_gpt4": _instructions("vicgalle/alpaca-gpt4", "instruction", "output", **JOINED),
    "fingpt_sentiment": _instructions("FinGPT/fingpt-sentiment-train", "instruction", "output", **JOINED),
    "medical_flashcards": _instructions("medalpaca/medical_meadow_medical_flashcards", "input", "output"),
    "code_alpaca": _instructions("flwrlabs/code-alpaca-20k", "instruction", "output", **JOINED),
    "oasst1": _instructions("OpenAssistant/oasst1", "prompt", "answer", **PAIRED),
    "aya": _instructions("CohereForAI/aya_dataset", "inputs", "targets"),
    "wikitext2": _text(
        Hub("Salesforce/wikitext", "main", "wikitext-2-raw-v1"), keep=lambda line: not line.strip().startswith("= ")
    ),
    "slimpajama": _text(Hub("DKYoon/SlimPajama-6B")),
    "boolq": _choices(boolq, Hub("google/boolq"), "question", "answer"),
    "piqa": _choices(piqa, Hub("ybisk/piqa", SCRIPT, "plain_text"), "goal", "sol1", "sol2", "label"),
    "winogrande": _choices(
        winogrande, Hub("allenai/winogrande", SCRIPT, "winogrande_xl"), "sentence", "option1", "option2", "answer"
    ),
}
TRAINABLE = tuple(name for name, task in TASKS.items() if task.kind != CHOICES)


def own_table(kind, label_names=()):
    """The Task of a person's own table of `kind`."""
    ask = {LABELS: label_words(label_names), ANSWERS: question_answer, TEXT: plain_text}[kind]
    return Task(kind, ask, label_names=tuple(label_names))


def asked(task, records, chat=False):
    """Every one of `records` (`records.Records`) as `Asked`; for a `chat`, a prompt to be answered is sent as it is."""
    if task.kind == LABELS:
        return [task.ask({"text": t, "label": int(y)}) for t, y in zip(records.texts, records.labels, strict=True)]
    if task.kind == ANSWERS:
        pairs = zip(records.texts, records.answers, strict=True)
        return [Asked((t,), (a,)) if chat else task.ask({"prompt": t, "answer": a}) for t, a in pairs]
    return [task.ask({"text": text}) for text in records.texts]
