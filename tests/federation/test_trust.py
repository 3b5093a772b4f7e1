"""What the modes say of themselves."""

import pytest

from dplora_jax.config import FederationConfig, replace
from dplora_jax.federation import trust

GIVEN = {
    "local": {},
    "distributed": {"clients": 7, "survivors": 6, "colluding": 2},
    "client": {"clients": 40, "client_rate": 0.25},
}
MODES = {
    name: trust.BY_NAME[name].statements(replace(FederationConfig(), trust=name, **given), False)
    for name, given in GIVEN.items()
}


@pytest.mark.parametrize("mode", MODES)
def test_a_mode_says_who_sees_what_what_is_protected_and_what_is_assumed(mode):
    said = MODES[mode]
    assert said[0].startswith("Who sees what: ")
    assert said[1].startswith("What is protected: ")
    assert all("assum" in sentence for sentence in said[2:])


def test_secure_aggregation_is_called_simulated_and_the_server_of_mode_client_trusted():
    assert "SIMULATED" in MODES["distributed"][0]
    assert "h = 6 - 2 = 4" in MODES["distributed"][2]
    assert "TRUSTED" in MODES["client"][0]
    assert "probability 0.25" in MODES["client"][2]
    assert "NO privacy" in trust.none.STATEMENTS[0]
