"""Sites and a coordinator, as they are between machines but in one process, come to what one compiled program comes to."""

import jax
import numpy as np
import pytest

from dplora_jax import losses
from dplora_jax.federation import storage
from dplora_jax.federation.federation import Federation
from dplora_jax.privacy.ledger import Ledger
from dplora_jax.silos import vectors
from tests.conftest import mostly_slow
from tests.federation import small_federation as small
from tests.silos import small_silos

pytestmark = pytest.mark.usefixtures("quick_compile")
VARIANTS = {
    "local": {},
    "masked": small_silos.MASKED,
    "momentum and average": {"server_momentum": 0.5, "ema": 0.5, "lr_decay": 0.1},
    "adam": {"server_optimizer": "adam", "server_momentum": 0.0, "server_lr": 0.1},
    "yogi": {"server_optimizer": "yogi", "server_momentum": 0.0, "server_lr": 0.1},
    "adagrad": {"server_optimizer": "adagrad", "server_momentum": 0.0, "server_lr": 0.1},
    "adaptive": {"clipping": "adaptive", "local_steps": 2},
    "masked adam": small_silos.MASKED | {"server_optimizer": "adam", "server_momentum": 0.0, "server_lr": 0.1},
}


def simulated(fields):
    """The released adapter of one compiled program, float32 [D]."""
    made = small.config(**({"rounds": 3} | fields))
    whole = Federation(*small.model(), losses.classification, made)
    list(whole.fit(small_silos.shards(), storage.InMemory()))
    return vectors.flat(jax.tree.map(np.asarray, whole.adapter))


@pytest.mark.parametrize("name", mostly_slow(("local", "masked"), VARIANTS))
def test_three_sites_give_the_adapter_of_the_seeded_simulation(name, tmp_path):
    made = small_silos.Federation(tmp_path, **VARIANTS[name])
    done = made.run()
    released, expected = done.server.released(done.state), simulated(VARIANTS[name])
    assert np.abs(expected - made.start).max() > 1e-2
    np.testing.assert_allclose(released, expected, rtol=1e-5, atol=1e-6)
    for site in small_silos.NAMES:
        ledger = Ledger(tmp_path / site / "privacy_ledger.jsonl")
        assert ledger.ended
        assert ledger.charged_rounds() == 3
        assert not ledger.open_entry()
