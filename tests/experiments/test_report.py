"""The report is one file, says what its two public files say and no more, and never softens a missing guarantee."""

import json
import math
import re
import subprocess
import sys

import pytest

from dplora_jax.errors import InputError
from experiments import report
from experiments.text import formats
from tests.experiments.ledger_workdirs import edit_lines, facts, write_run
from tests.experiments.report_pages import SCORES, config, metrics, page

HOSTILE = '<script>alert("x")</script> & <img src=x onerror=y>'


def tile(text, label):
    """The big figure under `label`."""
    return re.search(rf'<div class="label">{label}</div><div class="value[^"]*">([^<]*)<', text).group(1)


def test_one_file_that_loads_nothing(tmp_path):
    text = page(tmp_path, config(), metrics(**SCORES))
    assert not re.search(r"https?:|<script|<link|<img|@import|<iframe|\bsrc=", text)
    assert all(address.startswith("#") for address in re.findall(r'href="([^"]*)"', text))
    assert all(address.startswith("#") for address in re.findall(r"url\(([^)]*)\)", text))
    assert text.count("<svg") == 4
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "metrics.jsonl", "report.html", "report.md"]


def test_ids_are_unique_and_references_resolve(tmp_path):
    text = page(tmp_path, config(), metrics(**SCORES))
    ids = re.findall(r'\bid="([^"]*)"', text)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'href="#([^"]*)"', text)) | set(re.findall(r"url\(#([^)]*)\)", text)) <= set(ids)


def test_figures_take_the_colours_of_the_page(tmp_path):
    text = page(tmp_path, config(), metrics(**SCORES))
    for drawing in re.findall(r"<svg.*?</svg>", text, re.S):
        assert "var(--series-0)" in drawing
        # matplotlib's grid of black and white would vanish on one of the two papers.
        assert not re.search(r"(fill|stroke): ?#", drawing)


def test_shows_the_last_evaluated_round_and_the_epsilon_of_the_last(tmp_path):
    rows = metrics(**SCORES)
    text = page(tmp_path, config(rounds=11), [*rows, {"round": 11, "epsilon": [8.0, 8.0], "epsilon_max": 8.0}])
    assert tile(text, "test accuracy") == "0.783"
    assert tile(text, "test macro-F1") == "0.729"
    assert tile(text, "epsilon") == "8.00"
    assert tile(text, "bytes sent") == "1,160× less"
    assert "base model 0.311" in text


def test_epsilon_is_never_rounded_down(tmp_path):
    rows = metrics(**SCORES)
    rows[-1]["epsilon_max"] = 7.9912
    assert tile(page(tmp_path, config(), rows), "epsilon") == "8.00"


def test_every_client_is_in_the_table_up_to_fifty(tmp_path):
    text = page(tmp_path, config(clients=50), metrics(**SCORES))
    for k in range(50):
        assert f'<th scope="row">{k}</th><td>{600 + k}</td>' in text


def test_many_clients_are_summarised(tmp_path):
    text = page(tmp_path, config(clients=101), metrics(**SCORES))
    assert '<th scope="row">19</th><td>619</td>' in text
    assert '<th scope="row">20</th>' not in text
    for title, records in (("min", 600), ("median", 650), ("max", 700)):
        assert f'<th scope="row">{title}</th><td>{records}</td>' in text


def test_the_bases_files_are_told_by_their_digests(tmp_path):
    told = config()
    told["federation"]["base_files"] = {"model.safetensors": "53aa" * 16}
    assert ">SHA-256 of the base&#39;s model.safetensors</th><td>" + "53aa" * 16 in page(
        tmp_path, told, metrics(**SCORES)
    )
    assert f"- SHA-256 of the base's model.safetensors: {'53aa' * 16}\n" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl"])
def test_a_document_of_absurd_depth_is_one_sentence(tmp_path, name):
    page(tmp_path, config(), metrics(**SCORES))
    (tmp_path / name).write_text('{"a":' * 100_000 + "}")
    with pytest.raises(InputError, match=name):
        report.write(tmp_path)


