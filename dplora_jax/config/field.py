"""What a field of the configuration says of itself."""

import dataclasses

# What a field decides. On resume, only fields that decide the result must be what they were.
RESULT = "result"  # the bits of the adapter, and the accounting
LAYOUT = "layout"  # where and in which portions the same is computed
METRICS = "metrics"  # what is measured of it
DISPLAY = "display"  # what is shown of it, and where
PROCESS = "process"  # which of several processes this one is: the only fields that may differ between them


def field(
    default,
    text,
    decides=RESULT,
    *,
    least=None,
    above=None,
    most=None,
    below=None,
    choices=None,
    flag=None,
    common=False,
):
    """A field: its default, its help text, what it decides, its range (least <= value <= most, above < value < below) or its
    `choices`, its name on the command line where that is another (`flag`), and whether it is one of those that matter to most."""
    bounds = {"least": least, "above": above, "most": most, "below": below, "choices": choices}
    return dataclasses.field(
        default=default,
        metadata={"help": text, "decides": decides, "flag": flag, "common": common}
        | {name: value for name, value in bounds.items() if value is not None},
    )
