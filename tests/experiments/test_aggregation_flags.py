"""What the flags of aggregation and participation make of a run: refusals, steps that are paid for, bytes, files."""

import json

import jax
import numpy as np
import pytest

from dplora_jax import lora, models, peft
from dplora_jax.errors import InputError
from dplora_jax.federation import calibration, dispatch, exact, participation, program, round_bytes
from dplora_jax.federation.federation import Federation
from dplora_jax.privacy import accounting
from dplora_jax.privacy.ledger import Ledger
from experiments import cli, ledger
from experiments.run import model_card, summary
from tests.conftest import mostly_slow
from tests.experiments.small_runs import crash_before, fit, lines_of

pytestmark = pytest.mark.usefixtures("quick_compile")


def parse(*more):
    return cli.parse(["--clients=3", "--rounds=10", "--epsilon=4", *more])


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--aggregation=mean"], "--aggregation=mean is not known"),
        (["--aggregation=flora", "--ema=0.5"], "use --ema=0."),
        (["--aggregation=fedsa", "--ema=0.5"], "an average over rounds has no client's own B"),
        (["--aggregation=fedex", "--freeze_a"], "exact already"),
        (["--aggregation=flora", "--quantize=int8"], "leave it out"),
        (["--aggregation=fedex", "--dtype=bfloat16"], "use --dtype=float32"),
        (["--aggregation=flexlora", "--server_lr=0.5"], "use --server_lr=1"),
        (["--aggregation=fedex", "--lr_decay=0.2"], "use --lr_decay=1"),
        (["--aggregation=fedsa", "--head_only"], "LoRA matrices"),
        (["--aggregation=fedsa", "--trust=distributed"], "--trust=distributed shows none"),
        (["--robust=median", "--trust=client", "--delta=1e-3"], "--trust=client shows none"),
        (["--upload_bits=8", "--trust=distributed"], "--trust=distributed shows none"),
        (["--participation=fixed:2", "--trust=distributed"], "--trust=distributed shows none"),
        (["--upload_bits=3"], "8 or 4"),
        (["--upload_bits=8", "--noise=hardened"], "Leave one of them out"),
        (["--robust=trimmed_mean:0.5"], "malformed"),
        (["--robust=trimmed_mean"], "malformed"),
        (["--robust=median", "--aggregation=fedex"], "replace the mean that it needs"),
        (["--robust=median", "--aggregation=fedsa"], "replace the mean that it needs"),
        (["--robust=median", "--ranks=1,2,2"], "compares uploads of one shape"),
        (["--ranks=1,2"], "for each of 3 clients"),
        (["--ranks=1,2,9"], "from 1 to --rank=4"),
        (["--ranks=1,2,2", "--aggregation=fedsa"], "its halves have one rank"),
        (["--ranks=1,2,2", "--freeze_a"], "--ranks cannot be used with --freeze_a"),
        (["--participation=fixed:4"], "between 1 and --clients=3"),
        (["--dropout=1"], "--dropout=1.0 must lie in"),
        (["--dropout=0.1", "--trust=client", "--delta=1e-3"], "--dropout cannot be used with --trust=client"),
        (["--proximal=0.1"], "needs --local_steps of 2"),
        (["--server_optimizer=lion"], "not known"),
        (["--server_optimizer=adam", "--server_momentum=0.5"], "moments of its own"),
    ],
)
def test_a_combination_without_a_meaning_is_refused_in_one_sentence(more, words):
    with pytest.raises(InputError) as error:
        parse(*more)
    assert words in str(error.value)


def test_a_client_is_calibrated_to_the_rounds_that_it_is_in():
    """A public schedule amplifies nothing: epsilon is that of the client's own rounds, at its own sampling rate."""
    config = parse("--participation=poisson:0.4", "--local_steps=2", "--rounds=12")
    steps = participation.steps(config).sum(0)
    assert len(set(steps.tolist())) > 1
    assert (steps % 2 == 0).all()
    found = calibration.mechanisms(config, [300, 300, 300])
    for mechanism, count in zip(found, steps.tolist(), strict=True):
        assert 3.97 < accounting.epsilon(mechanism, count, config.privacy.delta) <= 4
        assert mechanism.sampling_rate == 64 / 300
    more_often, less_often = found[int(np.argmax(steps))], found[int(np.argmin(steps))]
    assert more_often.noise_multiplier > less_often.noise_multiplier


