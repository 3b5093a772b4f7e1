"""Whatever stands in a workdir's files, `verify` and `show` end with a verdict or with one sentence."""

import copy
import json
import os
import shutil
import signal

import hypothesis
import pytest
from hypothesis import strategies as st

from dplora_jax import json_files
from dplora_jax.privacy.ledger import Ledger
from tests.experiments.ledger_workdirs import MECHANISMS, edit, reforge, run, write_checkpoint, write_run

BOUND = 60  # seconds: not what it takes, but what no honest machine needs


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """A run whose secrets are destroyed, so that whoever has its folder can rewrite everything."""
    folder = write_run(tmp_path_factory.mktemp("run"))
    shutil.rmtree(folder / "private")
    return folder


@pytest.fixture(autouse=True)
def nothing_is_made_durable(monkeypatch):
    """Forging takes no durability, and most of a test's time otherwise."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture
def workdir(pristine, tmp_path):
    return shutil.copytree(pristine, tmp_path / "hostile")


def _hangs(*_):
    raise AssertionError(f"no verdict in {BOUND} seconds")


def verdict(capsys, command, workdir):
    """The exit code, and that it says one sentence where that is 2; SIGALRM ends what never ends."""
    signal.signal(signal.SIGALRM, _hangs)
    signal.alarm(BOUND)
    try:
        code, out, err = run(capsys, command, workdir)
    finally:
        signal.alarm(0)
    assert (code, bool(out)) == (0, True) or (code, out, err.count("\n")) == (2, "", 1), err
    assert len(err) < 1000
    return code, err


SCALARS = (
    st.none() | st.booleans() | st.integers() | st.sampled_from([10**9, 10**12, 10**400, -1, 0, 2**63, 1e-9, 1e308, 1e-320])
    | st.floats() | st.text(max_size=8) | st.sampled_from(["inf", "[/red]", "\x1b[2J", "fixed:x", "poisson:1e9", "é\ud800"])
)  # fmt: skip
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3), max_leaves=6
)  # fmt: skip


def places(value, at=()):
    """The path of every field and item of a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path for key, item in inner for path in ((*at, key), *places(item, (*at, key)))]


def put(value, path, new):
    for key in path[:-1]:
        value = value[key]
    value[path[-1]] = new


@hypothesis.settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(hypothesis.HealthCheck)
)
@hypothesis.given(st.data())
def test_any_value_in_any_field_is_a_verdict_or_one_sentence(pristine, tmp_path_factory, capsys, data):
    workdir = shutil.copytree(pristine, tmp_path_factory.mktemp("mutant") / "w")
    file = data.draw(st.sampled_from(["privacy_ledger.jsonl", "privacy_ledger.head", "config.json", "metrics.jsonl"]))
    text = (workdir / file).read_text()
    values = [json.loads(line) for line in ([text] if file == "config.json" else text.splitlines())]
    for _ in range(data.draw(st.integers(1, 2))):
        path = data.draw(st.sampled_from(places(values)))
        put(values, path, data.draw(VALUES))
    if file == "privacy_ledger.jsonl":
        rest = iter(values)
        reforge(workdir, lambda _: lasting(next(rest)))
    else:
        (workdir / file).write_text("".join(json.dumps(value) + "\n" for value in values))
    verdict(capsys, data.draw(st.sampled_from(["verify", "show"])), workdir)


def lasting(entry):
    """An entry without what a chain writes itself."""
    return {k: v for k, v in entry.items() if k not in ("previous", "seal")} if isinstance(entry, dict) else {}


@pytest.mark.parametrize("number", [0, 1, 5])  # a begin, a commit and the end
def test_each_field_of_an_entry_is_of_its_type(workdir, capsys, number):
    path = workdir / "privacy_ledger.jsonl"
    kept = [lasting(json.loads(line)) for line in path.read_text().splitlines()]
    names = {place[-1]: place for place in places(kept[number]) if place[-1] != "code"}
    for name, place in names.items():
        for value in ([[1]], {"a": {"b": []}}, "x" * 300, 10**400, -1):
            entries = copy.deepcopy(kept)
            put(entries[number], place, value)
            rest = iter(entries)
            reforge(workdir, lambda _, rest=rest: next(rest))
            assert "line" in verdict(capsys, "verify", workdir)[1], (name, value)


