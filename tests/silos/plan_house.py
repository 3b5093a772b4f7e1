"""A coordinator's plan and three parties with their own tables, for the tests of what a plan is and of what a party checks."""

import json

from dplora_jax.silos import keys, plan
from experiments import silo
from tests.silos import small_silos


def make(folder, tiny_bert, finance_table):
    """Fill `folder` with the keys of three sites, the coordinator's plan, and each site's own table."""
    rows = (finance_table / "train.csv").read_text().splitlines()
    for number, name in enumerate(small_silos.NAMES):
        (folder / "data" / name).mkdir(parents=True)
        own = [rows[0], *rows[1 + number :: 3]]
        (folder / "data" / name / "train.csv").write_text("\n".join(own) + "\n")
        run("keys", f"--name={name}", f"--workdir={folder / name}", *table(folder, name), "--labels=bad,good")
    cards = ",".join(str(folder / name / keys.CARD) for name in small_silos.NAMES)
    settings = [
        "--dataset=csv", "--labels=bad,good", f"--model={tiny_bert}", "--rank=2", "--rounds=3", "--epsilon=8", "--delta=1e-3",
        "--max_length=8", "--expected_batch_size=8", "--trust=distributed", "--noise=hardened", "--survivors=3", "--colluding=1",
    ]  # fmt: skip
    run("plan", f"--sites={cards}", f"--workdir={folder / 'coordinator'}", *settings)


def table(folder, name):
    return ["--dataset=csv", f"--data_dir={folder / 'data' / name}", "--text_column=text", "--label_column=label"]


def run(*arguments):
    assert silo.main(list(arguments)) == 0


def check(house, capsys, *flags, path=None, name="north", code=2, rehearsal=True):
    """What `check` says, on stdout or on stderr."""
    own = [word for word in table(house, name) if not word.startswith("--dataset")]
    path = path or house / "coordinator" / plan.FILE
    arguments = [
        "check",
        str(path),
        f"--workdir={house / name}",
        *own,
        *(flags or ["--most_epsilon=8"]),
        *(["--rehearsal"] if rehearsal else []),
    ]
    assert silo.main(arguments) == code
    said = capsys.readouterr()
    return said.err if code else said.out


def edited(house, tmp_path, change, sign=True):
    """The plan after `change(body)`, signed by the coordinator again unless not."""
    document = json.loads((house / "coordinator" / plan.FILE).read_text())
    change(document["plan"])
    path = tmp_path / plan.FILE
    if sign:
        digest = plan.hashlib.sha256(plan.canonical(document["plan"])).digest()
        document["signature"] = keys.load(house / "coordinator").sign.sign(b"dplora_jax plan" + digest).hex()
    path.write_text(json.dumps(document))
    return path
