"""What a person copies first, the README's Python and examples/, runs as it stands."""

import importlib.util
import pathlib

import pytest

from dplora_jax.models import pretrained

ROOT = pathlib.Path(__file__).parent.parent
MODEL = '"all-MiniLM-L6-v2"'
FEWER = {'("finance_demo")': '("finance_demo", train_records=150, test_records=30)'}


def changed(source, changes):
    """`source` with other words, each of which it must hold."""
    for old, new in changes.items():
        assert old in source, f"the page no longer says {old}"
        source = source.replace(old, new)
    return source


def run(source, name):
    """The names that `source` leaves behind."""
    names = {"__name__": "__main__"}
    exec(compile(source, name, "exec"), names)
    return names


def python_of(page):
    """The one block of Python in a page of Markdown."""
    _, block, *more = page.read_text().split("```python\n")
    assert not more
    return block.split("```")[0]


def test_the_readmes_python_runs_to_its_plan(tiny_bert, monkeypatch, tmp_path, capsys):
    """On the tiny model; what follows the plan is the example's, which another test runs whole."""
    monkeypatch.chdir(tmp_path)
    plan, rest = python_of(ROOT / "README.md").split("\nfor round in ")
    names = run(changed(plan, {MODEL: repr(str(tiny_bert))} | FEWER), "README.md")
    assert capsys.readouterr().out.splitlines()[-1] == "at delta 1e-05"
    clients = names["federation"].plan([len(bank["labels"]) for bank in names["banks"]]).clients
    assert all(7.9 < client.epsilon <= 8 for client in clients)
    for call in "federation.fit(banks", "evaluation.on(test)", "federation.save(":
        assert call in rest


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec(pretrained.PACKAGES["all-MiniLM-L6-v2"][0]) is None,
    reason="all-MiniLM-L6-v2 is not installed",
)
def test_the_finance_example_runs(quick_compile, monkeypatch, tmp_path, capsys):
    """With fewer records, and two rounds for its twenty."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    source = (ROOT / "examples" / "finance.py").read_text()
    shorter = {
        "rounds=20": "rounds=2",
        "expected_batch_size=128.0": "expected_batch_size=8.0",
        "last_layers=3": "last_layers=1",
    } | FEWER
    with pytest.warns(UserWarning, match="nothing of this run is durable"):
        names = run(changed(source, shorter), "finance.py")
    assert [round.number for round in names["rounds"]] == [0, 1, 2]
    assert 7.9 < max(names["rounds"][-1].epsilon) <= 8
    assert 0 <= names["scored"][-1].metrics["accuracy"] <= 1
    assert "round  2  epsilon " in capsys.readouterr().out
    assert (tmp_path / "finance.png").stat().st_size > 1000
    assert (tmp_path / "finance_adapter" / "adapter_config.json").exists()
