"""A flagfile's line means what it says, or one sentence names the file and the line."""

import re

import pytest
from absl import flags as absl_flags

from dplora_jax.config import field_value
from dplora_jax.errors import InputError
from experiments import cli, export
from experiments.cli import flagfile_reader

BUDGET = "--epsilon=8\n"


@pytest.fixture
def parsed(tmp_path, monkeypatch):
    """`parsed(text)`: the RunConfig of a flagfile of `text` (str or bytes) and a budget, in the current folder."""
    monkeypatch.chdir(tmp_path)

    def parse(text, *more):
        content = text if isinstance(text, bytes) else text.encode()
        (tmp_path / "my.flags").write_bytes(content + (b"" if b"epsilon" in content else b"\n" + BUDGET.encode()))
        return cli.parse(["--flagfile=my.flags", *more])

    return parse


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("--workdir=out   # where to", "workdir", "out"),
        ("--workdir=out // where to", "workdir", "out"),
        ("--workdir=out\t#", "workdir", "out"),
        ("--workdir=a#b//c", "workdir", "a#b//c"),
        ('--text_column="text"', "text_column", "text"),
        ("--text_column='a text'  # a comment", "text_column", "a text"),
        ('--text_column="Item #1"', "text_column", "Item #1"),
        ("--text_column=patient's note", "text_column", "patient's note"),
        ("--text_column='\"x\"'", "text_column", '"x"'),
        ("--labels=good,very bad", "labels", ("good", "very bad")),
        ("-rounds=3", "rounds", 3),
        ("  --rounds=3  ", "rounds", 3),
        ("\u00a0--rounds=3\u00a0", "rounds", 3),
        ("--freeze_a  # B alone", "freeze_a", True),
        ("--nocache_frozen", "cache_frozen", False),
        ("// a comment\n# another\n\n--rounds=3", "rounds", 3),
        (b"\xef\xbb\xbf--rounds=3", "rounds", 3),
        (b"--rounds=3\r\n--epsilon=8\r\n", "rounds", 3),
        (b"--rounds=3\r--epsilon=8\r", "rounds", 3),
        ("--text_column=a\u2028b", "text_column", "a\u2028b"),  # which str.splitlines would cut
        ("--rounds=3\n--rounds=3", "rounds", 3),
    ],
)
def test_a_line_means_what_it_says(parsed, line, name, value):
    assert field_value(parsed(line), name) == value


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("rounds=1", "is not a flag"),
        ("- rounds=1", "names no flag"),
        ("--", "names no flag"),
        ("--rounds 1", "--rounds=1"),
        ("--text_column = text", "--text_column=text"),
        ("--text_column= text", "space"),
        ("--text_column", "no value"),  # which the next line would be taken for
        ('--text_column="text', "closing quote"),
        ('--labels="good","bad"', "behind its closing quote"),
        ("--text_column=\u201ctext\u201d", "typographic quote"),
        ("--text_column=\u00b4text\u00b4", "typographic quote"),
        ("\u2014rounds=1", "another dash"),
        ("\u2013\u2013rounds=1", "another dash"),
        ("-\u2011rounds=1", "another dash"),
        ("--workdir=out #where", "may be a comment"),
        ("--workdir=out //where", "may be a comment"),
        ("--workdir=out --rounds=1", "second flag"),
        ("--labels=good,\\", "continues no line"),
        ("--roundss=1", "Did you mean: rounds?"),
        ("--client-lr=1", "Did you mean: client_lr?"),
        ("--rounds=1e3", "whole number"),
        ("--freeze_a=maybe", "true or false"),
        ("--nofreeze_a=true", "argument"),
        ("--rounds=1\n--rounds=2", "line 1 too"),
        ("--flagfile=nowhere.flags", "neither here"),
        ("--flagfile=my.flags", "names itself"),
        ("--flagfile=", "neither here"),
        (b"--text_column=\xe9t\xe9", "UTF-8"),
        ("--rounds=1".encode("utf-16"), "UTF-16"),
    ],
)
def test_what_is_not_clear_is_refused_with_its_place(parsed, line, words):
    with pytest.raises(InputError) as caught:
        parsed(line)
    text = str(caught.value)
    assert words in text
    assert "\n" not in text
    assert "my.flags" in text
    assert "line " in text or "UTF-16" in text


