"""What a noisy LoRA step costs: examples and tokens a second, against plain steps and against this machine's matrix products.

    python -m experiments.benchmark --model=gpt2 --batch=8 --length=128 --rank=8
    python -m experiments.benchmark --model=gpt2 --layers=2 --vary='rank=8|64|512' --vary='batch=8|32' --out=speed.jsonl

The first prints a table: the plain LoRA step, the noisy step in each clipping form, and evaluation, interleaved in one process
after a warm-up: median times, their ratio to the plain step of the same turn with its quartiles, the share of the rate of a plain
matrix product measured in the same turns, memory by XLA's account, and compile time. The second does so for each value of the
varied flags, writes each finished cell as a line of --out, and prints one table in Markdown; finished cells are not run again.
A --model is a name of `plan.models.KNOWN` (random weights; --layers of them) or one with weights. The same command works on CPU,
GPU and TPU.

--peers adds PyTorch with PEFT, Opacus and jax_privacy (the `bench` extra); --profile=DIR writes a trace of the steps. Other
measures: --measure=round, a whole federated round beside its local steps (rounds.py); federation, whole federations, with --peers
beside Flower's and pfl-research's simulators (federations.py); roofline, what the step should take on chips that are not at hand
(roofline.py); memory (memory.py); clients, many of them (scale.py); mailbox, what it adds to a round between machines
(mailbox.py); correlated_noise, what it would leave in the released average (correlated_noise.py).
"""

import itertools
import json
import pathlib
import platform
import sys

import jax
from absl import flags

from dplora_jax.errors import InputError
from dplora_jax.files import to_json
from dplora_jax.models import pretrained
from dplora_jax.privacy.clipping import FORMS
from experiments import cli
from experiments.benchmark import correlated_noise, federations, memory, roofline, scale
from experiments.benchmark import rounds as benchmark_rounds
from experiments.benchmark import steps as benchmark_steps
from experiments.benchmark import table as benchmark_table
from experiments.cli import exits
from experiments.plan import models as plan_models
from experiments.text import formats

MEASURES = ("step", "round", "federation", "roofline", "memory", "clients", "mailbox", "correlated_noise")


