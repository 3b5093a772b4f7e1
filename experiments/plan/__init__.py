"""Does it fit, and how long does a round take? Compiles the real round for a TPU topology, without any TPU and any weights.

    python -m experiments.plan --topology=v5e:2x4 --model=llama2-7b --mesh=1x8 --clients=5 --rank=512 --expected_batch_size=8 \
        --max_length=512 --dtype=bfloat16 --remat

Every flag of a run is taken, with a run's defaults; the noise multiplier is 1 where no noise is given: hardly a byte depends
on it. --model is a directory with config.json or one of plan.models.KNOWN. Exit codes: 0 it fits, 1 it does not, 2 bad input,
74 a file cannot be written.
"""

import importlib.util
import os
import sys
from typing import NamedTuple

from absl import flags as absl_flags

from dplora_jax.config import replace
from dplora_jax.errors import InputError
from dplora_jax.federation import trust
from dplora_jax.files import to_json
from experiments import cli
from experiments.cli import exits
from experiments.text import formats
from experiments.text.tables import Table

GIB = 1 << 30
LANGUAGE_MODEL, CLASSIFICATION, LABEL_WORDS = TASKS = "language_model", "classification", "label_words"


class Chip(NamedTuple):
    """Published peaks of one chip: bfloat16 operations a second, bytes of memory and bytes a second to it, and bytes a second
    that it sends over one link to another chip.

    They stand under "System architecture" on the pages "TPU v5e", "TPU v5p" and "TPU v6e" of the Cloud TPU documentation. The
    interconnect there is a chip's, over all its links (four, six, four) and in both directions: 400, 1200 and 800 GB/s.
    """

    flops: float
    hbm: float
    bandwidth: float
    link: float


CHIPS = {
    "v5e": Chip(197e12, 16 * GIB, 819e9, 400e9 / 2 / 4),
    "v5p": Chip(459e12, 95 * GIB, 2765e9, 1200e9 / 2 / 6),
    "v6e": Chip(918e12, 32 * GIB, 1638e9, 800e9 / 2 / 4),
}


@exits.guarded
def main(argv=None):
    """Plan what the command line `argv` (default: this process's) says -> exit code."""
    config, options = parse(sys.argv[1:] if argv is None else argv)
    chip, devices = topology(options["topology"])
    planned = plan(config, options, chip, devices)
    print(to_json(planned, indent=2)) if options["json"] else show(planned)
    return 0 if planned["fits"] else 1


def parse(argv):
    """The command line (without the program's name) -> (RunConfig, options); InputError with one sentence."""
    values = absl_flags.FlagValues()
    text = {
        "topology": "TPU slice to plan for: v5e:2x4, v5p:2x2x1, v6e:4x4, ...",
        "records": "records of each client, comma-separated, or of every one of --clients; default: 10000",
        "task": f"what is trained: {', '.join(TASKS)}; default: as the model, --objective, --head_only and --core say",
    }
    for name, help_text in text.items():
        absl_flags.DEFINE_string(name, None, help_text, flag_values=values)
    absl_flags.DEFINE_integer("classes", 3, "how many labels, without --labels", flag_values=values)
    absl_flags.DEFINE_boolean("search", True, "where it does not fit, try flags that may help", flag_values=values)
    absl_flags.DEFINE_boolean("json", False, "print everything as one JSON object", flag_values=values)
    cli.read(argv, values, "python -m experiments.plan --topology=v5e:2x4 --model=llama2-7b [flags of a run]")
    if not values.topology:
        raise InputError(f"--topology is missing: a TPU slice, as in v5e:2x4, of {', '.join(CHIPS)}.")
    if values.task not in (None, *TASKS):
        raise InputError(f"--task={values.task} is not known: {', '.join(TASKS)}.")
    config = cli.without_auto(cli.raw(values))
    if trust.mode(config).private and config.privacy.epsilon is None and config.privacy.noise_multiplier is None:
        config = replace(config, noise_multiplier=1.0)
    config = cli.settle(config)
    if config.execution.stream:
        raise InputError("--stream cannot be used here: a plan assumes that all records lie on the devices.")
    if config.privacy.by_unit:
        raise InputError(
            "--privacy_unit and --unit_rows cannot be used here: a plan's records have one row each. Leave them out, and "
            "multiply --expected_batch_size by the rows of a unit."
        )
    classes = len(config.data.labels) if config.data.labels else values.classes
    names = ("topology", "task", "search", "json")
    return config, {name: values[name].value for name in names} | {
        "classes": classes,
        "sizes": _sizes(values.records or "10000", config.schedule.clients),
    }