@pytest.mark.parametrize("name", ["privacy_ledger.jsonl", "privacy_ledger.head", "config.json", "metrics.jsonl"])
@pytest.mark.parametrize(
    "write",
    [
        lambda path: path.write_text("[" * 100_000),
        lambda path: path.write_text('{"a":' * 100_000),
        lambda path: path.write_text("[" + "[]," * 600_000 + "[]]\n"),
        lambda path: path.write_text('"' + "x" * 2_000_000),
        lambda path: path.write_text("\n" * 2_000_000),
        lambda path: path.write_bytes(b"\xff\xfe" * 1000),
        lambda path: path.open("wb").truncate(json_files.MOST_BYTES + 1),  # no block of it is on the disk
        lambda path: path.mkdir(),
        lambda path: os.mkfifo(path),  # a reader would wait for ever
        lambda path: path.symlink_to("/dev/zero"),
        lambda path: path.symlink_to(path.name),
    ],
    ids=["deep list", "deep object", "many lists", "long text", "empty lines", "no text", "huge", "folder", "pipe", "device",
         "itself"],
)  # fmt: skip
def test_a_file_of_any_kind_and_size_is_one_sentence(workdir, capsys, name, write):
    (workdir / name).unlink()
    write(workdir / name)
    assert verdict(capsys, "verify", workdir)[0] == 2


def test_checkpoints_of_any_name_and_note_are_one_sentence(workdir, capsys):
    for name in ("1²", "٣", "9" * 200, "7.tmp"):
        (workdir / "checkpoints" / name).mkdir()
    assert verdict(capsys, "verify", workdir)[0] == 0
    write_checkpoint(workdir, 9, {"entries": 1e300, "head": []})
    assert "checkpoints/9 is damaged" in verdict(capsys, "verify", workdir)[1]
    (workdir / "checkpoints" / "9" / "notes" / "metadata").write_text("[" * 100_000)
    assert "checkpoints/9 is damaged" in verdict(capsys, "verify", workdir)[1]


def test_secrets_of_any_kind_are_one_sentence(workdir, capsys):
    (workdir / "private").mkdir()
    for text in ("[" * 100_000, '["zz"]', "{}", json.dumps(["a" * 63])):
        (workdir / "private" / "secrets.json").write_text(text)
        assert "secrets.json is damaged" in verdict(capsys, "verify", workdir)[1]


def test_work_follows_what_a_run_may_be(workdir, capsys):
    """Rounds, clients, steps and noise beyond what flags allow are refused before anything is reckoned by them."""
    many = 10**9
    for change in (
        {"rounds": many}, {"local_steps": many}, {"clients": many}, {"expected_batch_size": 1e300}, {"delta": 1e-320},
        {"epsilon": None, "noise_multiplier": 1e-9}, {"rounds": 10**6, "participation": "fixed:1", "clients": 100},
        {"clipping": "adaptive", "count_noise_multiplier": 1e-300}, {"epsilon": 1e-300},
    ):  # fmt: skip
        fresh = shutil.copytree(workdir, workdir.with_name("-".join(change)))
        edit(fresh / "config.json", lambda config, change=change: config.update(change))
        assert verdict(capsys, "verify", fresh)[0] == 2


def test_a_million_rounds_begun_again_and_again_are_held_as_spans(workdir, capsys):
    shutil.rmtree(workdir / "checkpoints")
    for path in workdir.glob("privacy_ledger.*"):
        path.unlink()
    forged = Ledger(workdir / "privacy_ledger.jsonl")
    for attempt in range(50):
        forged.begin((1, 10**6), attempt, MECHANISMS, 2, {}, steps=[8, 8])
    assert "entry 1 has other rounds" in verdict(capsys, "verify", workdir)[1]
