"""The public metrics for those who live in TensorBoard: an event file made anew from `metrics.jsonl`, none lost or doubled."""

import importlib.util
import shutil

from dplora_jax import files
from dplora_jax.errors import InputError
from dplora_jax.federation import workdir_files

FOLDER = "tensorboard"
HIDDEN = ("round", "release")


def check():
    """Raise InputError where the package that writes events is not installed."""
    if importlib.util.find_spec("tensorboardX") is None:
        raise InputError("--tensorboard needs the package tensorboardX: pip install -e '.[tensorboard]'.")


def write(workdir):
    """Write `workdir`/tensorboard: a scalar for each number of each round, a list's by its index (a client's)."""
    import tensorboardX

    lines = [line.values for line in workdir_files.read_metrics(workdir)]
    shutil.rmtree(workdir / FOLDER, ignore_errors=True)
    with tensorboardX.SummaryWriter(str(workdir / FOLDER)) as writer:
        for line in lines:
            if "release" in line:
                writer.add_text("release", line["release"], line["round"])
            for name, value in line.items():
                if name in HIDDEN:
                    continue
                several = isinstance(value, list)
                for index, number in enumerate(value if several else [value]):
                    if (number := files.number(number)) is not None:
                        writer.add_scalar(f"{name}/{index}" if several else name, number, line["round"])
