"""The fields of a `Federation`, one dataclass for each concern."""

import dataclasses
import math

from dplora_jax.config.field import DISPLAY, LAYOUT, PROCESS, field


@dataclasses.dataclass(frozen=True)
class Lora:
    """The adapter: which matrices, of which rank, and what of them is trained."""

    rank: int = field(4, "LoRA rank", least=1, common=True)
    alpha: float = field(8.0, "LoRA alpha: the adapter's product is scaled by alpha / rank", above=0.0, below=math.inf)
    targets: tuple[str, ...] = field(("q", "v"), "comma-separated matrices to adapt, or all-linear")
    last_layers: int | None = field(None, "adapt only this many layers nearest the output", least=1)
    freeze_a: bool = field(False, "train B alone (FFA-LoRA)")
    core: bool = field(
        False,
        "train a core of rank x rank alone, between an A and a B that tell the texts of the public test set apart, not their "
        "labels (LoRA-XS; docs/core.md); learning rates are then of another size",
    )
    head_only: bool = field(False, "train the classification head alone, no LoRA: a control")
    ranks: tuple[int, ...] | None = field(
        None, "comma-separated LoRA ranks, one for each client, up to `rank`; default: `rank` for all"
    )

    @property
    def trained_targets(self):
        """`targets`; () with `head_only`."""
        return () if self.head_only else self.targets


RECORD = "record"  # the privacy unit without a column of its own


@dataclasses.dataclass(frozen=True)
class Privacy:
    """What is promised, to whom, and how the mechanism keeps it."""

    trust: str = field(
        "local",
        "local: each client's own noise protects its records; distributed: the noise of all clients together does, under "
        "secure aggregation (simulated); client: a trusted server hides whole clients; none: no privacy, a control",
        common=True,
    )  # fmt: skip
    privacy_unit: str = field(
        RECORD,
        "what is protected as one: record, or column:NAME, all rows of a client with the same value there (a person's, say)",
        common=True,
    )
    unit_rows: int = field(
        1,
        "rows that a unit brings to a step at most, drawn anew each time; with privacy_unit=record, how many rows a longer text "
        "is cut into",
        least=1,
    )
    epsilon: float | None = field(
        None,
        "privacy budget of each client; inf means trust=none",
        above=0.0, common=True,
    )  # fmt: skip
    delta: float = field(1e-5, "delta of the guarantee", above=0.0, below=1.0, common=True)
    noise_multiplier: float | None = field(
        None, "sigma, instead of `epsilon`: the noise on the sum has standard deviation sigma * clip_norm", common=True
    )
    clip_norm: float = field(
        1.0,
        "L2 norm to which each example's gradient (with trust=client, each client's update) is clipped; inf, with "
        "trust=none, clips nothing",
        above=0.0, common=True,
    )  # fmt: skip
    clipping: str = field(
        "flat",
        "flat: clip each example's whole gradient to `clip_norm`; per_layer: clip each matrix's gradient to its share of it; "
        "automatic: scale every gradient to about `clip_norm`; adaptive: let `clip_norm` follow a privately estimated "
        "quantile of the norms",
    )
    clip_quantile: float = field(
        0.5, "clipping=adaptive: the share of gradients that should be within the clip norm", above=0.0, below=1.0
    )
    clip_rate: float = field(
        0.2,
        "clipping=adaptive: how fast the clip norm moves, as the change of its logarithm in a step",
        above=0.0,
        most=5.0,
    )
    count_noise_multiplier: float | None = field(
        None,
        "clipping=adaptive: standard deviation of the noise on the count of gradients within the clip norm; default: chosen "
        "for each client",
    )
    noise: str = field(
        "independent",
        "independent: fresh in each local step; banded: correlated over the local steps of a round; banded_rounds: correlated "
        "over rounds of one step; hardened: independent, drawn on the host by a cryptographic generator and added as integers, "
        "which needs per-row gradients",
    )
    bands: int | None = field(
        None,
        "noise=banded: over how many steps the noise is correlated; default: `local_steps`. noise=banded_rounds: over how many "
        "rounds, each of which samples from one of as many parts of a client's records; at most records / "
        "`expected_batch_size`, near which it is best",
    )
    survivors: int | None = field(
        None, "trust=distributed: how many clients surely send their sum; with fewer the round is void; default: all"
    )
    colluding: int | None = field(
        None, "trust=distributed: how many clients may tell others their own noise; default: 1"
    )
    client_rate: float | None = field(
        None, "trust=client: probability with which each client takes part in a round; default: 1"
    )
    seed: int | None = field(None, "make the run reproducible, noise included: its outputs are NOT for release")

    @property
    def by_unit(self):
        """Whether what is protected as one may have several rows."""
        return self.privacy_unit != RECORD or self.unit_rows > 1

    @property
    def unit(self):
        """What is protected, in a word: "record" or "unit"."""
        return "unit" if self.unit_column else RECORD

    @property
    def unit_column(self):
        """The column whose values are the units; None where each record is one."""
        return self.privacy_unit.partition(":")[2] or None


