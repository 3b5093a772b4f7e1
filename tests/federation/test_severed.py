"""With every noised sum cut off from its records, nothing that a round shows depends on them: noise is their only way out.

What is then shown is noise alone, so that no two numbers of it may be the same.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dplora_jax.federation import pool, round
from dplora_jax.federation.trusted_server import TrustedServer
from dplora_jax.privacy.banded import Banded
from dplora_jax.privacy.banded_rounds import BandedRounds
from dplora_jax.privacy.noise import Independent
from tests.conftest import mostly_slow
from tests.federation import small

pytestmark = pytest.mark.usefixtures("quick_compile")
ROUNDS = range(1, 3)
ALONE = small.Setup(local_steps=1, diagnostics=False)
SETUPS = {
    "adaptive": ALONE._replace(local_steps=2, clipping="adaptive"),
    "banded": ALONE._replace(local_steps=4, bands=2, microbatch=3),
    "banded over rounds": ALONE._replace(bands=2, planned=3),
    "banded over rounds, pooled": ALONE._replace(bands=2, planned=3, wave=5, pool=pool.rows(small.MECHANISMS)),
    "rolora": ALONE._replace(method="rolora"),
    "fedsa, rounded": ALONE._replace(method="fedsa", upload_bits=8),
    "fedex, ranks": ALONE._replace(method="fedex", ranks=(1, 2, 2, 1, 2)),
    "median of some": ALONE._replace(robust="median", partial=True, wave=2),
    "pooled": ALONE._replace(wave=5, pool=pool.rows(small.MECHANISMS)),
    "distributed": ALONE._replace(trust="distributed", rows=2),
    "client": ALONE._replace(trust="client", local_steps=2),
}
# One of each place that noise is added at: a client's step, the total of all, the server's mean of whole updates.
FAST = ("adaptive", "distributed", "client")


def other_records():
    """Records of the same sizes that have nothing else in common, some without a finite gradient."""
    data = small.records()
    for number, shard in enumerate(data):
        shard["input_ids"] = (shard["input_ids"] * 7 + number + 1) % 20
        shard["attention_mask"] = np.ones_like(shard["attention_mask"])
        shard["labels"] = np.zeros_like(shard["labels"])
        shard["scale"] = np.where(np.arange(len(shard["scale"])) % 5 == 2, np.inf, 50).astype(np.float32)
    return data


def severed(patch):
    """Make each place that adds noise do so to zeros."""
    nothing = lambda tree: jax.tree.map(jnp.zeros_like, tree)  # noqa: E731
    for kind, name in ((Independent, "add"), (Banded, "add"), (BandedRounds, "add"), (TrustedServer, "noisy_mean")):
        real = getattr(kind, name)
        patch.setattr(kind, name, lambda self, sums, *rest, real=real: real(self, nothing(sums), *rest))


def shown(setup, data, program=None):
    """(what the rounds of `setup` show of `data`, the compiled program); of mode `client` the uploads are the server's alone."""
    arguments = small.arguments(setup, ROUNDS, data=data, count_std=0.9)
    if program is None:
        program = round.make(small.federation(setup), small.grid_of(setup), transcript=True).lower(*arguments).compile()
    state, (public, private, valid) = program(*arguments)
    assert private is None
    if setup.trust != "local":
        public = {"aggregate": public["aggregate"]}
    return jax.tree.map(np.array, (state, public, valid)), program


@pytest.mark.parametrize("name", mostly_slow(FAST, SETUPS))
def test_what_a_round_shows_depends_on_no_record_but_through_what_is_noised(name, monkeypatch):
    severed(monkeypatch)
    one, program = shown(SETUPS[name], small.records())
    other, _ = shown(SETUPS[name], other_records(), program)
    jax.tree.map(np.testing.assert_array_equal, one, other)
    noise = np.concatenate([x.ravel() for x in jax.tree.leaves(one[1].get("released", one[1].get("aggregate")))])
    noise = noise[noise != 0]  # halves that are not trained, ranks that are cut, and padding clients have none
    assert noise.size > 400
    same = noise.size - len(np.unique(noise))
    assert same <= 5  # by chance two of float32 may be equal: noise that is shared is by dozens