def _sizes(text, clients):
    """Each client's number of records."""
    parts = text.split(",")
    if not all(part.strip().isdigit() and int(part) for part in parts) or len(parts) not in (1, clients):
        raise InputError(f"--records={text} must be one whole number above 0, or one for each of {clients} clients.")
    sizes = [int(part) for part in parts]
    return sizes * clients if len(sizes) == 1 else sizes


def topology(name):
    """(Chip, devices) of a TPU slice that need not exist. Raises InputError on an unknown one, and without libtpu."""
    kind, _, layout = name.partition(":")
    sides = layout.split("x")
    if kind not in CHIPS or not all(side.isdigit() and int(side) for side in sides):
        raise InputError(f"--topology={name} is not known: give {', '.join(CHIPS)} and a layout, as in v5e:2x4.")
    if importlib.util.find_spec("libtpu") is None:
        raise InputError(
            "planning needs the TPU compiler, but no TPU: pip install 'jax[tpu]', or install this project with .[tpu]."
        )
    # Else the compiler asks the cloud which machine this is, and lets one process in at a time, and JAX looks for a TPU.
    settings = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}
    settings |= {"TPU_ACCELERATOR_TYPE": "v5litepod-8", "TPU_MIN_LOG_LEVEL": "2", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    for variable, value in settings.items():
        os.environ.setdefault(variable, value)
    from jax.experimental import topologies

    one = {"chips_per_host_bounds": (1, 1, 1)} if all(side == "1" for side in sides) else {}
    try:
        topology = topologies.get_topology_desc(platform="tpu", topology_name=name, **one)
    except Exception as error:  # of libtpu's own making; its message says what is wrong with the layout
        raise InputError(f"--topology={name} is refused by libtpu: {' '.join(str(error).split())}") from None
    return CHIPS[kind], topology.devices


def links(name):
    """To how many others a chip of the slice `name` has a link, at the most: one along a side of two chips, else two."""
    return sum(min(int(side) - 1, 2) for side in name.partition(":")[2].split("x"))


def plan(config, options, chip, devices):
    """Measure the run, and where it does not fit what might help -> all that is told, as plain values."""
    task = options["task"] or _task(config)
    measured, program = _measure(config, options, task, chip, devices)
    planned = tell(config, options["topology"], task, chip, program, measured)
    if not measured.fits and options["search"]:
        planned["tried"] = search(config, options, task, chip, devices)
    return planned


def _task(config):
    """What a run of `config` trains, as far as its model and flags tell."""
    from experiments.plan import models as plan_models

    if config.lora.head_only or config.data.objective == "classifier":
        return CLASSIFICATION
    usual = plan_models.default_task(config.base.name)
    return LABEL_WORDS if config.lora.core and usual == LANGUAGE_MODEL else usual


def _measure(config, options, task, chip, devices):
    from experiments.plan import program as plan_program

    program = plan_program.abstract(config, devices, options["sizes"], task, options["classes"])
    return plan_program.measure(program, chip.hbm), program


def search(config, options, task, chip, devices):
    """Change one flag after the other, what costs least first, until it fits -> a list of {"flags", "total", "fits"}."""
    changed, tried = {}, []
    for change in _changes(config, len(devices)):
        changed |= change
        try:
            measured, _ = _measure(replace(config, **changed), options, task, chip, devices)
        except InputError:  # a model axis that does not divide this model
            changed = {name: value for name, value in changed.items() if name not in change}
            continue
        words = " ".join(f"--{name}" if value is True else f"--{name}={value}" for name, value in changed.items())
        tried.append({"flags": words, "total": measured.total, "fits": measured.fits})
        if measured.fits:
            break
    return tried


def _changes(config, devices):
    """Flags that make room, one dict at a time, those that change nothing of the result first."""
    if config.execution.wave != 1:
        yield {"wave": 1}
    if not config.base.remat:
        yield {"remat": True}
    if config.base.dtype != "bfloat16":
        yield {"dtype": "bfloat16"}
    if config.execution.microbatch != 1:
        yield {"microbatch": 1}
    rows = (
        min(devices, config.schedule.clients)
        if config.execution.mesh == "auto"
        else int(config.execution.mesh.lower().split("x")[0])
    )
    columns = 1 if config.execution.mesh == "auto" else int(config.execution.mesh.lower().split("x")[1])
    while rows > 1 or rows * columns < devices:
        columns *= 2
        rows = max(1, min(rows, devices // columns))
        if rows * columns > devices:
            break
        yield {"mesh": f"{rows}x{columns}"}
    if config.base.quantize is None:
        yield {"quantize": "int8"}
    if config.base.quantize != "nf4":
        yield {"quantize": "nf4"}


def tell(config, name, task, chip, program, measured):
    """Everything that the table and --json say: floats, whole numbers, text. Times are least times, at published peaks."""
    planned = {
        "model": config.base.name,
        "task": task,
        "topology": name,
        "mesh": "x".join(str(side) for side in program.mesh.devices.shape),
        "clients": config.schedule.clients,
        "clients_per_device": program.clients,
        "capacity": program.federation.local.capacity,
        "max_length": config.data.max_length,
        "rank": config.lora.rank,
        "fits": measured.fits,
        "hbm": chip.hbm,
        "bytes": {
            part: getattr(measured, part)
            for part in ("base", "arguments", "temporaries", "outputs", "code", "total")
            if getattr(measured, part) is not None
        },
        "compile_seconds": measured.seconds,
    }
    if measured.work is None:
        return planned
    work = measured.work
    times = {
        "compute": work.passes / chip.flops,
        "memory": work.memory / chip.bandwidth,
        # A slice of one chip has no link, and sends nothing.
        "interconnect": sum(work.sent.values()) / (max(1, links(name)) * chip.link),
    }
    return planned | {
        "flops": work.flops,
        "bfloat16_flops": work.passes,
        "memory_traffic": work.memory,
        "collectives": work.sent,
        "seconds": times,
        "round_seconds": max(times.values()),
        "bound_by": max(times, key=times.get),
    }


def show(planned):
    """Print what was told."""
    verdict = "fits" if planned["fits"] else "does NOT fit"
    print(
        f"{planned['model']} ({planned['task']}), {planned['clients']} clients on {planned['topology']} as {planned['mesh']} "
        f"(clients x model): {verdict}."
    )
    print(
        f"A chip computes {planned['clients_per_device']} client(s) in turn; batches of up to {planned['capacity']} rows of "
        f"{planned['max_length']} tokens, rank {planned['rank']}."
    )
    names = {"base": "frozen model", "arguments": "all arguments", "total": "in all"}
    sizes = [[names.get(part, part), formats.size(size)] for part, size in planned["bytes"].items()]
    print(Table([f"memory of a chip of {formats.size(planned['hbm'])}", ""], sizes).text())
    if "seconds" in planned:
        rows = (
            ("matrix products", f"{planned['flops'] / 1e12:.2f} TFLOP", None),
            ("in bf16 passes", f"{planned['bfloat16_flops'] / 1e12:.2f} TFLOP", "compute"),
            ("weights read", formats.size(planned["memory_traffic"]), "memory"),
            ("sent to others", formats.size(sum(planned["collectives"].values())), "interconnect"),
        )
        body = [[label, amount, f"{planned['seconds'][key]:.3f}" if key else ""] for label, amount, key in rows]
        peaks = f"least seconds at {planned['topology'].partition(':')[0]}'s peaks"
        print(Table(["a round, of one chip", "", peaks], body).text())
        parts = ", ".join(f"{name} {formats.size(size)}" for name, size in planned["collectives"].items())
        print(f"collectives: {parts or 'none'}")
        print(f"At least {planned['round_seconds']:.3g} s a round, bound by {planned['bound_by']}.")
    for row in planned.get("tried", ()):
        print(f"with {row['flags']}: {formats.size(row['total'])}, {'fits' if row['fits'] else 'does not fit'}")
    if planned.get("tried") and not planned["tried"][-1]["fits"]:
        print("No flag makes it fit: take a larger slice, a lower --rank, or a shorter --max_length.")
