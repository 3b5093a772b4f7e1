"""What a trust mode is: one record of facts, functions and words. PRIVACY.md holds the theorems."""

import dataclasses
from collections.abc import Callable

from dplora_jax.privacy import clippers


def protected(config):
    """The statement of what is protected, where clients clip what is sampled."""
    privacy = config.privacy
    what = f"one {privacy.unit} of one client"
    if privacy.unit_column is not None:
        what += (
            f", all of its rows with one value in column '{privacy.unit_column}', however many these are (at most "
            f"{privacy.unit_rows} of them enter a step)"
        )
    elif privacy.by_unit:
        what += f", in up to {privacy.unit_rows} rows, which are clipped together"
    return (
        f"What is protected: {what}. What is seen is about as likely with that {privacy.unit} as with a null {privacy.unit} in "
        f"its place. Each client has its own epsilon; someone with {privacy.unit}s at several clients pays for all of them."
    )


def public(config):
    """The statement of what is taken to be public."""
    return (
        f"Public by assumption: each client's number of {config.privacy.unit}s, its sampling rate and batch capacity, the base "
        "model, the configuration, and the test set, whose owner declares it public."
    )


HOSTS = (
    "This run simulates all parties on its own hosts, and whoever controls these sees the records and the keys; the keys are "
    "destroyed when the run completes."
)
OWN_MACHINES = (
    "Each party runs its own part on its own machine, and its records and keys never leave it; the keys are destroyed when "
    "the run completes."
)


def accounting(config):
    """How epsilon is reckoned, in words."""
    unit = config.privacy.unit
    return (
        "Privacy loss distributions (dp_accounting) of Poisson sampling with a fixed capacity and the Gaussian mechanism; "
        f"neighbours differ in one {unit}, replaced by a null {unit}."
    )


def _mean(robust):
    from dplora_jax.federation import aggregation
    from dplora_jax.federation.robust import RobustMean

    return aggregation.MEAN if robust is None else RobustMean(robust)


@dataclasses.dataclass(frozen=True)
class Mode:
    """`private` says whether it has a guarantee, `public_uploads` whether everyone sees each client's upload, `bare_clients`
    whether clients train without clipping and noise of their own, and the record is a whole client. `apart` says whether parties
    that share no machine can run it, and `masked` whether nothing but a sum of uploads may then be seen. `parties(config)` have a
    secret, and a round is `steps_per_round(config)` steps of the private mechanism.

    Of the configuration, `fields` belong to this mode alone, `defaults(config)` are {field: value} of what is not given, and
    `checks(config)` gives (holds, what to say if not) for a config whose defaults are filled in.

    Of a `config`, the clients' public `sizes` and their `mechanisms`:
    - `plan(config, sizes, by_client)`: the Mechanisms that are accounted, where `by_client(sizes)` makes each client's own;
    - `shares`: what each client does itself, as Mechanisms: its sampling of its own records, and the noise that it adds;
      `sums(shares)` are the lists of those that are added up before anyone sees them;
    - `expected`: how many of its own records each client expects in a local step's batch;
    - `weights`: each client's share of the mean, if all take part;
    - `rule(config, mechanisms, sizes, robust)`: the server's part of a round (`aggregation.Mean` and the like);
    - `joining(config)`: the probability with which a client takes part in a round; None where all always do;
    - `senders(config, sent)`: what a round's metrics tell of how many clients sent.
    In words: `statements(config, apart)` and lines on the `method(config, apart)`, where `apart` says that each party runs its
    own part on its own machine; `accounting(config, mechanisms, steps)`, and for the head of a report a `notice` (title, why)
    or None. A private mode's epsilon is for what it `protects(config)`.
    """

    name: str
    statements: Callable
    method: Callable
    accounting: Callable
    plan: Callable = lambda config, sizes, by_client: by_client(sizes)
    shares: Callable = lambda config, sizes, mechanisms: mechanisms
    sums: Callable = lambda shares: [[share] for share in shares]
    expected: Callable = lambda config, sizes, mechanisms: [
        m.sampling_rate * n for m, n in zip(mechanisms, sizes, strict=True)
    ]
    weights: Callable = lambda config, sizes, mechanisms: [n / sum(sizes) for n in sizes]
    rule: Callable = lambda config, mechanisms, sizes, robust: _mean(robust)
    joining: Callable = lambda config: None
    senders: Callable = lambda config, sent: {}
    parties: Callable = lambda config: config.schedule.clients
    steps_per_round: Callable = lambda config: config.schedule.local_steps
    fields: tuple = ()
    defaults: Callable = lambda config: {}
    checks: Callable = lambda config: ()
    notice: tuple | None = None
    protects: Callable = lambda config: f"every client's {config.privacy.unit}s"
    private: bool = True
    public_uploads: bool = True
    bare_clients: bool = False
    apart: bool = True
    masked: bool = False


def per_example_clipping(config):
    """The line on the method of a mode that clips examples, or units."""
    what = "unit" if config.privacy.by_unit else "example"
    return f"DP-LoRA (arXiv 2312.17493), per-{what} clipping {clippers.kind(config).words(config.privacy)}"