@pytest.mark.parametrize("aggregation", ["rolora", "fedex", "flora", "flexlora", "fedsa"])
def test_the_servers_optimizer_is_the_heads_alone_where_factors_are_settled(aggregation):
    """Momentum 0.9: a constant mean upload of 1 moves the head by 1 and 1.9, settled factors by 1 and 1; a falling rate of
    RoLoRA's is for both."""
    more = ["--lr_decay=0.5", "--rounds=2"] if aggregation == "rolora" else []
    config, rates = parse(f"--aggregation={aggregation}", "--server_momentum=0.9", *more), [1, 0.75 if more else 1]
    tree = {"layers": {"q": np.zeros(2, np.float32)}, "head": np.zeros(3, np.float32)}
    _, server = program.optimizers(config)
    state, up = server.init(tree), jax.tree.map(lambda x: x - 1, tree)
    steps = []
    for _ in range(2):
        step, state = server.update(up, state, tree)
        steps.append([float(leaf[0]) for leaf in jax.tree.leaves(step)])  # head, layers
    factors = [1, 1.9] if aggregation == "fedsa" else [1, 1]
    np.testing.assert_allclose(steps, np.transpose([[1, 1.9], factors]) * np.array(rates)[:, None], rtol=1e-6)


def test_adagrad_at_the_server_is_the_papers():
    """A first mean upload of 1e-3 becomes 1e-3 / (1e-3 + tau), tau = 1e-3, up to where tau stands (Reddi et al. 2021)."""
    _, server = program.optimizers(parse("--server_optimizer=adagrad"))
    tree = {"head": np.zeros(1, np.float32)}
    step, _ = server.update({"head": np.full(1, -1e-3, np.float32)}, server.init(tree), tree)
    assert float(step["head"][0]) == pytest.approx(1 / np.sqrt(2), rel=1e-3)


def test_accuracy_of_a_client_that_is_never_in_a_round_is_no_breach(command, tmp_path):
    """Without privacy too the ledger holds: a client's epsilon is infinite from its first round on."""
    folder = tmp_path / "run"
    more = [
        "--epsilon=inf",
        "--rounds=2",
        "--dispatch_rounds=1",
        "--participation=fixed:1",
        "--head_only",
        f"--workdir={folder}",
    ]
    fit([*command, *more])
    assert ledger.verify(folder)
    assert [line["epsilon"].count("inf") for line in lines_of(folder / "metrics.jsonl")] == [0, 1, 2]


def test_many_clients_steps_are_rounded_up_to_a_few_counts():
    rng = np.random.default_rng(0)
    steps, sizes = rng.binomial(50, 0.2, 300), list(range(300))
    planned = calibration.planned_steps(steps, sizes)
    assert (planned >= steps).all()
    assert planned.max() == steps.max()
    assert len(set(planned.tolist())) == calibration.LEVELS
    assert (planned - steps <= np.ptp(steps) / calibration.LEVELS + 1).all()
    np.testing.assert_array_equal(calibration.planned_steps(steps[:20], sizes[:20]), steps[:20])


def test_who_fails_to_send_pays_all_the_same():
    config = parse("--participation=fixed:2", "--dropout=0.9")
    assert participation.partial(config)
    np.testing.assert_array_equal(participation.steps(config).sum(1), 2)
    held = [bytes([k] * 32) for k in range(3)]
    sent = participation.joins(config, held, range(1, 11), 0)
    assert (sent <= participation.schedule(config)).all()
    assert sent.sum() < participation.schedule(config).sum() / 2
    assert participation.joins(parse("--participation=fixed:2"), held, range(3, 5), 0).tolist() == (
        participation.schedule(config)[2:4].astype(float).tolist()
    )


