"""The templates beside this file, filled: whatever is put into them is escaped, in Markdown as in HTML."""

import jinja2
from markupsafe import Markup

from experiments.text import formats
from experiments.text.tables import Table


def html(name, contents):
    """The template `name` with the values of the dict `contents`, as HTML."""
    return _environment(Table.html).get_template(name).render(contents)


def markdown(name, contents):
    """The template `name` with the values of the dict `contents`, as Markdown."""
    return _environment(Table.markdown, finalize=_escaped).get_template(name).render(contents)


def _environment(table, **options):
    loader = jinja2.PackageLoader("experiments.report", "")
    environment = jinja2.Environment(
        loader=loader,
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        **options,
    )
    environment.filters["table"] = table
    environment.globals["code"] = _code
    return environment


def _escaped(value):
    """`value` as Markdown that reads as itself; what is markup already stays."""
    return value if hasattr(value, "__html__") else Markup(formats.markdown(value))


def _code(text):
    """A block of code in Markdown, whose fence is longer than any in the `text`."""
    fence = "```"
    while fence in text:
        fence += "`"
    return Markup(f"{fence}sh\n{text}\n{fence}")
