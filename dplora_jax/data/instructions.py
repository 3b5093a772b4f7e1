"""Tables of instructions as a record a row: an instruction with its input, and the messages of conversations in pairs.

Each function takes a table's columns, {name: cells}, and returns those of the table that is used in its place.
"""


def with_input(columns):
    """`instruction` and `input` joined by a space, as FlowerTune's finance and code challenges do; many an `input` is empty.

    >>> with_input({"instruction": ["Add.", "Sing."], "input": ["1 and 2", None]})["instruction"]
    ['Add. 1 and 2', 'Sing.']
    """
    pairs = zip(columns["instruction"], columns["input"], strict=True)
    return columns | {"instruction": [_joined(*pair) for pair in pairs]}


def _joined(instruction, text):
    if text is None or text == "":
        return instruction
    if isinstance(instruction, str) and isinstance(text, str):
        return f"{instruction} {text}" if text.strip() else instruction
    # What is no text is refused later, by its column's name.
    return text if isinstance(instruction, str) else instruction


def replies(columns):
    """A message tree (OpenAssistant, Koepf et al. 2023, arXiv 2304.07327) as pairs: a row for each assistant's message whose
    parent is a prompter's of the same table. `prompt` is the parent's text, `answer` the message's, and all other columns are
    the parent's: whose the row is, is who asked."""
    where = {name: row for row, name in enumerate(columns["message_id"])}
    roles, parents = columns["role"], columns["parent_id"]
    rows = [(where.get(parent), row) for row, parent in enumerate(parents) if roles[row] == "assistant"]
    rows = [(asked, answered) for asked, answered in rows if asked is not None and roles[asked] == "prompter"]
    texts = columns["text"]
    made = {name: [cells[asked] for asked, _ in rows] for name, cells in columns.items()}
    return made | {"prompt": made["text"], "answer": [texts[answered] for _, answered in rows]}
