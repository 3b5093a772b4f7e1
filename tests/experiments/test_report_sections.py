"""What stands in a report beside the run's own files: an audit, a sweep, bytes against rank; and the report as Markdown."""

import json

import pytest

from experiments import communication, report
from experiments.sweep import report as sweep_report
from tests.experiments.report_pages import SCORES, config, metrics, page


def test_the_audit_beside_a_run_and_its_absence_are_told(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    assert "none lies beside this run" in page(folder, config(), metrics(**SCORES))
    (tmp_path / "run-audit").mkdir()
    found = {"claim": 8.0, "broken": False, "guesses": 2.999, "curve": 6.547}
    (tmp_path / "run-audit" / "audit.json").write_text(json.dumps({"runs": 8, "confidence": 0.999, "audits": [found]}))
    told = page(folder, config(), metrics(**SCORES))
    assert "<td>2.99</td><td>6.54</td><td>holds</td>" in told  # rounded down, never up
    assert "lower bounds are 6.54 (claim 8.00: holds)" in (folder / "report.md").read_text()
    assert "does not say which flags" in told
    for flags, words in (
        ({"clip_norm": 1.25, "epsilon": 8.0, "workdir": "x", "seed": 3, "auto": True}, ""),
        ({"clip_norm": 0.5, "epsilon": 2.0}, "clip_norm 0.5 (here 1.25), epsilon 2.0 (here 8.0)."),
        ({"feature_norm": 8.0}, "feature_norm 8.0 (here 0.0)."),
        ({"labels": "a<b"}, "labels a&lt;b (here None)."),
    ):
        document = {"runs": 8, "confidence": 0.999, "audits": [found], "flags": flags}
        (tmp_path / "run-audit" / "audit.json").write_text(json.dumps(document))
        told = page(folder, config(seed=None), metrics(**SCORES))
        assert ("THE AUDIT RAN WITH OTHER FLAGS THAN THIS RUN" in told) == bool(words)
        assert words in told
        assert words in (folder / "report.md").read_text()
    document = {"runs": 8, "confidence": 0.999, "audits": [found], "flags": None}
    (tmp_path / "run-audit" / "audit.json").write_text(json.dumps(document))
    assert "a small built-in model, not this run" in page(folder, config(), metrics(**SCORES))
    (tmp_path / "run-audit" / "audit.json").write_text(json.dumps({"runs": 8}))
    assert "cannot be read" in page(folder, config(), metrics(**SCORES))
    assert "What an attack found" not in page(folder, config(trust="none", epsilon=None), metrics(**SCORES))


def test_bytes_saved_against_rank_are_exact_for_the_papers_models():
    found = {(row["model"], row["rank"]): row for row in communication.rows(50)}
    assert found["llama2-7b", 512]["bytes_round"] == 4 * 512 * 32 * 2 * (4096 + 4096)
    assert found["bert-base", 8]["bytes_run"] == 50 * 4 * 8 * 12 * 2 * (768 + 768)
    assert found["gpt2", 8]["bytes_round"] == 4 * 8 * 12 * (768 + 3 * 768)  # q, k and v are one matrix
    assert found["chatglm-6b", 1]["bytes_round"] == 4 * 28 * (4096 + 3 * 4096)
    assert found["gpt2", 512]["ratio"] == pytest.approx(124_439_808 / (512 * 12 * 4 * 768))


def test_a_sweep_may_stand_in_the_report(tmp_path, capsys):
    folder, cells = tmp_path / "run", tmp_path / "cells.jsonl"
    folder.mkdir()
    page(folder, config(), metrics(**SCORES))
    lines = [
        {"case": "FedAvg", "epsilon": e, "seed": s, "metrics": {"accuracy": 0.1 * e + 0.01 * s}, "seconds": 1.0,
         "of": "MiniLM on headlines", "config": f"{e}-{s}", "settings": f"{e}", "commonest_label": 0.61 + 0.01 * s}
        for e in (2, 8) for s in (1, 2)
    ]  # fmt: skip
    cells.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert report.main([str(folder), f"--sweep={cells}"]) == 0
    for name in ("report.html", "report.md"):
        text = (folder / name).read_text()
        assert "Many runs" in text
        assert "0.215 ± 0.007" in text
        assert "MiniLM on headlines" in text
        assert "Always the commonest label: accuracy 0.625 ± 0.007" in text
        assert "NOT FOR RELEASE" in text
    assert report.main([str(folder), f"--sweep={tmp_path / 'none.jsonl'}"]) == 2
    cells.write_text(cells.read_text() + json.dumps(lines[0]) + "\n")
    assert report.main([str(folder), f"--sweep={cells}"]) == 0
    assert "0.215 ± 0.007" in (folder / "report.md").read_text(), "a line that stands twice counted twice"
    other = lines[0] | {"config": "other flags", "settings": "other", "seed": 3, "metrics": {"accuracy": 0.9}}
    cells.write_text(cells.read_text() + json.dumps(other) + "\n")
    capsys.readouterr()
    assert report.main([str(folder), f"--sweep={cells}"]) == 2
    assert "several sets of flags under one name" in capsys.readouterr().err


def test_markdown_says_what_the_page_says(tmp_path):
    page(tmp_path, config(trust="none", epsilon=None), metrics(**SCORES))
    text = (tmp_path / "report.md").read_text()
    assert "There is no privacy in this run" in text
    page(tmp_path, config(), metrics(**SCORES))
    text = (tmp_path / "report.md").read_text()
    assert "| round | epsilon | accuracy | macro-F1 |" in text
    assert "| 10 | 8.00 | 0.783 | 0.729 |" in text
    assert "python -m experiments.run --flagfile=finance.flags" in text
    assert "| 0 | 600 |" in text
    assert "| gpt2, rank 512 | 75.5 MB | 755 MB | 4.98 GB | 6.593× |" in text
    assert "- clip_norm: 1.25" in text
    assert "Many runs" not in text


def test_the_commonest_label_stands_beside_the_accuracy(tmp_path):
    told = config()
    told["federation"]["data"]["commonest_label"] = 0.594
    assert "the commonest label 0.594" in page(tmp_path, told, metrics(**SCORES))
    assert "(95 %) on 800 test records; the commonest label 0.594." in (tmp_path / "report.md").read_text()


def test_lines_drawn_in_pieces_have_such_keys():
    lines = [{"case": f"c{i}", "epsilon": e, "seed": 1, "metrics": {"accuracy": 0.5}} for i in range(6) for e in (2, 8)]
    lines += [{"case": "base model", "epsilon": e, "seed": 1, "metrics": {"accuracy": 0.1}} for e in (2, 8)]
    (drawn,) = sweep_report.plots(lines)
    assert [(name, broken) for name, _, broken in drawn.keys] == [(f"c{i}", i > 3) for i in range(6)]
