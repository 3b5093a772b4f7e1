"""What comes from a user or from a model's maker reads as itself in Markdown: it opens no tag, code, link, cell or line."""

import html
import json
import re

import pytest

from dplora_jax.federation import workdir_files
from experiments import export
from experiments.ledger import Agreement
from experiments.report import sections, templates
from experiments.run import model_card
from experiments.sweep import report as sweep_report
from experiments.text import formats, tables
from tests.experiments.report_pages import config

HOSTILE = "<img src=x onerror=alert(1)> | `x` [click](http://evil)\n\n# Heading\n- item ``` \\"
ROWS = [{"round": 1, "epsilon": [1.0], "epsilon_max": 1.0, "accuracy": 0.5}]
LINE = {"case": HOSTILE, HOSTILE: HOSTILE, "seed": 1, "metrics": {"accuracy": 0.5}, "of": HOSTILE}


@pytest.fixture
def stored(tmp_path):
    """The `workdir_files.Stored` of a run whose names are all hostile."""
    document = config(1, **dict.fromkeys(("model", "dataset", "text_column", "targets", "labels", HOSTILE), HOSTILE))
    federation = document["federation"]
    federation["data"] |= {"description": HOSTILE, "labels": [HOSTILE]}
    federation |= {"trust": [HOSTILE], "method": [HOSTILE], "accounting": HOSTILE, "command": HOSTILE}
    federation |= {"release": HOSTILE, "environment": {HOSTILE: HOSTILE}, "base_files": {HOSTILE: HOSTILE}}
    (tmp_path / "config.json").write_text(json.dumps(document))
    return workdir_files.read_config(tmp_path)


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
def test_a_report_of_hostile_names_has_its_own_lines_alone(stored, tmp_path, holds):
    agreement, sweep = Agreement(holds, HOSTILE), sweep_report.contents([LINE])
    text = templates.markdown("report.md.j2", sections.contents(tmp_path, stored, ROWS, agreement, sweep))
    check(text)
    assert text.count("onerror") > 15
    assert f"````sh\n{HOSTILE}\n````" in text, "the command is to be copied as it was"
    assert r"- text_column: &lt;img src=x onerror=alert(1)&gt; \| \`x\` \[click\](http://evil) # Heading - item" in text


def test_a_sweeps_table_keeps_its_cells():
    table = sweep_report.markdown([LINE, LINE | {"seed": 2}])
    check(table)
    assert len(table.splitlines()) == 5


def test_a_models_card_keeps_its_lines(stored):
    check(model_card._use(False, [HOSTILE, HOSTILE]))
    for holds in (True, False):
        check("\n\n".join(model_card._run_facts(export.Run(stored, ROWS[-1], Agreement(holds, HOSTILE)))))


def test_a_line_that_begins_as_a_heading_or_an_item_is_a_line():
    for text in ("# Heading", "## x", "- item", "+ item", "1. one", "2) two"):
        assert not re.match(r"(#{1,6}|[-+]|\d+[.)])\s", formats.markdown(text))
        assert formats.markdown(text).replace("\\", "") == text


def test_the_page_escapes_the_same():
    table = tables.Table([HOSTILE], [[HOSTILE, HOSTILE]])
    assert "<img" not in table.html()
    assert html.unescape(formats.markdown("a < b & c")) == "a < b & c"
