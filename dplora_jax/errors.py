"""The exception for what a user can mend, and the warning for what a user should know."""


class InputError(ValueError):
    """A flag, file, shape or budget is wrong; the message is one sentence that says what, where and what to do, and holds no
    value of a private record."""


class Refused(InputError):
    """A refusal whose `reason` tells something of private records, and is for their owner alone; the message is for all."""

    def __init__(self, message, reason):
        super().__init__(message)
        self.reason = reason


class InputWarning(UserWarning):
    """One sentence that a user should know, which holds no value of a private record."""
