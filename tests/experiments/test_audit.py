"""The attack on the real program: an intact mechanism is never contradicted, a broken one always is.

Every break is planted in the project's own modules at a claimed epsilon of 1, and found by the one procedure that knows of
none. Seeds are fixed; a bound fails for at most one seed in a thousand, which is the false-alarm rate of each intact audit.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dplora_jax import losses
from dplora_jax.federation import round, units
from dplora_jax.privacy import auditing, clipping, noise, sampling, secrets
from experiments.attacks import audit, canaries, membership
from tests.conftest import mostly_slow

pytestmark = pytest.mark.usefixtures("quick_compile")
GAUSSIAN, KEYS, THRESHOLD, CLIPPED = noise.gaussian, secrets.round_keys, sampling.threshold, clipping.clipped_grad_sum


def attack(subject, seed=0, planted=False, runs=1):
    """(claim, the larger bound, Bound); a planted break needs a program of its own."""
    program = round.make(subject.federation, subject.grid, transcript=True) if planted else None
    claim, bound = canaries.audit(subject, runs, 1, np.random.default_rng(seed), program)
    return claim, max(bound.guesses, bound.curve), bound


@pytest.fixture(scope="module")
def subject():
    """A claim of epsilon 1: every record in every step."""
    return canaries.small(1.0)


@pytest.fixture(scope="module")
def sampled():
    """A claim of epsilon 1: one record in twenty in a step."""
    return canaries.small(1.0, records=20, rate=0.05, rounds=3)


@pytest.mark.parametrize("seed", mostly_slow((0,), range(3)))
def test_an_intact_mechanism_is_not_contradicted(subject, seed):
    claim, bound, _ = attack(subject, seed)
    assert bound <= claim <= 1


def no_noise(keys, tree, std, step):
    return jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), tree)


def forgotten(index):
    """Noise on all matrices but one."""

    def gaussian(keys, tree, std, step):
        leaves, treedef = jax.tree.flatten(GAUSSIAN(keys, tree, std, step))
        leaves[index] = jnp.zeros_like(leaves[index])
        return treedef.unflatten(leaves)

    return gaussian


def clipped_after_the_sum(loss_fn, adapter, batch, clip_norm, weights=None, form="auto", mode="flat", bits=None):
    total = jax.grad(lambda a: (weights * loss_fn(a, batch)).sum())(adapter)
    norm = jnp.sqrt(sum(jnp.square(g).sum() for g in jax.tree.leaves(total)))
    return jax.tree.map(lambda g: g * clip_norm / jnp.maximum(norm, clip_norm), total), weights, weights


def unclipped_head(loss_fn, adapter, batch, clip_norm, weights=None, form="auto", mode="flat", bits=None):
    """The norm is of the layers' matrices alone."""

    def one(example):
        grad = jax.grad(lambda a: loss_fn(a, jax.tree.map(lambda x: x[None], example))[0])(adapter)
        norm = jnp.sqrt(sum(jnp.square(g).sum() for g in jax.tree.leaves(grad["layers"])))
        return grad | {"layers": jax.tree.map(lambda g: g * clip_norm / jnp.maximum(norm, clip_norm), grad["layers"])}

    return jax.tree.map(lambda g: jnp.tensordot(weights, g, 1), jax.vmap(one)(batch)), weights, weights


def same_noise_every_round(keys, rounds, attempt, *_):
    return KEYS(keys, rounds, attempt) | {"noise": KEYS(keys, [1] * len(rounds), attempt)["noise"]}


def same_noise_everywhere(keys, rounds, attempt, *_):
    return KEYS(keys, rounds, attempt) | {"noise": KEYS([keys[0]] * len(keys), rounds, attempt)["noise"]}


@pytest.mark.parametrize(
    ("module", "name", "broken"),
    [
        (noise, "gaussian", no_noise),
        pytest.param(noise, "gaussian", forgotten(2), marks=pytest.mark.slow),
        pytest.param(clipping, "clipped_grad_sum", unclipped_head, marks=pytest.mark.slow),
    ],
    ids=["no noise", "noise forgotten on one matrix", "clip missing on the head"],
)
def test_a_broken_step_is_caught(subject, monkeypatch, module, name, broken):
    monkeypatch.setattr(module, name, broken)
    claim, bound, _ = attack(subject, planted=True)
    assert bound > claim


