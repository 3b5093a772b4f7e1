"""Federations that differ in no more than budgets share a compiled round, and others do not."""

import numpy as np
import pytest

from dplora_jax import losses
from dplora_jax.federation import dispatch, storage
from dplora_jax.federation.federation import Federation
from tests.federation import small_federation as small

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.fixture(scope="module")
def programs():
    """Compiled rounds, shared by the federations of this module that are of one shape."""
    return {}


@pytest.fixture
def federation(programs):
    return lambda **fields: Federation(*small.model(), losses.classification, small.config(**fields), programs=programs)


def run(federation):
    return list(federation.fit(small.shards(), storage.InMemory()))


def test_federations_of_other_rates_share_no_program(federation):
    """Of one shape and with one seed: with the other's program, they would come to the same."""
    whole, other = federation(), federation(head_lr=0.1)
    run(whole)
    run(other)
    assert np.abs(whole.adapter["head"]["bias"] - other.adapter["head"]["bias"]).max() > 1e-3


class Compiled(Exception):
    """A program is to be compiled."""


@pytest.fixture
def compiling_fails(federation, monkeypatch):
    """Once the module's own program is compiled, the next one raises Compiled."""
    run(federation())

    def make(*_, **__):
        raise Compiled

    monkeypatch.setattr(dispatch.round, "make", make)


def test_federations_of_other_budgets_share_a_program(federation, compiling_fails):
    """A budget reaches it as its arguments."""
    assert max(run(federation(epsilon=4.0))[-1].epsilon) <= 4


@pytest.mark.parametrize(
    "fields", [{"server_lr": 0.5}, {"client_lr": 0.4}, {"ema": 0.0}, {"private_diagnostics": True}, {"mesh": "3x1"}]
)
def test_federations_of_other_programs_do_not(federation, compiling_fails, fields):
    with pytest.raises(Compiled):
        run(federation(**fields))
