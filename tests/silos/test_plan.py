"""A plan is whole, signed and the same for all; a party holds it against its own house before it approves."""

import json
import math

import numpy as np
import pytest

from dplora_jax.errors import InputError
from dplora_jax.privacy import integers
from dplora_jax.silos import keys, plan
from experiments import silo
from tests.silos import small_silos
from tests.silos.plan_house import check, edited, run, table

pytestmark = pytest.mark.usefixtures("quick_compile")


def test_a_plan_may_begin_with_what_public_records_taught(house, tiny_bert, finance_table, tmp_path, capsys):
    """The sites need no public records: they hold the adapter that they are sent against the plan's digest."""
    path = tmp_path / "news.csv"
    path.write_text((finance_table / "test.csv").read_text().replace("good", "bullish"))
    cards = ",".join(str(house / name / keys.CARD) for name in small_silos.NAMES)
    settings = [
        f"--sites={cards}", "--dataset=csv", "--labels=bad,good", f"--model={tiny_bert}", "--rank=2", "--last_layers=1",
        "--rounds=3", "--epsilon=8", "--delta=1e-3", "--max_length=8", "--expected_batch_size=8",
    ]  # fmt: skip
    run("plan", *settings, f"--workdir={tmp_path / 'cold'}")
    public = [f"--public_data={path}", "--public_labels=bullish:good"]
    run("plan", *settings, *public, f"--workdir={tmp_path / 'warm'}")
    cold, warm = (np.load(tmp_path / name / plan.START) for name in ("cold", "warm"))
    assert cold.shape == warm.shape
    assert np.abs(warm - cold).max() > 1e-3
    made = plan.read(tmp_path / "warm" / plan.FILE)
    assert made.start == plan.hashlib.sha256(warm.astype("<f4")).hexdigest()
    assert "trained first on 30 public records of news.csv" in str(made.body["federation"]["method"])
    path.unlink()
    assert "costs north epsilon 7.99" in check(house, capsys, path=tmp_path / "warm" / plan.FILE, code=0)


def test_a_plan_that_fits_is_approved_and_its_epsilon_recomputed(house, capsys):
    said = check(house, capsys, code=0)
    assert "costs north epsilon 7.99" in said
    assert "recomputed here" in said
    made = plan.read(house / "coordinator" / plan.FILE)
    assert plan.approved(house / "north" / plan.APPROVAL, made) == 0
    with pytest.raises(InputError, match="no site"):
        made.number("west")
    shares = made.mode.shares(made.config, made.sizes, made.mechanisms)
    assert made.bits == integers.bits_for([shares])


def swapped(name):
    def change(body):
        other = body["sites"][1][name]
        body["sites"][1][name], body["sites"][0][name] = body["sites"][0][name], other

    return change


def alike(name):
    """The last site has this in its card as the first one has it."""

    def change(body):
        body["sites"][2][name] = body["sites"][0][name]

    return change


def of(path, value):
    """A change of one value of the plan."""

    def change(body):
        *parents, last = path
        for key in parents:
            body = body[key]
        body[last] = value(body[last]) if callable(value) else value

    return change