def define():
    """The benchmark's flags."""
    values = flags.FlagValues()
    flags.DEFINE_string("model", "all-MiniLM-L6-v2", "the base model", flag_values=values)
    flags.DEFINE_integer("layers", None, "layers of a model of random weights", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("batch", 64, "rows of a step", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("length", 32, "tokens of a row", lower_bound=2, flag_values=values)
    flags.DEFINE_integer("rank", 4, "LoRA rank", lower_bound=1, flag_values=values)
    flags.DEFINE_list("targets", ["q", "v"], "matrices to adapt", flag_values=values)
    flags.DEFINE_integer("last_layers", None, "adapt so many layers, not all", lower_bound=1, flag_values=values)
    flags.DEFINE_boolean("freeze_a", False, "train B alone", flag_values=values)
    flags.DEFINE_enum(
        "dtype", "float32", ["float32", "bfloat16", "mixed"], "type of the frozen base", flag_values=values
    )
    flags.DEFINE_boolean("remat", False, "make a layer's activations again in the backward pass", flag_values=values)
    flags.DEFINE_enum(
        "task", None, ["language_model", "classification"], "what is trained; BERT: classes", flag_values=values
    )
    flags.DEFINE_list("forms", ["auto", "broadcast", "ghost", "vmap"], "clipping forms", flag_values=values)
    flags.DEFINE_integer("repeats", 9, "how often each step is timed", lower_bound=3, flag_values=values)
    flags.DEFINE_multi_string("vary", [], "FLAG=VALUE|VALUE|...", flag_values=values)
    flags.DEFINE_string(
        "out", None, "file of a sweep's finished cells, a line each; a plot lies beside it", flag_values=values
    )
    flags.DEFINE_boolean(
        "peers", False, "also PyTorch with PEFT, Opacus, jax_privacy; of federations Flower, pfl", flag_values=values
    )
    flags.DEFINE_string("flower_python", None, "Python with flwr[simulation], peft and opacus", flag_values=values)
    flags.DEFINE_string("pfl_python", None, "Python with pfl and peft", flag_values=values)
    flags.DEFINE_integer("rounds", 4, "rounds of a turn, --measure=federation", lower_bound=1, flag_values=values)
    flags.DEFINE_string("profile", None, "directory for a trace that Perfetto and TensorBoard read", flag_values=values)
    flags.DEFINE_list("chips", ["h100", "v5e"], "chips to estimate a step for", flag_values=values)
    flags.DEFINE_enum("measure", "step", MEASURES, "what to measure", flag_values=values)
    flags.DEFINE_list("clients", None, "numbers of clients; default: 1,5, or up to 1000", flag_values=values)
    flags.DEFINE_integer("records", 20, "records of each of many clients", lower_bound=4, flag_values=values)
    flags.DEFINE_float("gigabytes", 1.2, "size of the model made to measure loading", flag_values=values)
    flags.DEFINE_string("frozen", "SmolLM2-135M-Instruct", "the base to hold in fewer bits", flag_values=values)
    return values


@exits.guarded
def main(argv=None):
    """Print what is asked for -> exit code."""
    config = define()
    try:
        cli.read_alone(sys.argv[1:] if argv is None else argv, config, "benchmark", __doc__)
        unknown = set(config.forms) - set(FORMS)
        if unknown:
            raise InputError(f"--forms={','.join(sorted(unknown))} is not known: {', '.join(FORMS)}.")
        unknown = set(config.chips) - set(roofline.PEAKS)
        if unknown:
            raise InputError(f"--chips={','.join(sorted(unknown))} is not known: {', '.join(roofline.PEAKS)}.")
        for line in sweep(config) if config.vary else chosen(config):
            print(line, flush=True)
    except (flags.Error, ValueError) as error:
        raise error if isinstance(error, InputError) else InputError(" ".join(str(error).split())) from None
    return 0


def chosen(config):
    """The lines of the measure that `config` asks for."""
    if config.measure == "memory":
        parts = memory.loading(config.gigabytes), memory.next_token_loss(8, 512, 64), memory.frozen_base(config.frozen)
        return itertools.chain(*parts)
    if config.measure == "correlated_noise":
        return correlated_noise.tables()
    if config.measure == "mailbox":
        from experiments.benchmark import mailbox  # here, since it needs the extra `silo`

        return mailbox.table([int(count) for count in config.clients or mailbox.SITES], config.repeats)
    counts = [int(count) for count in config.clients or (scale.CLIENTS if config.measure == "clients" else (1, 5))]
    if config.measure == "clients":
        return scale.table(config.model, counts, scale.WAVES, config.records, config.length, config.repeats)
    if config.measure == "roofline":
        return roofline.lines(case(config), config.chips)
    if config.measure == "federation":
        return federations.table(case(config), counts, config.rounds, config.repeats, _other_federations(config))
    if config.measure == "round":
        return benchmark_rounds.table(case(config), counts, config.repeats)
    return one(config)


def _other_federations(config):
    """The `federations.Program`s that are asked for."""
    known = (
        federations.Program("with_flower", config.flower_python, 1, clips=True),  # a client on each core
        federations.Program("with_pfl", config.pfl_python, benchmark_steps.cores(), clips=False),
    )
    found = [program for program in known if program.python]
    if config.peers != bool(found):
        raise InputError(
            "--peers of a federation goes with --flower_python or --pfl_python: Pythons of their environments."
        )
    if found and jax.default_backend() != "cpu":
        raise InputError("the peers' federations run on the CPU: compare there, with JAX_PLATFORMS=cpu.")
    return found


def one(config):
    """The lines of one cell."""
    what = case(config)
    yield machine()
    yield ", ".join(f"{name} {value}" for name, value in what._asdict().items() if value not in (None, False))
    if config.profile:
        from experiments.benchmark import profiling

        yield from profiling.lines(what, config.forms, config.profile)
    yield from benchmark_table.lines(what, measured(config, what))
    peak = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    if peak is not None:
        yield f"the device's own account: {formats.size(peak)} in use at the most, of all steps together"


def measured(config, what):
    """What `benchmark_steps.measure` finds, with the peers where they are asked for."""
    if not config.peers:
        return benchmark_steps.measure(what, config.forms, config.repeats)
    from experiments.benchmark import peers as benchmark_peers

    return benchmark_steps.measure(what, config.forms, config.repeats, benchmark_peers.calls(what))


def sweep(config):
    """The lines of a table over every value of the varied flags; a finished cell is a line of `--out`, and not run again."""
    out = pathlib.Path(config.out or "benchmark.jsonl")
    done = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    varied = [(name, values.split("|")) for name, _, values in (text.partition("=") for text in config.vary)]
    if any(name not in config or values == [""] for name, values in varied):
        raise InputError(f"--vary={config.vary} needs FLAG=VALUE|VALUE of this program's flags.")
    cells = []
    for values in itertools.product(*(values for _, values in varied)):
        name = dict(zip([name for name, _ in varied], values, strict=True))
        for flag, value in name.items():
            config[flag].parse(value)
        what = case(config)
        key = {"case": json.loads(to_json(what)), "forms": config.forms, "peers": config.peers, "machine": machine()}
        key["repeats"] = config.repeats
        measurement = next((line["found"] for line in done if all(line.get(part) == key[part] for part in key)), None)
        if measurement is None:
            measurement = measured(config, what)
            with open(out, "a", encoding="utf-8") as file:
                file.write(to_json(key | {"found": measurement}) + "\n")
            print(f"{name}: done", file=sys.stderr, flush=True)
            jax.clear_caches()
        cells.append((name, measurement))
    benchmark_table.plot(cells, out.with_suffix(".svg"))
    yield machine()
    yield benchmark_table.markdown(cells)


def case(config):
    """The Case that the flags describe."""
    place = config.model if config.model in plan_models.KNOWN else pretrained.locate(config.model)
    if config.model not in plan_models.KNOWN and (config.layers or config.remat):
        raise InputError(f"--layers and --remat are for models of random weights: {', '.join(plan_models.KNOWN)}.")
    task = config.task or plan_models.default_task(place)
    fields = {name: config[name].value for name in benchmark_steps.Case._fields if name in config and name != "task"}
    return benchmark_steps.Case(**fields | {"targets": tuple(config.targets), "task": task})


def machine():
    """Where this runs, in a line."""
    return f"{jax.device_count()} x {jax.devices()[0].device_kind}, {platform.machine()}, jax {jax.__version__}"