@pytest.fixture
def command(tiny_bert, finance_table):
    return [
        f"--model={tiny_bert}", "--dataset=csv", f"--data_dir={finance_table}", "--text_column=text", "--label_column=label",
        "--max_length=8", "--clients=3", "--rounds=4", "--expected_batch_size=6", "--rank=2", "--epsilon=8", "--delta=1e-3",
        "--client_lr=0.1", "--head_lr=1", "--eval_every=2", "--dispatch_rounds=2", "--seed=3",
    ]  # fmt: skip


def test_a_scheduled_run_charges_each_client_for_its_rounds_and_its_ledger_holds(command, tmp_path, monkeypatch):
    """Nobody is taken past the budget, and who sits a round out pays nothing for it."""
    folder = tmp_path / "run"
    command = [*command, "--participation=fixed:2", "--dropout=0.3", "--head_only", f"--workdir={folder}"]
    fit(command)
    config = cli.parse(command)
    book = Ledger(folder / "privacy_ledger.jsonl")
    assert book.charged_steps(3) == participation.steps(config).sum(0).tolist()
    assert sum(book.charged_steps(3)) == 2 * 4
    spent = book.epsilons(1e-3)
    assert all(7.9 < value <= 8 for value in spent)
    assert ledger.verify(folder)
    lines = lines_of(folder / "metrics.jsonl")
    for line in lines[1:]:
        counts = participation.steps(config)[: line["round"]].sum(0)
        for value, count in zip(line["epsilon"], counts, strict=True):
            assert (value == 0) == (count == 0)
        assert line["finished"] <= 2
        assert line["dropped"] == []


def test_a_ledger_that_hides_a_clients_rounds_is_refused(command, tmp_path):
    folder = tmp_path / "run"
    fit([*command, "--participation=fixed:2", "--head_only", f"--workdir={folder}"])
    stored = json.loads((folder / "config.json").read_text())
    stored["participation"] = "fixed:1"
    (folder / "config.json").write_text(json.dumps(stored))
    with pytest.raises(InputError, match="clients in its rounds"):
        ledger.verify(folder)


def test_a_lost_attempt_ends_a_scheduled_run_early_and_within_its_budget(command, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    command = [flag for flag in command if not flag.startswith("--seed")]  # whose noise is no secret, and drawn again
    command = [*command, "--split_seed=3", "--participation=fixed:2", "--head_only", f"--workdir={folder}"]
    with monkeypatch.context() as patch:
        crash_before(patch, dispatch, "commit")
        with pytest.raises(KeyboardInterrupt):
            fit(command)
    fit(command)
    book = Ledger(folder / "privacy_ledger.jsonl")
    assert max(book.epsilons(1e-3)) <= 8
    planned = participation.steps(cli.parse(command)).sum(0)
    assert (np.array(book.charged_steps(3)) <= planned).all()
    assert lines_of(folder / "metrics.jsonl")[-1]["round"] < 4
    assert ledger.verify(folder)


@pytest.mark.parametrize("aggregation", mostly_slow(["fedex"], ["fedex", "flora"]))
def test_the_adapter_file_holds_what_was_folded_into_the_base(command, tmp_path, aggregation):
    """The released model is base with residual and adapter; PEFT's file on the bare base is the same model."""
    folder = tmp_path / "run"
    state = fit([*command, f"--aggregation={aggregation}", f"--workdir={folder}"]).federation._state
    config = cli.parse([*command, f"--aggregation={aggregation}"])
    model, params = models.from_pretrained(config.base.name, num_labels=2)
    adapter, lora_config = peft.load(folder / "adapter", model, params)
    expected = jax.tree.map(np.add, jax.device_get(state.residual), exact.product(state.adapter))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), exact.product(adapter), expected)
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(state.residual)) > 1e-4
    batch = {"input_ids": np.arange(5, 13)[None].astype(np.int32), "attention_mask": np.ones((1, 8), np.int32)}
    shifted = model.apply(lora.shifted(model, params, state.residual), batch, state.adapter)
    np.testing.assert_allclose(model.apply(params, batch, adapter), shifted, atol=1e-4)
    assert lora_config.alpha == lora_config.rank
    assert ledger.verify(folder)