@dataclasses.dataclass(frozen=True)
class PrivateTest:
    """Scores on records that clients keep back: they never train, and only noisy counts of them are released."""

    share: float = field(
        0.0,
        "share of each client's records that is kept back to be measured on, drawn by its secret: they never train, and only "
        "noisy counts are released; needs no public test set",
        least=0.0, below=1.0, flag="private_test", common=True,
    )  # fmt: skip
    epsilon: float | None = field(
        None,
        "privacy budget of each record that is kept back, over all evaluations, at `delta`; default: `epsilon`, at most 40",
        above=0.0, most=40.0, flag="private_test_epsilon", common=True,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How many clients, rounds and local steps, how large their batches, and who is in which round."""

    clients: int = field(5, "number of clients", least=1, common=True)
    rounds: int = field(50, "number of rounds", least=1, common=True)
    local_steps: int = field(1, "noisy steps of each client in a round", least=1)
    expected_batch_size: float = field(
        64.0,
        "records that a client's step samples on average (Poisson sampling)",
        above=0.0,
        below=math.inf,
        common=True,
    )
    participation: str = field(
        "all",
        "who is in a round: all; fixed:M, M clients in turn; poisson:P, each with probability P. The schedule is public, drawn "
        "from `split_seed`, and a client pays only for its own rounds",
    )
    dropout: float | None = field(
        None,
        "simulated share of clients that fail to send in a round (not with trust=client); default: 0",
        least=0.0, below=1.0,
    )  # fmt: skip
    split_seed: int = field(0, "seed of the test split, of the simulated partition and of the schedule: public")


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """A client's local steps."""

    client_optimizer: str = field(
        "sgd", "optimizer of a client's local steps; its state is fresh in every round", choices=("sgd", "adam")
    )
    client_lr: float = field(0.3, "learning rate of the adapter matrices", above=0.0, below=math.inf, common=True)
    head_lr: float | None = field(
        None, "learning rate of the classification head; default: `client_lr`", least=0.0, below=math.inf, common=True
    )
    lr_decay: float = field(
        1.0, "learning rates fall linearly over the rounds to this share of their start", least=0.0, most=1.0
    )
    proximal: float = field(
        0.0, "FedProx: how strongly local steps are pulled back to where the round began", least=0.0, below=math.inf
    )


@dataclasses.dataclass(frozen=True)
class Aggregation:
    """How uploads become the next adapter, and the server's step."""

    method: str = field(
        "fedavg",
        "fedavg: the means of A and of B; rolora: A and B trained in turn; fedsa: A shared, each client keeps its B; fedex: "
        "fedavg, and what its product misses folded into the base; flora: the stacked adapters folded into the base; "
        "flexlora: the mean product, factored anew",
        flag="aggregation",
    )
    robust: str = field(
        "none",
        "none, median, or trimmed_mean:SHARE (SHARE is cut at either end): taken of each coordinate instead of the weighted mean",
    )
    upload_bits: int | None = field(
        None, "round each number of an upload at random to this many bits; default: float32", choices=(8, 4)
    )
    server_lr: float = field(1.0, "learning rate of the server on the mean upload", above=0.0, below=math.inf)
    server_momentum: float = field(0.0, "momentum of the server", least=0.0, below=1.0)
    server_optimizer: str = field(
        "sgd", "FedOpt: how the server steps on the mean upload", choices=("sgd", "adam", "yogi", "adagrad")
    )
    ema: float = field(
        0.0, "decay of the running average of released adapters; 0 releases the last adapter", least=0.0, below=1.0
    )


@dataclasses.dataclass(frozen=True)
class Execution:
    """Where and in which portions it is computed; none of it changes what is computed."""

    dispatch_rounds: int = field(25, "the most rounds in one dispatch of the compiled program", LAYOUT, least=1)
    eval_every: int = field(5, "rounds between evaluations; 0 never evaluates", LAYOUT, least=0)
    mesh: str = field(
        "auto", "CLIENTSxMODEL devices, as in 8x1; auto spreads the clients over all devices", LAYOUT, common=True
    )
    wave: int | None = field(
        None,
        "clients that a device computes at a time; default: several where their rows can be pooled, else 1",
        LAYOUT, least=1,
    )  # fmt: skip
    stream: bool | None = field(
        None,
        "keep records on the host, and send each round's rows while the round before runs; default: where they would take more "
        "than a quarter of a device's memory",
        LAYOUT,
    )
    microbatch: int | None = field(
        None, "rows of a client's batch that a device holds at a time; default: all", LAYOUT, least=1
    )
    cache_frozen: bool = field(
        True, "run the layers below the adapted ones once for each record, not at each step", LAYOUT
    )
    private_diagnostics: bool = field(
        False, "write exact losses, clip fractions and sampled counts into private/", DISPLAY
    )
    coordinator: str | None = field(
        None,
        "HOST:PORT of process 0, to join several processes; auto: as Slurm, the TPU pod or Kubernetes says; default: one process",
        PROCESS,
    )
    processes: int | None = field(
        None, "how many processes the run has; default: 1, or what coordinator=auto finds", PROCESS
    )
    process: int | None = field(
        None, "number of this process, from 0; process 0 writes the workdir, which all must see", PROCESS
    )
    stall_timeout: float = field(
        1800.0,
        "seconds that a process may keep the others waiting before all end; compilation and the longest dispatch must fit",
        PROCESS, least=10.0,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class FederationConfig:
    """What a `Federation` is: everything but the model, the records and where files go."""

    lora: Lora = dataclasses.field(default_factory=Lora)
    privacy: Privacy = dataclasses.field(default_factory=Privacy)
    private_test: PrivateTest = dataclasses.field(default_factory=PrivateTest)
    schedule: Schedule = dataclasses.field(default_factory=Schedule)
    optimizer: Optimizer = dataclasses.field(default_factory=Optimizer)
    aggregation: Aggregation = dataclasses.field(default_factory=Aggregation)
    execution: Execution = dataclasses.field(default_factory=Execution)
