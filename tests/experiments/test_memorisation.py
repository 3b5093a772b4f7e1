"""Secrets in one client's text: they are found where training remembers them, and not where it never saw them."""

import json
import string

import numpy as np
import pytest

from dplora_jax.finetuning import dealing, recipe
from experiments.attacks import memorisation
from tests import letters

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A golden Llama whose tokens are single characters."""
    return letters.write(tmp_path_factory.mktemp("base") / "model", [*string.ascii_letters, *string.digits, " ", "."])


@pytest.fixture
def command(base, tmp_path):
    rng = np.random.default_rng(0)
    lines = ["".join(string.ascii_lowercase[i] for i in rng.integers(0, 26, 12)) for _ in range(24)]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.txt").write_text("\n".join(lines) + "\n")
    return [
        f"--model={base}", "--dataset=text", f"--data_dir={tmp_path / 'data'}", "--max_length=48", "--clients=2", "--rounds=60",
        "--expected_batch_size=24", "--rank=16", "--targets=all-linear", "--epsilon=1", "--delta=1e-3", "--client_lr=0.02",
        "--client_optimizer=adam", "--eval_every=0", "--canaries=2", "--copies=16", "--candidates=99",
        f"--workdir={tmp_path / 'out'}",
    ]  # fmt: skip


@pytest.mark.slow
def test_secrets_that_many_records_repeat_are_learned_without_privacy_and_not_with(command, tmp_path):
    assert memorisation.main(command) == 0
    document = json.loads((tmp_path / "out" / "memorisation.json").read_text())
    base, bare, private = document["runs"]
    most = np.log2(100)
    assert np.mean(bare["exposure"]) > 0.9 * most
    assert np.mean(private["exposure"]) < 0.75 * most
    assert max(base["exposure"]) < most
    assert sum(bare["extracted"]) >= 1
    assert not any(private["extracted"] + base["extracted"])
    assert [line["epsilon"] for line in document["runs"]][:2] == ["-", "inf"]
    assert float(private["epsilon"]) <= 1


def test_a_row_too_short_for_a_secret_is_refused(command, capsys):
    assert memorisation.main([*command, "--max_length=20"]) == 2
    assert "would cut off its secret" in capsys.readouterr().err


def test_canaries_are_client_0s_records_and_nobody_elses(command):
    config, own = memorisation.parse(command)
    dealt = dealing.deal(config)
    found = memorisation.canaries(own)
    more = memorisation.with_canaries(dealt, found, own.copies)
    (plain, before), (table, places) = dealt.read([0, 1]), more.read([0, 1])
    assert len(places[0]) == len(before[0]) + 32
    assert [table.texts[i] for i in places[1]] == [plain.texts[i] for i in before[1]]
    added = [table.texts[i] for i in places[0][len(before[0]) :]]
    assert sorted(set(added)) == sorted(c.beginning + c.secret for c in found)
    other, _ = more.read([1])
    assert not any(c.secret in text for text in other.texts for c in found)
    assert len({c.secret for c in found}) == 2


def test_auto_chooses_here_too(command, capsys):
    plain = [word for word in command if not word.startswith(("--rounds", "--clip_norm"))]
    config, _ = memorisation.parse([*plain, "--auto"])
    expected = recipe.chosen([12, 12], 2, 1.0, "language_model")
    assert (config.schedule.rounds, config.privacy.clip_norm) == (expected["rounds"], expected["clip_norm"])
    assert "--auto chose" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--epsilon=inf"], "compares a private run with one without"),
        (["--label_column=x", "--labels=a,b", "--dataset=csv", "--text_column=t"], "no train.csv"),
        (["--partition=folders"], "another --partition"),
        (["--aggregation=flora"], "only fedavg"),
    ],
)
def test_what_cannot_be_compared_is_one_sentence(command, more, sentence, capsys):
    assert memorisation.main([*command, *more]) == 2
    assert sentence in capsys.readouterr().err
