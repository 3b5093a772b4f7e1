"""The one exception for what a user can mend."""


class InputError(ValueError):
    """A flag, file, shape or budget is wrong; the message is one sentence that says what, where and what to do."""
