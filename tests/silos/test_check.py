"""A party approves no plan past its own limits, and none whose digest it has not compared."""

import math

import pytest
from absl import flags as absl_flags

from dplora_jax.config import replace
from dplora_jax.errors import InputError
from dplora_jax.silos import plan
from experiments.silo import check as check_command
from tests.silos.plan_house import check

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--most_epsilon=7"], "past --most_epsilon=7"),
        (["--most_epsilon=8", "--least_survivors=4"], "below --least_survivors=4"),
        (["--most_epsilon=8", "--least_colluding=2"], "colluding=1, below --least_colluding=2"),
        (["--most_epsilon=8", "--most_delta=1e-5"], "delta is 0.001, and this party agrees to --most_delta=1e-05"),
        (["--most_epsilon=8", "--rounds=2"], "--rounds is the plan's to decide"),
        (["--text_column=text"], "--most_epsilon is missing"),
    ],
)
def test_a_party_keeps_its_own_limits(house, capsys, flags, words):
    assert words in check(house, capsys, *flags)


def limits(*flags):
    """What a party agrees to, as `check` reads it."""
    values = absl_flags.FlagValues()
    check_command.define(values)
    values(["check", "--most_epsilon=8", *flags])
    return values


def test_a_plan_without_privacy_is_for_a_rehearsal_alone(house):
    made = plan.read(house / "coordinator" / plan.FILE)
    with pytest.raises(InputError, match="the plan has no privacy"):
        check_command._within(made, 0, math.inf, limits())
    check_command._within(made, 0, math.inf, limits("--rehearsal"))


@pytest.mark.parametrize(("records", "delta", "most"), [(20, 2e-3, "0.001"), (2000, 1e-3, "0.0005")])
def test_a_party_that_gives_no_limit_of_delta_has_one(house, records, delta, most):
    made = plan.read(house / "coordinator" / plan.FILE)
    check_command._within(made, 0, 7.9, limits())
    made.sizes[0], made.config = records, replace(made.config, delta=delta)
    with pytest.raises(InputError, match=f"agrees to --most_delta={most}"):
        check_command._within(made, 0, 7.9, limits())


def test_nobody_approves_before_the_sites_have_compared_the_plans_digest(house, capsys):
    """Each knows its own keys in the plan: if all have one plan, all its keys are right."""
    digest = plan.read(house / "coordinator" / plan.FILE).digest.hex()
    for flags in ([], [f"--digest={'0' * 32}"]):
        said = check(house, capsys, "--most_epsilon=8", *flags, rehearsal=False)
        assert f"give --digest={digest[:32]}" in said
    assert "Approved" in check(house, capsys, "--most_epsilon=8", f"--digest={digest[:32]}", rehearsal=False, code=0)
