"""What a run has beyond its federation: the base model, the records, the evaluation and the files."""

import dataclasses
import math

from dplora_jax.config.federation import FederationConfig
from dplora_jax.config.field import DISPLAY, METRICS, field


@dataclasses.dataclass(frozen=True)
class Base:
    """The frozen language model that all clients start from."""

    name: str = field(
        "all-MiniLM-L6-v2",
        "directory, .gguf file, installed package or hub id of the base model",
        flag="model",
        common=True,
    )
    dtype: str = field(
        "float32",
        "number type of the base's weights and of what flows between them; mixed: weights in bfloat16, the rest in float32, with "
        "products of bfloat16 where the processor has them, which are faster",
        choices=("float32", "bfloat16", "mixed"),
    )
    quantize: str | None = field(
        None, "store the frozen matrices in 8 or 4 bits; default: in `dtype`", choices=("int8", "nf4")
    )
    remat: bool = field(False, "recompute each layer's activations in the backward pass: less memory, more time")
    feature_norm: float = field(
        0.0,
        "BERT classifiers: centre the head's features and scale them to this norm, both as measured on the text of the public "
        "test set, not its labels (of fewer than 20 records: of embedded headlines); to 1 at most where nothing is clipped; the "
        "released head has it folded in; 0 changes nothing",
        least=0.0, below=math.inf,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Data:
    """The records: where they lie, what they are, how they are dealt to clients, and how long a row is."""

    dataset: str = field(
        "finance_demo",
        "finance_demo, medical_demo, general_demo (embedded, synthetic); a public table by name (docs/data.md); or your own: "
        "csv, jsonl, parquet, text",
        common=True,
    )
    data_dir: str | None = field(None, "directory with train.* (and test.*) of `dataset`", common=True)
    test_data: str | None = field(None, "file with the public test set", common=True)
    encoding: str | None = field(
        None, "encoding of csv, jsonl and text files that are not UTF-8 and have no byte-order mark, such as cp1252"
    )
    separator: str | None = field(
        None,
        "separator of csv files: comma, semicolon, tab, pipe or any one character; a file whose header has the columns only "
        "with commas (.tsv: tabs) is still read that way",
    )
    text_column: str | None = field(None, "column of the text, for csv, jsonl and parquet", common=True)
    label_column: str | None = field(None, "column of the label, for csv, jsonl and parquet", common=True)
    prompt_column: str | None = field(None, "column of the prompt, to train a language model on answers")
    answer_column: str | None = field(None, "column of the answer to each prompt")
    labels: tuple[str, ...] | None = field(
        None, "comma-separated labels; default: the task's, else those of the public test set", common=True
    )
    test_fraction: float | None = field(
        None, "share of the table to hold out as the test set; giving it declares that share public"
    )
    train_records: int | None = field(
        None,
        "use this many training records (units, with `privacy_unit`), drawn by `split_seed`; default: all",
        least=1,
    )
    test_records: int | None = field(
        None, "evaluate on this many test records, drawn by `split_seed`; default: all", least=1
    )
    max_length: int = field(64, "tokens in a row, a public number; longer texts are cut", least=1)
    objective: str = field(
        "auto",
        "classifier: a head for the labels; language_model: the tokens of answers, of text, or of a label's word; auto: a "
        "classifier of BERT, else a language model",
        choices=("auto", "classifier", "language_model"),
    )
    chat: bool = field(False, "put prompts into the tokenizer's chat template, for models tuned to follow instructions")
    partition: str = field(
        "iid",
        "how records are dealt to clients: iid, dirichlet:ALPHA (by label), column:NAME, folders (data_dir/<client>/)",
        common=True,
    )
    parties: int | None = field(
        None,
        "deal the records to this many parties, of whom the first `clients` take part: a control; default: `clients`",
    )
    party: int = field(0, "with `parties` and clients=1: which party takes part, counted from 0")


@dataclasses.dataclass(frozen=True)
class Public:
    """Public records that the adapter and the head are trained on before the first round, without noise."""

    data: str | None = field(
        None,
        "train on these public records first, without noise (docs/warm_start.md): a file with the columns of the training "
        "table, or a task of docs/data.md as TASK=FOLDER, or TASK for the hub's",
        flag="public_data",
    )
    labels: tuple[str, ...] = field(
        (),
        "what the public records' labels are called here, where the names differ: bearish:negative,bullish:positive",
        flag="public_labels",
    )
    epochs: int = field(3, "passes over the public records; 0 trains on none", flag="public_epochs", least=0)
    lr: float = field(
        1e-3,
        "learning rate on public records, of Adam; it falls to 0 over their passes",
        flag="public_lr",
        above=0,
        below=math.inf,
    )
    batch_size: int = field(32, "public records in a step", flag="public_batch_size", least=1)

    @property
    def trains(self):
        """Whether anything is trained before the first round."""
        return self.data is not None and self.epochs > 0


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What is measured beyond the task's own metrics."""

    generate: int = field(
        32,
        "number of test prompts to answer before the first round and after the last, for token F1 and ROUGE-L",
        METRICS, least=0,
    )  # fmt: skip
    new_tokens: int = field(48, "most tokens of such an answer", METRICS, least=1)
    benchmarks: tuple[str, ...] = field(
        (),
        "comma-separated public tasks (docs/data.md) to evaluate on before the first round and after the last",
        METRICS,
    )
    benchmarks_dir: str | None = field(None, "folder with a folder for each of `benchmarks`; default: the hub", METRICS)
    benchmark_records: int | None = field(
        None, "use this many records of each of `benchmarks`, drawn by `split_seed`; default: all", METRICS, least=1
    )


@dataclasses.dataclass(frozen=True)
class Output:
    """Where a run's files go, and what is made for whom."""

    auto: bool = field(
        False,
        "choose the fields that matter for utility and are not given, from public sizes and epsilon, and say what was chosen",
        common=True,
    )
    workdir: str | None = field(
        None, "where everything goes; default: runs/<name of the flagfile>", DISPLAY, common=True
    )
    tensorboard: bool = field(
        False, "write the public metrics for TensorBoard too, into the workdir (extra: tensorboard)", DISPLAY
    )


@dataclasses.dataclass(frozen=True)
class RunConfig(FederationConfig):
    """A federation with its model, its records, its evaluation and its files: all that `experiments.run` takes."""

    base: Base = dataclasses.field(default_factory=Base)
    data: Data = dataclasses.field(default_factory=Data)
    public: Public = dataclasses.field(default_factory=Public)
    evaluation: Evaluation = dataclasses.field(default_factory=Evaluation)
    output: Output = dataclasses.field(default_factory=Output)
