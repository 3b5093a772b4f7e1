"""The one exception for what a user can mend."""

LONGEST = 2000  # characters of a message


class InputError(ValueError):
    """A flag, file, shape or budget is wrong; the message is one sentence that says what, where and what to do.

    What it quotes may come from a hostile file: nothing in it moves a terminal's cursor or starts a line, and it has an end."""

    def __init__(self, message):
        text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in message)
        super().__init__(text if len(text) <= LONGEST else f"{text[: LONGEST - 400]} [...] {text[-400:]}")
