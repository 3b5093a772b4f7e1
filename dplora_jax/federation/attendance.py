"""Whether all clients take part in each round, and what is saved where some do not."""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Everyone:
    """Every client is in every round."""

    keys = ()  # what a dispatch's keys hold beside the others

    def arranged(self, members):
        """(`waves.Members` in the order in which they are computed, what puts their results [K, ...] back into their own)."""
        return members, lambda shown: shown

    def run(self, one, group):
        """`one(group)`, the outcome of a wave."""
        return one(group)

    def there(self, group):
        """Who of a wave takes part, bool [K]."""
        return jnp.ones_like(group.client.weight) > 0


EVERYONE = Everyone()


@dataclasses.dataclass(frozen=True)
class Some:
    """ "joins" in a round's keys says who takes part. Those who do share waves, and the others' are idle."""

    keys = ("joins",)

    def arranged(self, members):
        """Those who take part first."""
        order = jnp.argsort(-members.keys["joins"])
        back = jnp.argsort(order)
        return jax.tree.map(lambda x: x[order], members), lambda shown: jax.tree.map(lambda x: x[back], shown)

    def run(self, one, group):
        """As `one(group)`, but a wave that no client takes part in is not computed: its sums are 0, and all keep theirs."""

        def idle(group):
            nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(one, group))
            terms, weight, shown = nothing
            return terms, weight, shown._replace(clip_norm=group.clip_norm, own=group.own)

        return jax.lax.cond((group.keys["joins"] > 0).any(), one, idle, group)

    def there(self, group):
        """Whose "joins" is 1."""
        return group.keys["joins"] > 0
