"""From a table with a column of persons, or with long texts, to a federation of units; mistakes are one sentence each."""

import json
import shutil
import string

import numpy as np
import pytest

from dplora_jax import evaluation, losses
from dplora_jax.data import encoding, partition, records, tasks
from dplora_jax.data.records import Records, Rows
from dplora_jax.finetuning import setup
from dplora_jax.models.tokenizer import load_tokenizer
from experiments import cli
from experiments.run import main
from tests import letters as of_letters
from tests.conftest import write_table

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """The finance table with a person for every one to five rows, and notes of 1 to 12 words."""
    place = write_table(tmp_path_factory.mktemp("people"))
    rng = np.random.default_rng(1)
    for name in ("train", "test"):
        head, *lines = (place / f"{name}.csv").read_text().splitlines()
        person = np.sort(rng.integers(0, 24, len(lines)))
        texts = [
            " ".join([line.split(",")[0]] * n) for line, n in zip(lines, rng.integers(1, 5, len(lines)), strict=True)
        ]
        rows = [f"{line},{p},{text}" for line, p, text in zip(lines, person, texts, strict=True)]
        (place / f"{name}.csv").write_text("\n".join([f"{head},person,note", *rows]) + "\n")
    return place


@pytest.fixture
def command(tiny_bert, table, tmp_path):
    return [
        f"--model={tiny_bert}", "--dataset=csv", f"--data_dir={table}", "--text_column=text", "--label_column=label",
        "--max_length=8", "--clients=3", "--rounds=2", "--expected_batch_size=3", "--rank=2", "--epsilon=8", "--delta=1e-3",
        "--client_lr=0.1", "--head_lr=1", "--eval_every=2", f"--workdir={tmp_path / 'run'}",
    ]  # fmt: skip


def prepared(command, *more):
    return setup.prepare(cli.parse([*command, *more], lambda _: None))


UNITS = ("--privacy_unit=column:person", "--unit_rows=2")


def test_all_of_a_persons_rows_are_one_unit_of_one_client(command, table):
    job = prepared(command, *UNITS)
    people = [set(shard[encoding.UNIT].tolist()) for shard in job.shards]
    assert sum(map(len, people)) == len(set.union(*people))
    lines = [line.split(",") for line in (table / "train.csv").read_text().splitlines()[1:]]
    assert sum(map(len, people)) == len({cells[3] for cells in lines})
    assert sum(len(shard["labels"]) for shard in job.shards) == len(lines)
    assert job.federation.prepare(job.shards).sizes == list(map(len, people))


def test_a_run_by_person_says_so_and_tells_no_count_of_rows(command, tmp_path, capsys):
    assert main([*command, *UNITS]) == 0
    assert "for every client's units" in capsys.readouterr().out
    document = json.loads((tmp_path / "run" / "config.json").read_text())["federation"]
    assert sum(client["records"] for client in document["clients"]) == document["data"]["train_records"] < 30
    assert any("all of its rows with one value in column 'person'" in line for line in document["trust"])
    assert "units (n)" in (tmp_path / "run" / "report.html").read_text()


def test_long_texts_go_on_in_rows_of_their_own_record(command):
    """Each record's rows are its whole text, up to so many; and the same records are at each client as without."""
    command = [word.replace("=text", "=note") if "text_column" in word else word for word in command]
    cut, whole = prepared(command, "--unit_rows=3"), prepared(command)
    for rows, records_ in zip(cut.shards, whole.shards, strict=True):
        assert len(set(rows[encoding.UNIT].tolist())) == len(records_["labels"])
        tokens = rows["attention_mask"].sum(1) - 2
        assert (np.bincount(rows[encoding.UNIT])[np.unique(rows[encoding.UNIT])] <= 3).all()
        assert tokens.sum() > (records_["attention_mask"].sum(1) - 2).sum()