@pytest.mark.slow
def test_clipping_after_the_sum_is_caught(subject, monkeypatch):
    """It doubles what one record moves, so that it takes more coins than the others."""
    monkeypatch.setattr(clipping, "clipped_grad_sum", clipped_after_the_sum)
    claim, bound, _ = attack(subject, planted=True, runs=4)
    assert bound > claim


@pytest.mark.parametrize("keys", [same_noise_every_round, same_noise_everywhere], ids=["rounds", "clients"])
def test_noise_used_again_is_caught(subject, monkeypatch, keys):
    monkeypatch.setattr(secrets, "round_keys", keys)
    claim, bound, _ = attack(subject)
    assert bound > claim


@pytest.mark.slow
def test_sampling_ten_times_too_often_is_caught(sampled, monkeypatch):
    monkeypatch.setattr(sampling, "threshold", lambda rate: THRESHOLD(10 * rate))
    claim, bound, _ = attack(sampled, runs=4)
    assert bound > claim


@pytest.mark.slow
def test_noise_used_again_is_caught_where_records_are_sampled(sampled, monkeypatch):
    monkeypatch.setattr(secrets, "round_keys", same_noise_every_round)
    claim, bound, _ = attack(sampled)
    assert bound > claim


@pytest.mark.slow
def test_sampling_as_claimed_is_not_contradicted(sampled):
    claim, bound, _ = attack(sampled, runs=4)
    assert bound <= claim


def test_a_transcript_is_the_canaries_and_noise_of_the_claimed_size(subject):
    """Rounds' sums less what the coins add: N(0, sigma^2) per coordinate (over 48,000 draws of each; false alarms: 1e-5)."""
    rng = np.random.default_rng(5)
    records = canaries.canary_records(subject, 1, rng)
    coins = rng.integers(0, 2, (len(subject.mechanisms), 1)).astype(bool)
    sums, directions = canaries.transcript(subject, records, coins, [rng.bytes(32) for _ in coins])
    assert sum((x**2).sum() for x in directions.values()) == pytest.approx(subject.rounds, rel=1e-5)
    rest = np.concatenate([(sums[n] - (coins - 1)[None] * directions[n]).ravel() for n in sums])
    sigma = subject.mechanisms[0].noise_multiplier
    assert abs(rest.std() / sigma - 1) < 4.5 / np.sqrt(2 * rest.size)
    assert abs(rest.mean()) < 4.5 * sigma / np.sqrt(rest.size)


def test_command_writes_the_bound_beside_the_claim(tmp_path, capsys):
    assert audit.main(["--epsilons=8", "--runs=1", "--audit_seed=2", f"--workdir={tmp_path}"]) == 0
    said = capsys.readouterr().out
    assert "23 right of 23" in said
    assert "nothing passes 4.28" in said
    (line,) = json.loads((tmp_path / "audit.json").read_text())["audits"]
    assert not line["broken"]
    assert 2 < line["curve"] < line["claim"] < 8


