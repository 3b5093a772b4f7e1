"""A run's flags as one frozen RunConfig: a name, a default and a help text stand here and nowhere else."""

import dataclasses

from dplora_jax.errors import InputError

# Flags that may differ when a run goes on in its workdir: they say where and how it is computed and shown, not what.
FREE_ON_RESUME = (
    "workdir",
    "mesh",
    "dispatch_rounds",
    "eval_every",
    "generate",
    "new_tokens",
    "benchmarks",
    "benchmarks_dir",
    "benchmark_records",
    "private_diagnostics",
    "tensorboard",
    "wave",
    "stream",
    "microbatch",
    "cache_frozen",
    "coordinator",
    "processes",
    "process",
    "stall_timeout",
)


def flag(default, text):
    """A field of RunConfig with its help text."""
    return dataclasses.field(default=default, metadata={"help": text})


def number(text, name):
    """An optional number of a flag: None for none, inf allowed."""
    if text is None or str(text).lower() in ("none", ""):
        return None
    try:
        return float(text)
    except ValueError:
        raise InputError(f"--{name}={text} is no number, nor none.") from None


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Every flag of `experiments.run`, as resolved."""

    model: str = flag("all-MiniLM-L6-v2", "directory, .gguf file, installed package or hub id of the base model")
    dtype: str = flag("float32", "float32 or bfloat16: of the base's weights and of matrix products")
    quantize: str | None = flag(None, "int8 or nf4: keep the frozen matrices in 8 or 4 bits; default: as --dtype says")
    remat: bool = flag(False, "compute each layer's activations again in the backward pass: less memory, more time")
    objective: str = flag(
        "auto",
        "classifier: a head for the labels; language_model: the tokens of answers, of text, or of a label's word; auto: a "
        "classifier of BERT, else a language model",
    )
    auto: bool = flag(
        False,
        "fill the flags that matter for utility, where not given, from public sizes and epsilon, and say what was chosen",
    )
    dataset: str = flag(
        "finance_demo",
        "finance_demo, medical_demo, general_demo (embedded, synthetic); a public table by name (docs/data.md); or your own: "
        "csv, jsonl, parquet, text",
    )
    data_dir: str | None = flag(None, "directory with train.* (and test.*) of --dataset")
    test_data: str | None = flag(None, "file with the public test set")
    encoding: str | None = flag(
        None, "encoding of the csv, jsonl and text files that are not UTF-8 and have no byte-order mark, as cp1252"
    )
    separator: str | None = flag(
        None,
        "what parts the cells of csv files: comma, semicolon, tab, pipe or a character; a file whose header has the columns "
        "only at commas (in .tsv, tabs) is read so all the same",
    )
    text_column: str | None = flag(None, "column of the text, for csv, jsonl and parquet")
    label_column: str | None = flag(None, "column of the label, for csv, jsonl and parquet")
    prompt_column: str | None = flag(None, "column of the prompt, for answers to train a language model on")
    answer_column: str | None = flag(None, "column of the answer to each prompt")
    labels: str | None = flag(None, "comma-separated label set; default: the task's, else the public test's")
    test_fraction: float | None = flag(
        None, "share of the table held out as the test set; giving it declares that share public"
    )
    split_seed: int = flag(0, "seed of the test split and of the simulated partition")
    train_records: int | None = flag(None, "use so many of the training records, drawn by --split_seed; default: all")
    test_records: int | None = flag(
        None, "evaluate on so many of the test records, drawn by --split_seed; default: all"
    )
    max_length: int = flag(64, "tokens a row, public; longer texts are cut")
    clients: int = flag(5, "how many parties")
    partition: str = flag(
        "iid",
        "how records are dealt to clients: iid, dirichlet:ALPHA (by label), column:NAME, folders (data_dir/<client>/)",
    )
    parties: int | None = flag(
        None, "deal the records to so many, of whom the first --clients take part: a control; default: --clients"
    )
    party: int = flag(0, "with --parties and --clients=1: which of them, from 0")
    rounds: int = flag(50, "rounds of the federation")
    local_steps: int = flag(1, "noisy steps of each client in a round")
    expected_batch_size: float = flag(64.0, "mean of the Poisson sample of each client's step")
    rank: int = flag(4, "LoRA rank")
    alpha: float = flag(8.0, "LoRA alpha: the adapter's product is scaled by alpha / rank")
    targets: str = flag("q,v", "comma-separated matrices to adapt, or all-linear")
    last_layers: int | None = flag(None, "adapt only this many layers nearest the output")
    freeze_a: bool = flag(False, "train B alone (FFA-LoRA)")
    feature_norm: float = flag(
        0.0,
        "classifier (BERT): centre the head's features and scale them to this norm, both measured on the public test set's text "
        "(not its labels); the released head has it folded in; 0 leaves them as the model makes them",
    )
    head_only: bool = flag(False, "train the classification head alone, no LoRA: a control")
    trust: str = flag(
        "local",
        "local: each client's noise carries its guarantee; distributed: the clients' noises together do, under secure "
        "aggregation (simulated); client: a trusted server hides whole clients; none: no privacy, a control",
    )
    survivors: int | None = flag(
        None, "distributed: clients that surely send their sum, fewer void the round; default: all"
    )
    colluding: int | None = flag(None, "distributed: clients assumed to tell their own noise; default: 1")
    dropout: float | None = flag(
        None, "simulated share of clients that fail to send in a round (not with --trust=client); default: 0"
    )
    participation: str = flag(
        "all",
        "who is in a round: all; fixed:M, M clients in turn; poisson:P, each with probability P. The schedule is public, drawn "
        "from --split_seed, and a client pays for its own rounds",
    )
    client_rate: float | None = flag(
        None, "client: probability with which each client takes part in a round; default: 1"
    )
    epsilon: str | None = flag(None, "privacy budget of each client; inf is --trust=none, none unsets a flagfile's")
    delta: float = flag(1e-5, "delta of the guarantee")
    noise_multiplier: str | None = flag(None, "sigma, in place of --epsilon: noise std = sigma * clip_norm on the sum")
    clip_norm: float = flag(
        1.0,
        "L2 norm to which each example's gradient (with --trust=client, each client's update) is clipped; inf, with "
        "--trust=none, clips nothing",
    )
    clipping: str = flag(
        "flat",
        "flat: each example's whole gradient to clip_norm; per_layer: each matrix's to its share; automatic: every gradient "
        "scaled to about clip_norm; adaptive: clip_norm follows a privately estimated quantile of the norms",
    )
    clip_quantile: float = flag(
        0.5, "--clipping=adaptive: the share of gradients that the clip norm should leave whole"
    )
    clip_rate: float = flag(0.2, "--clipping=adaptive: how fast the clip norm moves, in logarithms a step")
    count_noise_multiplier: float | None = flag(
        None, "--clipping=adaptive: std of the noise on the count within the clip norm; default: chosen for each client"
    )
    noise: str = flag(
        "independent",
        "independent: in each local step; banded: correlated over the local steps of a round; hardened: as independent, but "
        "drawn on the host by a cryptographic generator, and integer like the gradients, which takes per-row gradients",
    )
    bands: int | None = flag(None, "--noise=banded: how many steps' noise is correlated; default: local_steps")
    client_optimizer: str = flag("sgd", "sgd or adam, fresh in every round")
    client_lr: float = flag(0.3, "learning rate of the adapter matrices")
    head_lr: float | None = flag(None, "learning rate of the classification head; default: client_lr")
    lr_decay: float = flag(1.0, "learning rates fall linearly over the rounds, to this share of themselves")
    proximal: float = flag(0.0, "FedProx: how strongly local steps are pulled back to where the round began")
    aggregation: str = flag(
        "fedavg",
        "fedavg: the means of A and of B; rolora: A and B trained in turn; fedsa: A shared, each client keeps its B; fedex: "
        "fedavg, and what its product misses folded into the base; flora: the stacked adapters folded into the base; "
        "flexlora: the mean product, factored anew",
    )
    robust: str = flag(
        "none",
        "none, median, or trimmed_mean:SHARE (cut at either end): of each coordinate, in place of the weighted mean",
    )
    ranks: str | None = flag(None, "comma-separated LoRA rank of each client, up to --rank; default: --rank for all")
    upload_bits: int | None = flag(None, "8 or 4: round uploads at random to so many bits a number; default: float32")
    server_lr: float = flag(1.0, "learning rate of the server on the mean upload")
    server_momentum: float = flag(0.0, "momentum of the server")
    server_optimizer: str = flag("sgd", "sgd, adam, yogi or adagrad, on the mean upload (FedOpt)")
    ema: float = flag(0.0, "decay of the running average of released adapters; 0 keeps the last")
    eval_every: int = flag(5, "rounds between evaluations on the public test set; 0 never evaluates")
    chat: bool = flag(False, "put prompts into the tokenizer's chat template, for models tuned to follow instructions")
    generate: int = flag(
        32, "test prompts that are answered before the first round and after the last, for token F1 and ROUGE-L"
    )
    new_tokens: int = flag(48, "tokens of such an answer, at most")
    benchmarks: str | None = flag(
        None,
        "comma-separated public tasks (docs/data.md) to evaluate on before the first round and after the last",
    )
    benchmarks_dir: str | None = flag(None, "folder with a folder for each of --benchmarks; default: the hub")
    benchmark_records: int | None = flag(None, "records of each of --benchmarks, drawn by --split_seed; default: all")
    dispatch_rounds: int = flag(25, "the most rounds in one dispatch of the compiled program")
    mesh: str = flag("auto", "CLIENTSxMODEL devices, as in 8x1; auto spreads the clients over all devices")
    coordinator: str | None = flag(
        None,
        "HOST:PORT of process 0, to join several processes; auto: as Slurm, a TPU pod or Kubernetes tells; default: one",
    )
    processes: int | None = flag(None, "how many processes the run has; default: one, or as --coordinator=auto finds")
    process: int | None = flag(None, "which of them this is, from 0; process 0 writes the workdir, which all must see")
    stall_timeout: float = flag(
        1800.0, "seconds that a process may keep the others waiting (compilation, the longest dispatch) before all end"
    )
    wave: int | None = flag(
        None, "clients that a device computes at a time; default: several where their rows can be pooled, else 1"
    )
    stream: bool | None = flag(
        None,
        "keep records on the host, and send each round's rows while the round before runs; default: where they would take more "
        "than a quarter of a device's memory",
    )
    microbatch: int | None = flag(None, "rows of a client's batch that a device holds at a time; default: all")
    cache_frozen: bool = flag(True, "run the layers below the adapted ones once for each record, not at each step")
    seed: int | None = flag(None, "makes the run reproducible, noise included: its outputs are NOT for release")
    private_diagnostics: bool = flag(False, "write exact losses, clip fractions and sampled counts into private/")
    tensorboard: bool = flag(
        False, "write the public metrics for TensorBoard too, into the workdir (extra: tensorboard)"
    )
    workdir: str | None = flag(None, "where everything goes; default: runs/<flagfile's name>")

    @property
    def private(self):
        """Whether the run gives any guarantee."""
        return self.trust != "none"

    @property
    def steps_per_round(self):
        """How many steps of the private mechanism a round is: a client's whole update is one."""
        return 1 if self.trust == "client" else self.local_steps

    @property
    def mechanism_options(self):
        """What `accounting.calibrate` and `with_noise` take beyond sizes, steps and noise."""
        adaptive = self.clipping == "adaptive"
        return {"adaptive": adaptive, "count_noise": self.count_noise_multiplier, "bands": self.bands or 1}

    @property
    def rank_list(self):
        """--ranks as a tuple of whole numbers; None where all have --rank."""
        return None if self.ranks is None else tuple(int(rank) for rank in self.ranks.split(","))

    @property
    def benchmark_list(self):
        """--benchmarks as a tuple."""
        return tuple(name.strip() for name in (self.benchmarks or "").split(",") if name.strip())

    @property
    def target_list(self):
        """--targets as a tuple; empty with --head_only."""
        return () if self.head_only else tuple(name.strip() for name in self.targets.split(",") if name.strip())
