"""The trust modes by name: what each protects, from whom, and what it makes of a configuration. A mode is one file with a `Mode`
in it, and a line here; no JAX until a rule is made."""

from dplora_jax.federation.trust import client, distributed, local, none
from dplora_jax.privacy import secrets as party_secrets

BY_NAME = {module.MODE.name: module.MODE for module in (local, distributed, client, none)}


def mode(config):
    """The Mode of a run's `config`."""
    return BY_NAME[config.privacy.trust]


def expected_examples(config, sizes, mechanisms):
    """The expected count of records in a round's batches: public, unlike the count that was drawn."""
    trust_mode = mode(config)
    rate = trust_mode.joining(config)
    return (
        (1 if rate is None else rate)
        * config.schedule.local_steps
        * sum(trust_mode.expected(config, sizes, mechanisms))
    )


def senders(config, secrets, rounds, attempt):
    """What metrics tell of who took part, a dict a round."""
    trust_mode = mode(config)
    rate = trust_mode.joining(config)
    if rate is None:
        return [{}] * len(rounds)
    joins = party_secrets.joins(secrets, rounds, attempt, rate)
    return [trust_mode.senders(config, int(sent)) for sent in joins.sum(1)]
