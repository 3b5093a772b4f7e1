"""The public files of a run as `experiments.run` writes them, and the report of them."""

import json

from dplora_jax.config import RunConfig, replace, to_flat
from dplora_jax.files import to_json
from experiments import cli, report

RUN = cli.settle(replace(RunConfig(), model="MiniLM", epsilon=8.0, delta=1e-5, rounds=10, clip_norm=1.25, ema=0.9))


def config(clients=5, **changed):
    """A run's config.json as `experiments.run` writes it; `changed` replaces top-level keys."""
    rows = [
        {
            "client": k,
            "records": 600 + k,
            "sampling_rate": 64 / (600 + k),
            "capacity": 105,
            "noise_multiplier": 0.7,
            "weight": 0.2,
        }
        | {"epsilon": 7.0 + k / clients}
        for k in range(clients)
    ]
    sent = {"adapter_parameters": 19587, "full_parameters": 22713216, "ratio": 1159.6}
    sent |= {"bytes_up_per_client_per_round": 78348, "bytes_down_per_client_per_round": 78348}
    federation = {
        "clients": rows,
        "data": {"description": "headlines", "synthetic": False, "train_records": 3200, "test_records": 800},
        "trust": ["The server sees every upload.", "One record is one headline."],
        "release": "for release",
        "communication": sent | {"full_bytes_per_client_per_round": 90852864},
        "method": ["A frozen (FFA-LoRA)"],
        "environment": {"jax": "0.10.2"},
        "command": "python -m experiments.run --flagfile=finance.flags",
        "accounting": "Privacy loss distributions.",
    }
    document = to_flat(replace(RUN, clients=clients))
    return json.loads(to_json(document)) | {"federation": federation} | changed


def metrics(**evaluated):
    """Rounds 0 to 10; the metrics come at 0, 5 and 10, from the three values of each."""
    rows = []
    for t in range(11):
        row = {"round": t, "epsilon": [0.5 * t, 0.7999 * t], "epsilon_max": 0.7999 * t, "seconds": 1.5}
        if t % 5 == 0:
            row |= {name: values[t // 5] for name, values in evaluated.items()}
        rows.append(row)
    return rows


SCORES = {"accuracy": (0.311, 0.652, 0.783), "macro_f1": (0.201, 0.544, 0.729)}


def page(workdir, told, rows=None):
    """The report of these two files, as text."""
    (workdir / "config.json").write_text(json.dumps(told))
    if rows is not None:
        (workdir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = report.write(workdir)
    assert path == workdir / "report.html"
    return path.read_text(encoding="utf-8")