@pytest.mark.parametrize("most", [1, 2, 9])
def test_a_classifiers_rows_are_the_texts_tokens_in_order(tiny_bert, most):
    tokenizer = load_tokenizer(tiny_bert)
    texts = ("profit rose " * 5, "cost fell", "cost " * 13)
    made = encoding.classification(tokenizer, Records(texts, np.array([0, 1, 0], np.int32)), 8, most)
    if most == 1:
        assert encoding.UNIT not in made
        return
    for number, text in enumerate(texts):
        own = made[encoding.UNIT] == number
        ids = [
            ids[mask > 0][1:-1] for ids, mask in zip(made["input_ids"][own], made["attention_mask"][own], strict=True)
        ]
        whole = tokenizer(text, add_special_tokens=False).input_ids
        assert np.concatenate(ids).tolist() == whole[: 6 * most]
        assert len(ids) == min(most, -(-len(whole) // 6))
        assert (made["labels"][own] == number % 2).all()


@pytest.fixture(scope="module")
def letters(tmp_path_factory):
    """A Llama whose tokens are single letters."""
    return of_letters.write(tmp_path_factory.mktemp("letters") / "model", string.ascii_lowercase)


@pytest.mark.parametrize(("length", "most"), [(1, 3), (6, 3), (7, 3), (11, 3), (12, 3), (26, 3), (26, 9)])
def test_each_token_of_a_document_is_predicted_once(letters, length, most):
    text = string.ascii_lowercase[:length]
    made = encoding.documents(load_tokenizer(letters), [tasks.Asked(("",), (text,))], 6, most)
    targets = [ids[1:][mask[1:] > 0] for ids, mask in zip(made["input_ids"], made["loss_mask"], strict=True)]
    ids = load_tokenizer(letters)(text, add_special_tokens=False).input_ids
    assert np.concatenate(targets).tolist() == ids[: 5 * most]


def test_a_documents_label_is_that_of_all_of_its_rows(tiny_bert):
    """The likeliest label by the mean log-likelihood of its rows, each row's own being another."""
    from dplora_jax import models
    from dplora_jax.federation import mesh

    model, params = models.from_pretrained(tiny_bert, num_labels=2)
    kernel = np.random.default_rng(0).normal(size=(model.config.width, 2)).astype(np.float32)
    texts = tuple(
        " ".join(words) for words in np.random.default_rng(3).choice(["profit", "cost", "rose", "fell"], (12, 20))
    )
    table = encoding.classification(load_tokenizer(tiny_bert), Records(texts, np.zeros(12, np.int32)), 8, 4)
    inputs = {name: table[name] for name in ("input_ids", "attention_mask")}
    params = params | {"head": {"kernel": kernel, "bias": np.zeros(2, np.float32)}}
    params["head"]["bias"] = -np.asarray(model.apply(params, inputs)).mean(0)  # else all rows have one label
    logits = np.asarray(model.apply(params, inputs)).reshape(12, 4, 2)
    chosen = (logits - np.log(np.exp(logits).sum(-1, keepdims=True))).mean(1).argmax(-1)
    assert 0 < chosen.sum() < 12
    grid = mesh.make("1x1", 1, model)
    measured = evaluation.classifier(model, grid, params, table | {"labels": np.repeat(chosen, 4)})(None)
    assert measured == {"accuracy": 1.0, "macro_f1": 1.0}


def test_a_test_part_holds_out_whole_people():
    people = [str(i // 3) for i in range(30)]
    rest, part = records.split(Rows([f"t{i}" for i in range(30)], None, None, None, people), 0.3, 0)
    assert set(rest.units).isdisjoint(part.units)
    assert len(rest.texts) + len(part.texts) == 30


def test_who_is_held_out_or_left_out_follows_from_names_and_not_from_how_many_rows_anyone_has():
    names, chosen = [f"p{i:02}" for i in range(20)], []
    for more in (0, 9, 40):
        people = [*names, *names, *["p01"] * more]
        rows = Rows([f"t{i}" for i in range(len(people))], None, None, None, people)
        table = Records(tuple(rows.texts), np.zeros(len(people), np.int32), units=tuple(people))
        public, some = set(records.split(rows, 0.2, 0)[1].units), set(records.some(table, 7, 0).units)
        assert (len(public), len(some)) == (4, 7)
        chosen.append((public, some))
    assert chosen[0] == chosen[1] == chosen[2]


@pytest.mark.parametrize("spec", ["iid", "dirichlet:0.5"])
def test_people_are_dealt_whole(spec):
    rng = np.random.default_rng(0)
    people, labels = rng.integers(0, 40, 200), rng.integers(0, 3, 200)
    parts = partition.partition(spec, labels, None, 4, 0, people)
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(200))
    owners = [set(people[part].tolist()) for part in parts]
    assert sum(map(len, owners)) == len(set(people.tolist()))


def test_people_who_have_numbers_are_told_apart_as_numbers():
    from dplora_jax.data import tables

    cells = {"text": ["a", "b", "c"], "who": ["1", 1.0, 2.0]}
    made = records.rows(
        tables.Table("t", list(cells), cells), tasks.own_table(tasks.TEXT), {"text": "text"}, unit="who"
    )
    assert made.units == ["1", "1", "2"]


WRONG = {
    "a unit column that is not there": (["--privacy_unit=column:patient"], "has no column 'patient'"),
    "no name": (["--privacy_unit=column:"], "malformed"),
    "no such unit": (["--privacy_unit=person"], "write record or column:NAME"),
    "no row": (["--unit_rows=0"], "--unit_rows=0 must be 1 or more"),
    "fewer people than clients": ([*UNITS, "--clients=25"], "is more than the"),
    "whole clients": ([*UNITS, "--trust=client"], "cannot be used with --trust=client"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_has_no_meaning_is_refused_in_a_sentence(command, capsys, case):
    more, words = WRONG[case]
    assert main([*command, *more]) == 2
    said = capsys.readouterr().err.strip()
    assert words in said
    assert len(said.splitlines()) == 1


def test_a_person_without_a_name_is_refused(command, table, tmp_path, capsys):
    shutil.copytree(table, tmp_path / "holes")
    path = tmp_path / "holes" / "train.csv"
    path.write_text(path.read_text().replace(",0,", ",,", 1))
    assert main([*command, *UNITS, f"--data_dir={tmp_path / 'holes'}"]) == 2
    assert "rows with nothing in column 'person'" in capsys.readouterr().err


def test_prompts_with_answers_are_not_cut_into_rows(letters, tmp_path, capsys):
    (tmp_path / "train.csv").write_text("q,a\n" + "who,me\n" * 20)
    flags = ["--dataset=csv", f"--data_dir={tmp_path}", "--prompt_column=q", "--answer_column=a", "--eval_every=0"]
    more = [f"--model={letters}", "--clients=2", "--max_length=16", "--epsilon=8", f"--workdir={tmp_path / 'run'}"]
    assert main([*flags, *more, "--unit_rows=2"]) == 2
    assert "has prompts before its answers" in capsys.readouterr().err


def test_perplexity_is_of_the_whole_document(letters, tmp_path):
    """A document's end counts, up to so many rows: of a text of two rows both, of a longer one the first two."""
    from dplora_jax import models
    from dplora_jax.federation import mesh

    model, params = models.from_pretrained(letters)
    asked = [tasks.Asked(("",), (text,)) for text in ("abcdefghij", "klmnopqrstuvwxyz")]
    rows = encoding.documents(load_tokenizer(letters), asked, 6, 2)
    measured = evaluation.perplexity(model, mesh.make("1x1", 1, model), params, rows)(None)["perplexity"]
    by_row = losses.language_model(model, params)(None, {n: x for n, x in rows.items() if n != encoding.UNIT})
    counted = rows["loss_mask"][:, 1:].sum(1)
    assert measured == pytest.approx(float(np.exp((np.asarray(by_row) * counted).sum() / counted.sum())), rel=1e-5)
    assert counted.sum() == 10 + 10
