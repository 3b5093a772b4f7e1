"""What a trust mode makes of the flags: the mechanism that is accounted, the noise that is added, and what is refused."""

import dataclasses
import json
import math

import pytest

from dplora_jax.config import to_flat
from dplora_jax.errors import InputError
from dplora_jax.federation import calibration, trust
from dplora_jax.privacy import accounting, secrets, size_classes
from dplora_jax.privacy.accounting import Mechanism
from dplora_jax.privacy.ledger import Ledger
from experiments import cli, report
from experiments.run import summary
from tests.experiments.small_runs import fit

pytestmark = pytest.mark.usefixtures("quick_compile")

SIZES = (400, 60, 900)
DISTRIBUTED = ["--trust=distributed", "--clients=3", "--rounds=10", "--epsilon=4"]
CLIENT = ["--trust=client", "--clients=30", "--client_rate=0.3", "--rounds=10", "--local_steps=3", "--epsilon=4"]


def mechanisms(config, sizes=SIZES, stored=None):
    return calibration.kept(stored, sizes) if stored else calibration.mechanisms(config, sizes)


def test_distributed_noise_is_one_for_all_and_the_client_that_needs_most_spends_its_budget():
    config = cli.parse(DISTRIBUTED)
    found = mechanisms(config)
    assert len({m.noise_multiplier for m in found}) == 1
    spent = [accounting.epsilon(m, 10, config.privacy.delta) for m in found]
    assert max(spent) <= 4
    assert max(spent) == spent[1] > 3.98  # the least client samples at the highest rate
    assert [(m.records, m.sampling_rate) for m in found] == [(n, min(1, 64 / n)) for n in SIZES]


@pytest.mark.parametrize(
    ("more", "honest"),
    [
        ([], 2),
        (["--clients=9"], 8),
        (["--clients=9", "--survivors=7"], 6),
        (["--clients=9", "--survivors=7", "--colluding=4"], 3),
    ],
)
def test_the_shares_of_the_clients_that_are_counted_on_make_the_whole_noise(more, honest):
    """h is at most K - 1: the adversary may be one of the clients."""
    config = cli.parse([*DISTRIBUTED, *more])
    sizes = [100] * config.schedule.clients
    found = mechanisms(config, sizes)
    trust_mode = trust.mode(config)
    shares = [m.noise_multiplier for m in trust_mode.shares(config, sizes, found)]
    assert math.sqrt(sum(share**2 for share in shares[:honest])) == pytest.approx(found[0].noise_multiplier)
    rule = trust_mode.rule(config, found, sizes, None)
    assert rule.survivors == (config.privacy.survivors or config.schedule.clients)
    assert rule.divisor == pytest.approx(64 * config.schedule.clients)


def test_clients_are_the_records_of_mode_client_and_a_round_is_one_step():
    config = cli.parse(CLIENT)
    found = mechanisms(config, [50] * 30)
    assert found == [Mechanism(30, 0.3, 30, found[0].noise_multiplier)] * 30
    assert trust.mode(config).steps_per_round(config) == 1
    assert 3.98 < accounting.epsilon(found[0], 10, config.privacy.delta) <= 4
    trust_mode = trust.mode(config)
    rule = trust_mode.rule(config, found, [50] * 30, None)
    assert rule.noise_std == pytest.approx(found[0].noise_multiplier * config.privacy.clip_norm)
    assert (rule.clip_norm, rule.divisor) == (config.privacy.clip_norm, pytest.approx(9))
    assert {m.noise_multiplier for m in trust_mode.shares(config, [50] * 30, found)} == {0}
    assert trust_mode.parties(config) == 31
    assert trust_mode.joining(config) == 0.3


@pytest.mark.parametrize("argv", [DISTRIBUTED, [*CLIENT, "--clients=3"]], ids=["distributed", "client"])
def test_a_resumed_run_keeps_its_mechanisms(argv):
    """config.json tells each client's records; the mechanism's own are the clients in mode client."""
    config = cli.parse(argv)
    found = mechanisms(config)
    rows = [dataclasses.asdict(m) | {"records": n} for m, n in zip(found, SIZES, strict=True)]
    stored = to_flat(config) | {"federation": {"clients": rows}}
    assert mechanisms(config, SIZES, stored) == found


@pytest.fixture
def two_classes(monkeypatch):
    """Three sizes are many: 60 and 400 make one class, 900 another."""
    monkeypatch.setattr(size_classes, "MOST", 2)
    monkeypatch.setattr(
        size_classes, "bounds_by_size", lambda sizes, _: {60: (60, 400), 400: (60, 400), 900: (900, 900)}
    )


