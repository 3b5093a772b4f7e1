"""Runs with --noise=hardened: whole, resumed, and refused where it cannot be kept."""

import json

import jax
import numpy as np
import pytest

from dplora_jax.errors import InputError
from dplora_jax.federation import dispatch
from dplora_jax.privacy import accounting, host_noise
from dplora_jax.privacy.hardened import Hardened
from dplora_jax.privacy.ledger import Ledger
from experiments import cli
from tests.experiments.small_runs import adapter_of, arguments, crash_before, fit, lines_of

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.fixture
def command(tiny_bert, finance_table, tmp_path):
    return arguments(tiny_bert, finance_table, tmp_path)


def test_a_hardened_run_costs_what_the_ledger_says_and_resumes_to_the_same_bits(
    command,
    tmp_path,
    monkeypatch,
):
    """In dispatches as short as the noise's memory asks; the first is lost before its checkpoint, and under a seed run again."""
    monkeypatch.setattr(host_noise, "DISPATCH_BYTES", 1)
    hardened = [*command, "--noise=hardened", "--seed=3", "--rounds=3", "--eval_every=3"]
    fit([*hardened, f"--workdir={tmp_path / 'whole'}"])
    ledger = Ledger(tmp_path / "whole" / "privacy_ledger.jsonl")
    assert [e["rounds"] for e in ledger.entries if e["entry"] == "begin"] == [[1, 2], [2, 3], [3, 4]]
    assert lines_of(tmp_path / "whole" / "metrics.jsonl")[-1]["epsilon"] == pytest.approx(ledger.epsilons(1e-3))
    assert max(ledger.epsilons(1e-3)) <= 8
    facts = json.loads((tmp_path / "whole" / "config.json").read_text())["federation"]
    assert any("SHAKE-256" in line and "2^-20" in line for line in facts["method"])

    lost, drawn, draw = [*hardened, f"--workdir={tmp_path / 'lost'}"], [], host_noise.round_draws
    monkeypatch.setattr(host_noise, "round_draws", lambda *a: drawn.append(draw(*a)) or drawn[-1])
    with monkeypatch.context() as patch:
        crash_before(patch, dispatch, "commit")
        with pytest.raises(KeyboardInterrupt):
            fit(lost)
    fit(lost)
    assert len(drawn) == 4
    jax.tree.map(np.testing.assert_array_equal, drawn[0], drawn[1])
    for k, client in enumerate(facts["clients"]):  # false alarms: 5 standard errors of some 700 draws
        noise = np.concatenate([x[:, k].reshape(-1) for x in jax.tree.leaves(drawn[0]["noise"])])
        assert noise.std() / 2**20 == pytest.approx(client["noise_multiplier"], rel=5 / np.sqrt(2 * noise.size))
    assert Ledger(tmp_path / "lost" / "privacy_ledger.jsonl").charged_rounds() == 3
    whole, resumed = (adapter_of(tmp_path / name) for name in ("whole", "lost"))
    assert all(np.array_equal(whole[name], resumed[name]) for name in whole)


REFUSED = [
    (["--trust=none"], "--trust=none"),
    (["--clipping=adaptive"], "adaptive"),
    (["--bands=2"], "--bands"),
]


@pytest.mark.parametrize(("extra", "words"), REFUSED)
def test_combinations_that_hardened_noise_does_not_serve_are_refused(command, extra, words):
    with pytest.raises(InputError, match=words):
        cli.parse([*command, "--noise=hardened", *extra])


def test_an_unknown_noise_is_refused_by_the_known_ones(command):
    with pytest.raises(InputError, match="independent, banded, banded_rounds or hardened"):
        cli.parse([*command, "--noise=loud"])


def two(mechanism):
    return [mechanism], [[mechanism]]


def test_an_epsilon_that_the_generator_cannot_vouch_for_is_refused(command):
    config, adapter = cli.parse([*command, "--noise=hardened", "--rounds=1", "--local_steps=1"]), {"a": np.zeros(9)}
    assert Hardened.from_config(config, *two(accounting.Mechanism(10, 1.0, 10, 1.0)), adapter).bits == 20
    with pytest.raises(InputError, match="more than the accountant sets aside"):
        Hardened.from_config(config, *two(accounting.Mechanism(10, 1.0, 10, 0.08)), adapter)


def test_the_generators_distance_is_far_below_delta():
    """And below what the accountant sets aside. The largest job that fits: a thousand rounds of 2^26 parameters at epsilon 8."""
    assert host_noise.excess_log2(1000 * 2**26, 8) < np.log2(accounting.ROUNDING * 1e-11)
