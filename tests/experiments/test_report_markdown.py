"""What comes from a user or from a model's maker reads as itself in Markdown: it opens no tag, code, link, cell or line."""

import doctest
import html
import re

import pytest

from experiments import model_card, report_markdown, report_text, sweep_report

HOSTILE = "<img src=x onerror=alert(1)> | `x` [click](http://evil)\n\n# Heading\n- item ``` \\"
CONFIG = {
    "model": HOSTILE, "dataset": HOSTILE, "trust": "local", "epsilon": 8.0, "delta": 1e-5, "clients": 1, "rounds": 1,
    "text_column": HOSTILE, "targets": HOSTILE, "labels": HOSTILE,
    "federation": {
        "data": {"description": HOSTILE, "labels": [HOSTILE]}, "trust": [HOSTILE], "release": HOSTILE, "method": [HOSTILE],
        "accounting": HOSTILE, "environment": {"devices": HOSTILE}, "command": HOSTILE,
        "clients": [{"client": HOSTILE, "records": HOSTILE, "epsilon": 1.0}],
        "communication": {"bytes_up_per_client_per_round": 1, "full_bytes_per_client_per_round": 2},
    },
}  # fmt: skip
ROWS = [{"round": 1, "epsilon": [1.0], "epsilon_max": 1.0, "accuracy": 0.5}]
LINE = {"case": HOSTILE, HOSTILE: HOSTILE, "seed": 1, "metrics": {"accuracy": 0.5}, "of": HOSTILE}


def without_code(text):
    """What stands outside of blocks of code, whose fences match by their length."""
    return re.sub(r"(?ms)^(`{3,})sh$.*?^\1$", "", text)


def check(text):
    """No line, cell or tag but the writer's own."""
    rest = without_code(text)
    assert "<img" not in rest
    assert not re.search(r"(?<!\\)`(?!``python|``$)", re.sub(r"(?ms)^```python$.*?^```$", "", rest))
    assert "[click]" not in rest
    assert "# Heading" not in rest.splitlines()
    assert not any(line.startswith("- item") for line in rest.splitlines())
    for table in re.findall(r"(?m)(?:^\|.*\n?)+", rest):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1


@pytest.mark.parametrize("holds", [True, False])
def test_a_report_of_hostile_names_has_its_own_lines_alone(holds):
    text = report_markdown.text(CONFIG, ROWS, True, HOSTILE, holds, HOSTILE, [LINE])
    check(text)
    assert text.count("onerror") > 15
    assert f"````sh\n{HOSTILE}\n````" in text, "the command is to be copied as it was"
    assert r"- text_column: &lt;img src=x onerror=alert(1)&gt; \| \`x\` \[click\](http://evil) # Heading - item" in text


def test_a_sweeps_table_keeps_its_cells():
    table = sweep_report.markdown([LINE, LINE | {"seed": 2}])
    check(table)
    assert len(table.splitlines()) == 5


def test_a_models_card_keeps_its_lines():
    check(model_card._use(False, [HOSTILE, HOSTILE]))
    run = CONFIG | {"last": ROWS[-1], "max_length": 8}
    check("\n\n".join(model_card._run_facts(run)))


def test_the_page_escapes_the_same():
    assert report_text.show(HOSTILE) == html.escape(HOSTILE)
    assert html.unescape(report_text.as_markdown("a < b & c")) == "a < b & c"


def test_examples_run():
    assert doctest.testmod(report_text).failed == 0
