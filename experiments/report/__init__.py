"""The page of a run: its utility, what privacy it cost, what was sent, and how to repeat it.

    python -m experiments.report runs/finance [--sweep=sweep.jsonl]

reads the workdir's public files, `config.json`, `metrics.jsonl` and the ledger, the audit in `runs/finance-audit` if there is
one, and the finished cells of a sweep if one is named, and writes `report.html` beside them: one file that needs no network, no
script and no font; and `report.md` with the same tables. The same files give the same bytes.
"""

import pathlib
import sys

from dplora_jax import guard
from dplora_jax.errors import InputError
from dplora_jax.federation import workdir_files
from dplora_jax.privacy.chain import replace_durably
from experiments import cli, ledger
from experiments.cli import exits
from experiments.report import sections, templates


@exits.guarded
def main(arguments=None):
    """Write the report of the one workdir named -> exit code: 0 done, 2 where that cannot be, 74 a file cannot be written."""
    guard.begin(phrase=cli.as_flags)  # the ledger's seals are checked by the secrets
    arguments = sys.argv[1:] if arguments is None else arguments
    sweeps = [word.partition("=")[2] for word in arguments if word.startswith("--sweep=")]
    folders = [word for word in arguments if not word.startswith("--sweep=")]
    if len(folders) != 1 or len(sweeps) > 1:
        raise InputError("give one workdir: python -m experiments.report WORKDIR [--sweep=FILE].")
    print(write(folders[0], _sweep(sweeps[0]) if sweeps else None))
    return 0


def _sweep(path):
    from experiments import sweep
    from experiments.sweep import report as sweep_report

    return sweep_report.contents(sweep.finished(pathlib.Path(path)))


def write(workdir, sweep=None):
    """Write `workdir/report.html` and `report.md`, each whole or not at all -> the page's path.

    `sweep` is what `sweep_report.contents` makes of a sweep's finished cells. Raises InputError for a damaged workdir.
    """
    workdir = pathlib.Path(workdir)
    stored = workdir_files.read_config(workdir)
    if stored.member is None:
        rows = [line.values for line in workdir_files.read_metrics(workdir, stored.config.schedule.rounds)]
    else:
        rows = ledger.site_lines(workdir, stored)
    contents = sections.contents(workdir, stored, rows, ledger.agreement(workdir), sweep)
    path = workdir / "report.html"
    replace_durably(path, templates.html("report.html.j2", contents))
    replace_durably(workdir / "report.md", templates.markdown("report.md.j2", contents))
    return path
