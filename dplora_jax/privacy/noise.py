"""Gaussian noise for a pytree, from keys that no two draws share, and the noise of a local step that is made of it."""

import abc
import dataclasses
import math

import jax
import jax.numpy as jnp

from dplora_jax.privacy import sampling, secrets, threefry

TOGETHER = (
    1 << 16
)  # numbers of an array, up to which its four draws are one array in memory: a quarter of the compile time
DRAWS = 4  # keys to a draw; 4 x 64 bits carry a client's whole 256-bit digest


def gaussian(keys, tree, std, step):
    """Noise like `tree`: independent N(0, std^2) in every coordinate, float32. `std` is a number, or a tree of them that begins
    like `tree`.

    `keys` [4, 2] uint32 are four threefry keys of one client, round and attempt; `step` (int32, traced or not) and the leaf's
    index are folded into each, so that no two leaves or steps share a draw. Each draw is half the sum of four standard
    normals: JAX's float32 normal never leaves 5.42 standard deviations, and a sum of four reaches 10.84.
    """
    leaves, treedef = jax.tree.flatten(tree)
    four = jax.vmap(jax.random.fold_in, (0, None))(jax.random.wrap_key_data(keys, impl="threefry2x32"), step)
    by_leaf = jax.random.key_data(
        jax.vmap(jax.vmap(jax.random.fold_in, (0, None)), (None, 0))(four, jnp.arange(len(leaves)))
    )

    def draw(index, std, shape):
        if math.prod(shape) < TOGETHER:
            return std * 0.5 * sum(jax.vmap(lambda key: threefry.normal(key, shape))(by_leaf[index]))
        return std * 0.5 * sum(threefry.normal(key, shape) for key in by_leaf[index])

    stds = jax.tree.leaves(jax.tree.broadcast(std, tree))
    return treedef.unflatten([draw(index, stds[index], leaf.shape) for index, leaf in enumerate(leaves)])


def add(tree, noise):
    """`tree` plus `noise`, leaf by leaf, in float32."""
    return jax.tree.map(lambda x, n: x.astype(jnp.float32) + n, tree, noise)


@dataclasses.dataclass(frozen=True)
class Noise(abc.ABC):
    """What a kind of noise is to the rounds, and what most kinds have in common; `noises` lists the kinds.

    `sampler` draws which records join a step, `bits` is the grid of integer sums (None: sums are float32), `one_scale` whether
    the noise is accounted as of one clip norm for all of a round's steps, `pools` whether clients' rows may be clipped together,
    `over_rounds` whether a round's noise hangs together with that of the rounds before it in its block (`ledger.Ledger.block`).
    """

    sampler = sampling.ByKeys()
    bits = None
    one_scale = False
    pools = True
    over_rounds = False

    @classmethod
    def from_config(cls, config, mechanisms, sums, adapter):
        """The noise of a run's `config`; `mechanisms` are what is accounted of each client, `sums` the lists of shares that are
        added up before anyone sees them (`trust.mode.Mode.sums`), and `adapter` is what clients train. Raises InputError."""
        return cls()

    def check(self, local):
        """Raise ValueError where `local` (a `client.LocalConfig`) makes sums that this noise does not hide."""
        if not math.isfinite(local.clipper.clip_norm):
            raise ValueError("noise hides only what is clipped: give a clipper of a finite norm, or no noise.")
        if self.one_scale and local.clipper.moves:
            raise ValueError(f"{type(self).__name__} noise has one scale, and the norm of this clipper moves.")

    def init(self, adapter):
        """What the noise of a round's first step remembers of the steps before."""
        return ()

    @abc.abstractmethod
    def add(self, sums, stds, keys, step, memory):
        """(`sums` plus the noise of local step `step`, the next memory). `stds` are a number, or a tree that begins like `sums`;
        `keys` are the client's of this round: its part of `round_keys`."""

    def value(self, sums):
        """What sums that `add` made are worth, in float32."""
        return sums

    def words(self):
        """Lines on this noise, for config.json and the report; none on the usual one."""
        return []

    def round_keys(self, party_secrets, numbers, attempt, clients, rate, local, shares, adapter):
        """What rounds `numbers` draw from, by the secrets `party_secrets` (`secrets.round_keys`); `shares` are the mechanisms of
        the noise that each of them adds."""
        return secrets.round_keys(party_secrets, numbers, attempt, clients, rate)

    def going_on(self, keys, earlier):
        """`keys` (`round_keys`) of a dispatch as its rounds take them, where it goes on from the dispatches of the noise keys
        `earlier` (uint32 [rounds, K, 4, 2] of each; none unless `over_rounds`)."""
        return keys

    def key_shapes(self, parties, clients, rate, local, adapter):
        """One round's keys as jax.ShapeDtypeStruct; `parties` have a secret, of whom the first `clients` are clients."""
        keys = self.going_on(secrets.round_keys(secrets.from_seed(0, parties), range(1, 2), 0, clients, rate), [])
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), keys)

    def most_rounds(self, clients, parameters, local):
        """How many rounds' keys are made at a time."""
        return math.inf


class Independent(Noise):
    """Noise that no two steps share anything of."""

    def add(self, sums, stds, keys, step, memory):
        """`sums` plus Gaussian noise of standard deviation `stds`."""
        return add(sums, gaussian(keys, sums, stds, step)), memory


INDEPENDENT = Independent()


class NoNoise(Noise):
    """No noise: for a client whose server adds it, and for the control without privacy."""

    def check(self, local):
        """Where there is no noise, any sums are as good."""

    def add(self, sums, stds, keys, step, memory):
        """`sums` as they are."""
        return sums, memory
