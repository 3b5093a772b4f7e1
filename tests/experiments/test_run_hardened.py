"""Runs with --noise=hardened: whole, resumed, and refused where it cannot be kept."""

import json
import pathlib

import numpy as np
import pytest
from test_run import adapter_of, command, crash_before, lines_of  # noqa: F401 - a fixture among them

from dplora_jax.errors import InputError
from dplora_jax.privacy import accounting, host_noise
from dplora_jax.privacy.ledger import Ledger
from experiments import flags, run


def test_a_hardened_run_costs_what_the_ledger_says_and_resumes_to_the_same_bits(
    command,  # noqa: F811
    tmp_path,
    monkeypatch,
):
    """Dispatches of one round, then one that is lost before its checkpoint and replayed."""
    hardened = [*command, "--noise=hardened", "--seed=3", "--eval_every=3"]
    monkeypatch.setattr(host_noise, "DISPATCH_BYTES", 1)
    assert run.main([*hardened, f"--workdir={tmp_path / 'whole'}"]) == 0
    ledger = Ledger(tmp_path / "whole" / "privacy_ledger.jsonl")
    assert [e["rounds"] for e in ledger.entries if e["entry"] == "begin"] == [[n, n + 1] for n in range(1, 7)]
    assert lines_of(tmp_path / "whole" / "metrics.jsonl")[-1]["epsilon"] == pytest.approx(ledger.epsilons(1e-3))
    assert max(ledger.epsilons(1e-3)) <= 8
    said = json.loads((tmp_path / "whole" / "config.json").read_text())["federation"]["method"]
    assert any("SHAKE-256" in line and "2^-20" in line for line in said)

    monkeypatch.setattr(host_noise, "DISPATCH_BYTES", 1 << 30)
    with monkeypatch.context() as patch:
        crash_before(patch, "_commit")
        with pytest.raises(KeyboardInterrupt):
            run.main([*hardened, f"--workdir={tmp_path / 'lost'}"])
    drawn = []
    draw = host_noise.round_draws
    monkeypatch.setattr(host_noise, "round_draws", lambda *a: drawn.append(draw(*a)) or drawn[-1])
    assert run.main([*hardened, f"--workdir={tmp_path / 'lost'}"]) == 0
    assert [len(d["sampling"]) for d in drawn] == [3, 3]
    assert Ledger(tmp_path / "lost" / "privacy_ledger.jsonl").charged_rounds() == 6
    whole, lost = (adapter_of(tmp_path / name) for name in ("whole", "lost"))
    assert all(np.allclose(whole[name], lost[name], atol=1e-6) for name in whole)


REFUSED = [
    (["--trust=none"], "--trust=none"),
    (["--clipping=adaptive"], "adaptive"),
    (["--bands=2"], "--bands"),
]


@pytest.mark.parametrize(("extra", "words"), REFUSED)
def test_combinations_that_hardened_noise_does_not_serve_are_refused(command, extra, words):  # noqa: F811
    with pytest.raises(InputError, match=words):
        flags.parse([*command, "--noise=hardened", *extra])


def test_an_unknown_noise_is_refused_by_the_known_ones(command):  # noqa: F811
    with pytest.raises(InputError, match="independent, banded, hardened"):
        flags.parse([*command, "--noise=loud"])


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["--epsilon=300"], "hundredth of --delta"),
        (["--epsilon=none", "--noise_multiplier=50000"], "32-bit"),
    ],
)
def test_what_the_integers_cannot_vouch_for_is_refused_before_anything_is_charged(
    command,  # noqa: F811
    tmp_path,
    capsys,
    extra,
    words,
):
    assert run.main([*command, "--noise=hardened", *extra]) == 2
    assert words in capsys.readouterr().err
    assert not pathlib.Path(tmp_path / "run" / "privacy_ledger.jsonl").exists()


def test_the_generators_distance_is_far_below_delta():
    """The largest job that fits: a thousand rounds of 2^26 parameters at epsilon 8."""
    assert host_noise.excess_log2(1000 * 2**26, 8) < np.log2(1e-5 * 1e-20)
    assert accounting.Mechanism(10, 0.5, 10, 1.0).accounted_noise == 1.0