def test_every_client_of_fedsa_is_evaluated_and_has_a_file_of_its_own(command, tmp_path):
    folder = tmp_path / "run"
    job = fit([*command, "--aggregation=fedsa", f"--workdir={folder}"])
    last = lines_of(folder / "metrics.jsonl")[-1]
    assert len(last["accuracy_by_client"]) == 3
    assert min(last["accuracy_by_client"]) - 1e-9 <= last["accuracy"] <= max(last["accuracy_by_client"]) + 1e-9
    model, params = models.from_pretrained(cli.parse(command).base.name, num_labels=2)
    own = [peft.load(folder / "adapter" / "clients" / str(k), model, params)[0]["layers"] for k in range(3)]
    config = cli.parse([*command, "--aggregation=fedsa"])
    cards = dict(model_card.adapter_notes(config, job.federation.model, summary.line(folder), ["bad", "good"]))
    assert set(cards) == {".", "clients/0", "clients/1", "clients/2"}
    for text in cards.values():
        assert "NOT FOR RELEASE" in text
        assert "means over the clients' own models" in text
    for name in own[0]:
        assert np.abs(own[0][name].b - own[1][name].b).max() > 1e-5
        np.testing.assert_array_equal(own[0][name].a, own[1][name].a)


def shapes(config):
    """An adapter of two layers of 10 to 6 numbers, and a head of 8."""
    pair = lora.Pair(np.zeros((2, config.lora.rank, 10)), np.zeros((2, 6, config.lora.rank)), 1.0)
    return {"layers": {"q": pair}, "head": {"kernel": np.zeros((4, 2))}}


@pytest.mark.parametrize(
    ("more", "up", "down"),
    [
        ([], 4 * (128 + 8), 4 * (128 + 8)),
        (["--ranks=1,2,4"], [4 * (32 * r + 8) for r in (1, 2, 4)], [4 * (32 * r + 8) for r in (1, 2, 4)]),
        (["--upload_bits=8"], 128 + 4 * 4 + 8 + 4, 4 * (128 + 8)),
        (["--upload_bits=4"], 64 + 4 * 4 + 4 + 4, 4 * (128 + 8)),
        (["--aggregation=rolora"], 4 * (64 + 8), 4 * (64 + 8)),
        (["--aggregation=fedsa"], 4 * (80 + 8), 4 * (80 + 8)),
        (["--aggregation=flora"], 4 * (128 + 8), 4 * (120 + 8)),
        (["--aggregation=flora", "--rank=1", "--ranks=1,1,1"], 4 * (32 + 8), 4 * (3 * 32 + 8)),
        (["--aggregation=flora", "--rank=1", "--dropout=0.1"], 4 * (32 + 8), 4 * (120 + 8)),
        (["--aggregation=fedex"], 4 * (128 + 8), 4 * (128 + 8 + 120)),
        (["--aggregation=flexlora"], 4 * (128 + 8), 4 * (128 + 8)),
    ],
)
def test_bytes_are_what_travels(more, up, down):
    config = parse(*more)
    each = lambda value: value if isinstance(value, list) else [value] * 3  # noqa: E731
    assert round_bytes.by_client(config, shapes(config)) == (each(up), each(down))


def test_a_client_of_garbage_is_told_in_the_metrics(command, tmp_path, monkeypatch):
    """One client's noise is infinite: its upload is dropped, and everyone can see so."""
    prepare = Federation.prepare

    def broken(*args, **options):
        p = prepare(*args, **options)
        std = np.array(p.placement.clients.noise_std)
        std[1] = np.inf
        std = jax.device_put(std, p.placement.clients.noise_std.sharding)
        args[0].prepared = p._replace(
            placement=p.placement._replace(clients=p.placement.clients._replace(noise_std=std))
        )
        return args[0].prepared

    monkeypatch.setattr(Federation, "prepare", broken)
    fit([*command, "--head_only", f"--workdir={tmp_path / 'run'}"])
    lines = lines_of(tmp_path / "run" / "metrics.jsonl")
    assert [(line["finished"], line["dropped"]) for line in lines[1:]] == [(2, [1])] * 4