@pytest.mark.parametrize(
    "argv", [DISTRIBUTED, ["--clients=3", "--rounds=10", "--epsilon=4"]], ids=["distributed", "local"]
)
def test_clients_of_a_class_keep_their_own_size_divisor_and_weight(argv, two_classes):
    """And a resumed run reads from config.json both their own records and those that are accounted."""
    config = cli.parse(argv)
    found = mechanisms(config)
    assert [(m.records, m.sampling_rate) for m in found] == [(400, 1), (400, 1), (900, 64 / 900)]
    assert all(accounting.epsilon(m, 10, config.privacy.delta) <= 4 for m in found)
    expected = [400, 60, 64]
    trust_mode = trust.mode(config)
    assert trust_mode.expected(config, SIZES, found) == pytest.approx(expected)
    assert trust.expected_examples(config, SIZES, found) == pytest.approx(sum(expected))
    if config.privacy.trust == "distributed":
        assert trust_mode.rule(config, found, SIZES, None).divisor == pytest.approx(sum(expected))
        assert trust_mode.weights(config, SIZES, found) == pytest.approx([part / 524 for part in expected])
    rows = [
        dataclasses.asdict(m) | {"records": n, "sampled_from": m.records} for m, n in zip(found, SIZES, strict=True)
    ]
    stored = to_flat(config) | {"federation": {"clients": rows}}
    assert mechanisms(config, SIZES, stored) == found


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([*DISTRIBUTED, "--local_steps=2"], "--local_steps"),
        ([*DISTRIBUTED, "--client_optimizer=adam"], "--client_optimizer"),
        ([*DISTRIBUTED, "--clients=1"], "no honest noise"),
        ([*DISTRIBUTED, "--survivors=1"], "no honest noise"),
        ([*DISTRIBUTED, "--colluding=3"], "no honest noise"),
        ([*DISTRIBUTED, "--colluding=0"], "--colluding"),
        ([*DISTRIBUTED, "--survivors=4"], "--survivors"),
        ([*DISTRIBUTED, "--survivors=0"], "--survivors"),
        ([*DISTRIBUTED, "--dropout=1"], "--dropout"),
        ([*DISTRIBUTED, "--dropout=nan"], "--dropout"),
        ([*DISTRIBUTED, "--client_rate=0.5"], "--client_rate belongs to --trust=client"),
        ([*DISTRIBUTED, "--clip_norm=inf"], "--clip_norm"),
        ([*DISTRIBUTED, "--epsilon=none"], "--trust=distributed needs --epsilon"),
        ([*CLIENT, "--epsilon=none"], "--trust=client needs --epsilon"),
        ([*CLIENT, "--client_rate=0"], "--client_rate"),
        ([*CLIENT, "--client_rate=1.5"], "--client_rate"),
        ([*CLIENT, "--client_rate=nan"], "--client_rate"),
        ([*CLIENT, "--delta=0.04"], "1 / --clients=30"),
        ([*CLIENT, "--clip_norm=inf"], "--clip_norm"),
        ([*CLIENT, "--survivors=3"], "--survivors belongs to --trust=distributed"),
        (["--epsilon=8", "--colluding=2"], "--colluding belongs to --trust=distributed"),
        ([*CLIENT, "--dropout=0.1"], "--dropout cannot be used with --trust=client"),
        (["--epsilon=8", "--client_rate=0.5"], "--client_rate belongs"),  # in mode local it amplifies nothing
        (["--trust=client", "--epsilon=inf", "--client_rate=0.5"], "--client_rate belongs"),
    ],
)
def test_a_combination_without_a_guarantee_is_refused_by_name(argv, words):
    with pytest.raises(InputError, match=words) as caught:
        cli.parse(argv)
    assert "\n" not in str(caught.value)


def test_a_budget_that_no_noise_keeps_is_refused_in_mode_client():
    config = cli.parse(["--trust=client", "--clients=3", "--rounds=2000", "--epsilon=0.001"])
    with pytest.raises(InputError, match="out of reach"):
        mechanisms(config, [50] * 3)


@pytest.mark.parametrize(
    ("mode", "more", "told"),
    [
        ("distributed", ["--dropout=0.5", "--survivors=2", "--seed=2"], ("SIMULATED", "simulated")),
        (
            "client",
            ["--local_steps=2", "--client_rate=0.5", "--client_optimizer=adam"],
            ("TRUSTED", "client as a whole"),
        ),
    ],
)
def test_a_run_accounts_and_tells_its_mode(mode, more, told, tiny_bert, finance_table, tmp_path, monkeypatch):
    """And epsilon in the metrics is what the ledger recomputes."""
    made = []
    real = secrets.load_or_create
    monkeypatch.setattr(secrets, "load_or_create", lambda *args: made.append(real(*args)) or made[-1])
    command = [
        f"--model={tiny_bert}", "--dataset=csv", f"--data_dir={finance_table}", "--text_column=text", "--label_column=label",
        "--max_length=8", "--clients=3", "--rounds=4", "--expected_batch_size=8", "--rank=2", "--epsilon=8", "--delta=1e-3",
        "--eval_every=4", "--head_only", f"--workdir={tmp_path}", f"--trust={mode}", *more,
    ]  # fmt: skip
    fit(command)
    assert told[1] in summary.line(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    ledger = Ledger(tmp_path / "privacy_ledger.jsonl")
    assert lines[-1]["epsilon"] == pytest.approx(ledger.epsilons(1e-3))
    assert 7.9 < lines[-1]["epsilon_max"] <= 8
    document = json.loads((tmp_path / "config.json").read_text())
    assert told[0] in document["federation"]["trust"][0]
    assert [client["records"] for client in document["federation"]["clients"]] == [20, 20, 20]
    assert told[0] in report.write(tmp_path).read_text()
    if mode == "client":
        assert len(made[0]) == 4  # the server's own is among them
        assert len(set(lines[-1]["epsilon"])) == 1
        assert not any("survivors" in line for line in lines)  # who took part is private
    else:
        assert [line["void"] for line in lines[1:]] == [line["survivors"] < 2 for line in lines[1:]]
        assert document["colluding"] == 1
