"""What the tests of the ledger charge: two clients' mechanisms, and what rounds of them cost."""

from dplora_jax.privacy import accounting
from dplora_jax.privacy.accounting import Mechanism

DELTA = 1e-5
MECHANISMS = [Mechanism(100, 0.2, 35, 1.1), Mechanism(50, 0.4, 50, 1.3)]


def begin(ledger, rounds, attempt=0, local_steps=2, data="f0"):
    ledger.begin(rounds, attempt, MECHANISMS, local_steps, {"data": data})


def expected(rounds):
    return [accounting.epsilon(m, rounds * 2, DELTA) for m in MECHANISMS]
