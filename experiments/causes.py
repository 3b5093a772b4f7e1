"""What decides the bits of a dispatch: a digest of each cause, so that a resumed run can say which of them is another.

Rounds may be replayed under the same keys only if every one is the same: else the difference of two uploads would show gradients
without their noise.
"""

import dataclasses
import hashlib
import importlib.metadata
import os
import pathlib
import platform

import jax
import numpy as np

import dplora_jax
import experiments

# They move no bit of a round; what --mesh and --processes come to is a cause of its own.
FREE = (
    *("workdir", "dispatch_rounds", "eval_every", "mesh"),
    *("coordinator", "processes", "process", "stall_timeout"),
)
LIBRARIES = ("jax", "jaxlib", "flax", "optax", "numpy", "jax_privacy")


def digests(config, records, model, params, mechanisms, grid):
    """{cause: SHA-256} of a run: `records` is a pytree of the clients' arrays, `model` has a `config`, `grid` is the mesh.

    They are to be keyed before they are shown: a plain hash of the records would tell who is among them.
    """
    flags = {name: value for name, value in dataclasses.asdict(config).items() if name not in FREE}
    devices = [device.device_kind for device in grid.devices.flat]
    devices = devices if len(set(devices)) > 1 else devices[:1]  # how many there are is the mesh's
    platforms = sorted({device.client.platform_version for device in grid.devices.flat})
    environment = [os.environ.get(name, "") for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")]
    return {
        "data": of_arrays(records),
        "config": _of((sorted(flags.items()), mechanisms)),
        "code": _of_code(),
        "base": _of((model.config, of_arrays(params))),
        "mesh": _of((sorted(grid.shape.items()), jax.process_count())),
        "devices": _of((devices, platform.machine(), _processor())),
        "versions": _of(([importlib.metadata.version(name) for name in LIBRARIES], platforms)),
        "xla": _of((environment, str(jax.config.values))),
    }


def together(found):
    """One {cause: digest} from all processes' (in hex), in their order: where they agree, theirs, however many they are; else of
    who has which, since another order puts a client on another processor."""
    names = sorted({name for one in found for name in one})
    by_name = {name: [one.get(name, "") for one in found] for name in names}
    return {name: bytes.fromhex(seen[0]) if len(set(seen)) == 1 else _of(seen) for name, seen in by_name.items()}


def _of(value):
    return hashlib.sha256(repr(value).encode()).digest()


def of_arrays(tree):
    """SHA-256 of the leaves' places, shapes, types and bytes."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree.leaves_with_path(tree):
        array = np.ascontiguousarray(leaf)
        digest.update(repr((jax.tree_util.keystr(path), array.shape, str(array.dtype))).encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.digest()


def _of_code():
    digest = hashlib.sha256()
    for package in (dplora_jax, experiments):
        for path in sorted(pathlib.Path(package.__file__).parent.rglob("*.py")):
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.digest()


def _processor():
    """The processor and how many of its cores are ours: another one may add in another order."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    model = sorted({line for line in lines if line.startswith(("model name", "flags"))})
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return platform.processor(), model, cores