def test_command_exits_1_when_the_mechanism_is_broken(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(secrets, "round_keys", same_noise_everywhere)
    assert audit.main(["--epsilons=1", "--runs=1", "--audit_seed=2", f"--workdir={tmp_path}"]) == 1
    assert "BROKEN" in capsys.readouterr().out
    assert json.loads((tmp_path / "audit.json").read_text())["audits"][0]["broken"]


def test_claims_of_one_command_share_its_significance(tmp_path, monkeypatch, capsys):
    asked = []

    def heard(subject, runs, canaries, rng, program=None, confidence=None):
        asked.append(confidence)
        return 1.0, auditing.Bound(0.0, 0.0, "all", 900, 900, 450, 0.5, 0.5)

    monkeypatch.setattr(audit, "audit", heard)
    assert audit.main([f"--workdir={tmp_path / 'default'}"]) == 0
    assert asked == pytest.approx([1 - 0.001 / 4] * 4, abs=1e-12)
    assert "99.9%: those of each of 4 claims with 99.975%" in capsys.readouterr().out
    assert audit.main(["--epsilons=1,2", f"--workdir={tmp_path / 'two'}"]) == 0
    assert asked[4:] == pytest.approx([1 - 0.001 / 2] * 2, abs=1e-12)
    document = json.loads((tmp_path / "two" / "audit.json").read_text())
    assert document["confidence_of_each_claim"] == asked[-1]
    assert document["flags"] is None


@pytest.fixture
def command(tiny_bert, finance_table, tmp_path):
    """The flags of a small run, and a workdir for what looks at it."""
    return [
        f"--model={tiny_bert}", "--dataset=csv", f"--data_dir={finance_table}", "--text_column=text", "--label_column=label",
        "--max_length=8", "--clients=3", "--rounds=2", "--expected_batch_size=8", "--rank=1", "--last_layers=1", "--delta=1e-3",
        "--noise_multiplier=1", "--head_lr=1", "--head_only", "--mesh=1x1", f"--workdir={tmp_path / 'audit'}",
    ]  # fmt: skip


@pytest.mark.slow
def test_a_configuration_is_audited_with_several_canaries_a_client(command, tmp_path):
    assert audit.main([*command, "--canaries=6", "--runs=3", "--audit_seed=1"]) == 0
    document = json.loads((tmp_path / "audit" / "audit.json").read_text())
    (line,), flags = document["audits"], document["flags"]
    assert (flags["head_only"], flags["noise_multiplier"], flags["clip_norm"]) == (True, 1.0, 1.0)
    assert line["curve"] is None  # canaries of one client are no independent trials
    assert line["coins"] == 3 * 3 * 6 * 3 // 4


@pytest.mark.slow
def test_membership_is_attacked_with_and_without_privacy(command, tmp_path, capsys):
    assert audit.main([*command, "--membership", "--audit_seed=1"]) == 0
    lines = json.loads((tmp_path / "audit" / "membership.json").read_text())["runs"]
    assert [line["run"] for line in lines] == ["no privacy", "as configured"]
    assert all(line["members"] == 60 and line["others"] == 30 and 0 <= line["auc"] <= 1 for line in lines)
    assert "TPR at 0.1% FPR" in capsys.readouterr().out


def test_membership_rates_are_those_of_the_scores():
    members, others = np.arange(1000) + 989.5, np.arange(1000)
    found = membership.rates(members, others)
    assert found["tpr_at_0.01"] == pytest.approx(1)
    assert found["tpr_at_0.001"] == pytest.approx(0.991, abs=1e-3)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--epsilons=0"], "above 0"),
        (["--runs=0"], "runs"),
        (["--runs=1", "--canaries=2"], "takes 4 records"),
        (["--trust=none", "--dataset=csv"], "no claim to audit"),
        (["--membership"], "needs a configuration"),
        (["--noise_multiplier=1", "--client_optimizer=adam"], "adam cannot be audited"),
        (["--nonsense=1"], "nonsense"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_2(arguments, sentence, tmp_path, capsys):
    assert audit.main([*arguments, f"--workdir={tmp_path / 'audit'}"]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ")
    assert sentence in said.err
    assert said.err.count("\n") == 1


@pytest.fixture(scope="module")
def of_units():
    """A claim of epsilon 1 for units of four rows each."""
    return canaries.small(1.0, layout=units.Units(4))


def clipped_by_row(loss_fn, adapter, batch, clip_norm, weights=None, form="auto", mode="flat", bits=None):
    """Each of a unit's rows is cut to the clip norm, and not the unit."""
    counts = batch[losses.BROUGHT].shape
    rows = {name: x.reshape(-1, 1, *x.shape[2:]) for name, x in batch.items() if name != losses.BROUGHT}
    rows[losses.BROUGHT] = np.ones((counts[0] * counts[1], 1), np.float32)
    by_row = (weights[:, None] * batch[losses.BROUGHT]).reshape(-1)
    total, norms, values = CLIPPED(loss_fn, adapter, rows, clip_norm, by_row)
    return total, *(x.reshape(counts).sum(1) for x in (norms, values))


@pytest.mark.slow
def test_units_as_claimed_are_not_contradicted(of_units):
    claim, bound, _ = attack(of_units)
    assert bound <= claim <= 1


def test_clipping_by_row_is_caught_where_a_unit_is_claimed(of_units, monkeypatch):
    monkeypatch.setattr(clipping, "clipped_grad_sum", clipped_by_row)
    claim, bound, _ = attack(of_units, planted=True)
    assert bound > claim