def test_escapes_whatever_the_files_say(tmp_path):
    told = config(model=HOSTILE, dataset=HOSTILE, targets=HOSTILE, **{HOSTILE: HOSTILE})
    told["federation"]["data"]["description"] = HOSTILE
    for name in ("trust", "method"):
        told["federation"][name] = [HOSTILE]
    for name in ("release", "command", "accounting"):
        told["federation"][name] = HOSTILE
    told["federation"]["environment"] = told["federation"]["base_files"] = {HOSTILE: HOSTILE}
    text = page(tmp_path, told, metrics(**SCORES, **{HOSTILE: (0.1, 0.2, 0.3)}))
    assert "<script" not in text
    assert "<img" not in text
    assert "&lt;script&gt;alert(&#34;x&#34;)&lt;/script&gt; &amp;" in text


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c["federation"]["clients"][0].update(records=HOSTILE),
        lambda c: c["federation"]["clients"][0].update(weight=HOSTILE),
        lambda c: c["federation"]["data"].update(test_records=HOSTILE),
        lambda c: c["federation"]["communication"].update(ratio=[]),
        lambda c: c["federation"].update(trust=HOSTILE),
        lambda c: c["federation"].update(environment=[HOSTILE]),
        lambda c: c.update(clients=6),
    ],
)
def test_what_is_not_of_its_type_is_refused(tmp_path, capsys, change):
    told = config()
    change(told)
    (tmp_path / "config.json").write_text(json.dumps(told))
    assert report.main([str(tmp_path)]) == 2
    assert "config.json is damaged" in capsys.readouterr().err


@pytest.mark.parametrize("infinite", [math.inf, "inf"])
def test_trust_none_says_there_is_no_privacy(tmp_path, infinite):
    told = config(trust="none", epsilon=None)
    told["federation"]["release"] = None
    rows = [row | {"epsilon": [infinite] * 2, "epsilon_max": infinite} for row in metrics(**SCORES)]
    text = page(tmp_path, told, rows)
    assert "There is no privacy in this run." in text
    assert tile(text, "epsilon") == "∞"
    assert "P(S | D)" not in text
    assert "Epsilon per round" not in text


@pytest.mark.parametrize(("trust", "release"), [("none", "for release"), ("local", None)])
def test_no_privacy_is_said_before_the_first_round_too(tmp_path, trust, release):
    told = config(trust=trust, epsilon=None if trust == "none" else 8.0)
    told["federation"]["release"] = release
    text = page(tmp_path, told)
    assert "There is no privacy in this run." in text
    assert tile(text, "epsilon") == "∞"


def test_an_infinite_epsilon_is_no_privacy_whatever_the_trust_is_called(tmp_path):
    rows = [row | {"epsilon": ["inf"] * 2, "epsilon_max": "inf"} for row in metrics(**SCORES)]
    assert "There is no privacy in this run." in page(tmp_path, config(), rows)


def test_a_private_run_does_not_deny_its_privacy(tmp_path):
    text = report.write(write_run(tmp_path)).read_text()
    assert "There is no privacy" not in text
    assert 'class="band' not in text
    spent = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["epsilon_max"]
    assert f"epsilon = {formats.epsilon(spent)} and delta = 0.001" in text
    assert "Ledger: 3 dispatches begun, 2 committed" in text


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: edit_lines(folder, lambda lines: lines[-1].update(epsilon=[0.1, 0.1], epsilon_max=0.1)),
        lambda folder: facts(release="NOT FOR RELEASE: --seed makes the noise reproducible")(folder),
        lambda folder: (folder / "privacy_ledger.jsonl").unlink(),
    ],
)
def test_what_the_ledger_does_not_confirm_is_not_claimed(tmp_path, damage):
    folder = write_run(tmp_path)
    damage(folder)
    text = report.write(folder).read_text()
    bands = re.findall(r'<div class="band[^>]*><b>(.*?)</b>', text)
    assert bands[0] == "Do not rely on these figures."
    assert "P(S | D)" not in text
    assert "NOT CONFIRMED by the ledger" in text
    said = (folder / "report.md").read_text()
    assert "**Do not rely on these figures.**" in said
    assert "The client that spent most" not in said


def test_marks_a_seed_synthetic_data_and_an_unfinished_run(tmp_path):
    told = config(rounds=40)
    told["federation"]["release"] = "NOT FOR RELEASE: --seed makes the noise reproducible"
    told["federation"]["data"]["synthetic"] = True
    bands = re.findall(r'<div class="band[^>]*><b>(.*?)</b>', page(tmp_path, told, metrics(**SCORES)))
    assert bands == [
        "Do not rely on these figures.",
        told["federation"]["release"],
        "Synthetic data.",
        "10 of 40 rounds.",
    ]