def test_a_shipped_flagfile_is_found_from_one_in_any_folder(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "my.flags").write_text("--flagfile=finance.flags\n--rounds=2\n")
    (tmp_path / "mine" / "paper.flags").write_text("--flagfile=paper_gpt2_finance.flags\n--rounds=2\n")
    monkeypatch.chdir(tmp_path)
    config = cli.parse(["--flagfile=mine/my.flags"])
    assert (config.data.dataset, config.schedule.rounds, config.output.workdir) == ("finance_demo", 2, "runs/my")
    assert cli.parse(["--flagfile", str(tmp_path / "mine" / "paper.flags")]).schedule.rounds == 2


def test_a_flagfile_may_carry_the_shipped_ones_name(tmp_path, monkeypatch):
    (tmp_path / "finance.flags").write_text("--flagfile=finance.flags\n--rounds=2\n")
    monkeypatch.chdir(tmp_path)
    assert cli.parse(["--flagfile=finance.flags"]).data.dataset == "finance_demo"


def test_a_nested_flagfile_lies_beside_the_one_that_names_it(tmp_path, monkeypatch):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "one.flags").write_text("--flagfile=b/two.flags\n")
    (tmp_path / "a" / "b" / "two.flags").write_text("--flagfile=three.flags\n")
    (tmp_path / "a" / "b" / "three.flags").write_text("--rounds=3\n" + BUDGET)
    (tmp_path / "three.flags").write_text("--rounds=4\n" + BUDGET)
    monkeypatch.chdir(tmp_path)
    assert cli.parse(["--flagfile=a/one.flags"]).schedule.rounds == 3


def test_a_loop_over_two_files_is_refused_with_the_line(tmp_path, monkeypatch):
    (tmp_path / "one.flags").write_text("--flagfile=two.flags\n")
    (tmp_path / "two.flags").write_text("--rounds=1\n--flagfile=one.flags\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"two.flags, line 2: .*names itself"):
        cli.parse(["--flagfile=one.flags"])


def test_a_mistake_in_a_nested_flagfile_is_told_of_its_own_line(tmp_path, monkeypatch):
    (tmp_path / "one.flags").write_text("--rounds=1\n--flagfile=two.flags\n")
    (tmp_path / "two.flags").write_text("\n\n--rank=many\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"two.flags, line 3: .*rank"):
        cli.parse(["--flagfile=one.flags", "--epsilon=8"])


def test_a_flag_may_stand_in_two_files_and_the_later_wins(tmp_path, monkeypatch):
    (tmp_path / "one.flags").write_text("--rounds=1\n--flagfile=two.flags\n--rank=2\n")
    (tmp_path / "two.flags").write_text("--rank=3\n--rounds=4\n" + BUDGET)
    monkeypatch.chdir(tmp_path)
    config = cli.parse(["--flagfile=one.flags"])
    assert (config.schedule.rounds, config.lora.rank) == (4, 2)


def test_a_flag_that_may_be_repeated_may_be_in_a_file(tmp_path):
    values = absl_flags.FlagValues()
    absl_flags.DEFINE_multi_string("vary", [], "", flag_values=values)
    (tmp_path / "my.flags").write_text("--vary=epsilon=1|2\n--vary=rank=4|8\n")
    flagfile_reader.parse([f"--flagfile={tmp_path / 'my.flags'}"], values, "sweep")
    assert values.vary == ["epsilon=1|2", "rank=4|8"]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--text_column", "--label_column=x"], "no value"),  # absl takes the next flag for it
        (["\u2014rounds=1"], "another dash"),
        (["-\u2013rounds=1"], "Did you mean: rounds?"),
        (["--rounds=1e3"], "whole number"),
        (["--epsilon=8.0.0"], "must be a number"),
        (["--nofreeze_a=true"], "argument"),
        (["--", "--rounds=2"], "unexpected"),
    ],
)
def test_what_the_command_line_cannot_mean_is_one_sentence(argv, words):
    with pytest.raises(InputError, match=re.escape(words)):
        cli.parse(["--epsilon=8", *argv])


def test_other_commands_read_flagfiles_alike(tmp_path):
    (tmp_path / "my.flags").write_text("--out=there   # a new folder\n")
    with pytest.raises(InputError, match="give --workdir"):  # the rest of it was understood
        export.parse([f"--flagfile={tmp_path / 'my.flags'}"])
    (tmp_path / "my.flags").write_text("--out there\n")
    with pytest.raises(InputError, match="line 1"):
        export.parse([f"--flagfile={tmp_path / 'my.flags'}"])