CHANGES = {
    "a swapped signing key": (swapped("ed25519"), "another ed25519 key of north"),
    "a swapped key for masks": (swapped("x25519"), "another x25519 key of north"),
    "two sites of one name": (alike("name"), "two sites have one name or one key"),
    "two sites of one signing key": (alike("ed25519"), "two sites have one name or one key"),
    "two sites of one key for masks": (alike("x25519"), "two sites have one name or one key"),
    "another model": (of(("model", "model.safetensors"), "0" * 64), "other files than the plan's"),
    "less noise": (
        of(("federation", "clients", 0, "noise_multiplier"), lambda x: x / 2),
        "noise_multiplier of north do not",
    ),
    "less noise elsewhere": (
        of(("federation", "clients", 2, "noise_multiplier"), 0.1),
        "noise_multiplier of east do not",
    ),
    "another sampling rate": (of(("federation", "clients", 0, "sampling_rate"), 0.9), "do not follow"),
    "another number of records": (of(("sites", 0, "records"), 21), "not the clients that its noise is for"),
    "other labels": (of(("config", "labels"), "bad,good,other"), "another shape"),
    "a robust mean": (of(("config", "robust"), "median"), "leave it out, or use --trust=local"),
    "noise that is not whole": (of(("config", "noise"), "independent"), "use --noise=hardened"),
    "no secret at all": (of(("config", "trust"), "client"), "trust=client"),
    "a coarser grid": (of(("bits",), 1), "grid of integers is 2^-1"),
    "a seed of its own": (of(("config", "seed"), 7), "has a seed, by which anyone can draw its noise"),
    "a schedule": (of(("config", "dropout"), 0.2), "leave out"),
    "a key for masks that everyone knows": (
        of(("sites", 2, "x25519"), "0" * 64),
        "its keys or its certificate are none",
    ),
    "a measure that is no number": (
        of(("measured",), {"center": ["nan"], "scale": 1.0}),
        "measured on public text does not fit",
    ),
    "no grid": (of(("bits",), None), "grid of integers does not fit"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_plan_that_does_not_fit_is_refused_though_the_coordinator_signed_it(house, capsys, tmp_path, what):
    change, words = CHANGES[what]
    assert words in check(house, capsys, path=edited(house, tmp_path, change), rehearsal=False)
    assert not (tmp_path / plan.APPROVAL).exists()


def test_what_a_site_keeps_and_prints_of_a_plan_is_reckoned_at_the_site(house, capsys, tmp_path):
    """Not what the coordinator says that it comes to."""
    lie = of(("federation", "trust"), ["NOTHING IS SEEN"])
    path = edited(house, tmp_path, lambda body: (lie(body), of(("federation", "clients", 0, "epsilon"), 0.001)(body)))
    said = check(house, capsys, path=path, code=0)
    assert "NOTHING IS SEEN" not in said
    assert "costs north epsilon 7.99" in said


def test_noise_of_a_seed_is_worth_nothing(house, tmp_path):
    made = plan.read(edited(house, tmp_path, of(("config", "seed"), 7)))
    assert [plan.own_epsilon(made, number) for number in range(3)] == [math.inf] * 3


@pytest.mark.parametrize("change", [of(("config", "rounds"), 2), of(("start",), "0" * 64), swapped("certificate")])
def test_a_plan_that_was_changed_on_its_way_is_refused(house, capsys, tmp_path, change):
    assert "is not signed by the coordinator" in check(house, capsys, path=edited(house, tmp_path, change, sign=False))


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"[]", b'{"plan": {}}', b'{"plan": 1, "signature": "00"}', b"\xff" * 100, b"[" * 10**5,
        b'{"plan": {"format": 2}, "signature": "' + b"0" * 128 + b'"}',
    ],
)  # fmt: skip
def test_what_is_no_plan_is_one_sentence(house, capsys, tmp_path, content):
    path = tmp_path / plan.FILE
    path.write_bytes(content)
    assert check(house, capsys, path=path).count("\n") == 1


def test_records_of_another_number_are_refused(house, capsys, tmp_path):
    own = tmp_path / "own"
    own.mkdir()
    rows = (house / "data" / "north" / "train.csv").read_text().splitlines()
    (own / "train.csv").write_text("\n".join(rows[:-1]) + "\n")
    assert "has 19 records, and the plan is for 20" in check(house, capsys, "--most_epsilon=8", f"--data_dir={own}")


def test_an_approval_is_of_one_plan_and_of_its_own_site(house, capsys, tmp_path):
    check(house, capsys, code=0)
    made = plan.read(house / "coordinator" / plan.FILE)
    other = plan.read(edited(house, tmp_path, of(("start",), "0" * 64)))
    with pytest.raises(InputError, match="does not approve this plan"):
        plan.approved(house / "north" / plan.APPROVAL, other)
    document = json.loads((house / "north" / plan.APPROVAL).read_text()) | {"site": "south"}
    (tmp_path / plan.APPROVAL).write_text(json.dumps(document))
    with pytest.raises(InputError, match="does not approve"):
        plan.approved(tmp_path / plan.APPROVAL, made)


def test_nobody_serves_or_coordinates_without_approvals(house, capsys, tmp_path):
    path = str(house / "coordinator" / plan.FILE)
    own = [word for word in table(house, "east") if not word.startswith("--dataset")]
    assert silo.main(["serve", path, f"--workdir={house / 'east'}", *own]) == 2
    assert "check the plan first" in capsys.readouterr().err
    assert silo.main(["coordinate", path, f"--workdir={house / 'coordinator'}"]) == 2
    assert "--approvals has none of north, south, east" in capsys.readouterr().err


def test_keys_are_their_owners_alone_and_are_never_replaced(house, capsys):
    for name in (*small_silos.NAMES, "coordinator"):
        private = house / name / "private"
        assert private.stat().st_mode & 0o777 == 0o700
        assert (private / keys.FILE).stat().st_mode & 0o777 == 0o600
        assert (house / name / "relay" / keys.TLS_KEY).stat().st_mode & 0o777 == 0o600
        card = (house / name / keys.CARD).read_text()
        held = json.loads((private / keys.FILE).read_text())
        assert held["ed25519"] not in card
        assert held["x25519"] not in card
    assert silo.main(["keys", "--name=north", "--records=20", f"--workdir={house / 'north'}"]) == 2
    assert "are not replaced" in capsys.readouterr().err


def test_the_start_is_the_plans(house):
    made = plan.read(house / "coordinator" / plan.FILE)
    start = np.load(house / "coordinator" / plan.START)
    assert plan.hashlib.sha256(start.astype("<f4")).hexdigest() == made.start
    assert len(start) == made.numbers


def test_private_rows_and_labels_are_not_in_the_plan(house):
    text = (house / "coordinator" / plan.FILE).read_text()
    for row in (house / "data" / "north" / "train.csv").read_text().splitlines()[1:]:
        assert row.split(",")[0] not in text
    assert "data_dir" not in text