def test_every_flag_is_listed_to_its_last_digit(tmp_path):
    text = page(tmp_path, config(seed=1234567, client_lr=0.30000123), metrics(**SCORES))
    for name, value in {
        "clip_norm": "1.25",
        "delta": "1e-05",
        "trust": "local",
        "seed": "1234567",
        "client_lr": "0.30000123",
    }.items():
        assert f'<th scope="row">{name}</th><td>{value}</td>' in text


def test_reads_nothing_private(tmp_path):
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "metrics.jsonl").write_text('{"round": 1, "secret-marker": 0.123456}\n')
    assert "secret-marker" not in page(tmp_path, config(), metrics(**SCORES))
    # An audit hook sees every open and listing and cannot be taken off, hence a process of its own.
    code = (
        "import sys; from experiments import report; "
        "sys.addaudithook(lambda event, a: event in ('open', 'os.listdir', 'os.scandir') and print(a[0])); "
        "report.write(sys.argv[1])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    seen = {line.removeprefix(f"{tmp_path}/") for line in done.stdout.splitlines() if line.startswith(str(tmp_path))}
    seen.discard(str(tmp_path))  # opened to make its entries durable
    seen.discard(f"{tmp_path}-audit/audit.json")
    seen.discard("checkpoints")  # public; Python 3.13 tells of listing it where it is not there, too
    written = {"report.html.draft", "report.md.draft"}
    assert seen == {"config.json", "metrics.jsonl", "privacy_ledger.jsonl", "privacy_ledger.head"} | written


@pytest.mark.parametrize("rows", [None, [], metrics()])
def test_works_without_metrics(tmp_path, rows):
    text = page(tmp_path, config(), rows)
    assert tile(text, "test metrics") == "—"
    assert "One record is one headline." in text


def test_perplexity_takes_the_place_of_accuracy(tmp_path):
    text = page(tmp_path, config(), metrics(perplexity=(51.0, 30.0, 21.54)))
    assert tile(text, "test perplexity") == "21.54"
    assert "accuracy" not in text


def test_a_metric_that_is_not_finite_is_shown_as_what_it_is(tmp_path):
    """`files.plain` writes "nan", an earlier version wrote NaN; neither may look like a round that was not evaluated."""
    for last in ("nan", float("nan"), "inf"):
        scores = {"accuracy": (0.311, 0.652, last), "perplexity": (30.0, "inf", last)}
        text = page(tmp_path, config(), metrics(**scores))
        assert f'<div class="value">{last}</div>' in text
        assert f"| {last} |" in (tmp_path / "report.md").read_text()


def test_a_torn_line_is_damage_since_the_file_is_replaced_whole(tmp_path):
    page(tmp_path, config(), metrics(**SCORES))
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"round": 11, "epsil')
    with pytest.raises(InputError, match=r"metrics\.jsonl is damaged"):
        report.write(tmp_path)


def test_the_same_files_give_the_same_bytes(tmp_path):
    page(tmp_path, config(), metrics(**SCORES))
    first = (tmp_path / "report.html").read_bytes()
    command = [sys.executable, "-m", "experiments.report", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(tmp_path / "report.html")
    assert (tmp_path / "report.html").read_bytes() == first


@pytest.mark.parametrize("broken", [None, "{", "[1]"])
def test_a_missing_or_broken_config_is_one_sentence_and_2(tmp_path, capsys, broken):
    if broken:
        (tmp_path / "config.json").write_text(broken)
    assert report.main([str(tmp_path)]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert "config.json" in said.err
    assert not (tmp_path / "report.html").exists()


def test_importing_the_report_does_not_import_matplotlib():
    code = "import sys, experiments.report; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_bytes_in_all_are_of_the_uploads_that_were_sent(tmp_path):
    """Two rounds of five clients: all in the first, three in the second, of which one sent what was no number."""
    rows = metrics()[:3]
    rows[2] |= {"finished": 2, "dropped": [4]}
    told = config()
    for client, row in enumerate(told["federation"]["clients"]):
        row["rounds"] = 1 + (client < 3)
    text = page(tmp_path, told, rows)
    assert "bytes up, 8 uploads in 2 rounds" in text
    assert "rounds taken part in" in text
    assert "rounds taken part in" not in page(tmp_path, config(), metrics())
