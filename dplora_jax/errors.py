"""The exception for what a user can mend, and the warning for what a user should know."""


class InputError(ValueError):
    """A flag, file, shape or budget is wrong; the message is one sentence that says what, where and what to do, and holds no
    value of a private record."""


class InputWarning(UserWarning):
    """One sentence that a user should know, which holds no value of a private record."""
