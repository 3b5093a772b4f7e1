"""The plan compiles the program of a run, and reads rightly what the compiled program says of itself."""

import json
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dplora_jax.errors import InputError
from dplora_jax.finetuning import setup
from experiments import cli, plan
from experiments.plan import collectives as plan_collectives
from experiments.plan import program as plan_program
from tests.conftest import GOLDEN, WORDS, write_tokenizer

TPU_TEXT = """
%fused (param_0: bf16[64,512], param_1: bf16[10,512,256], param_2: s32[]) -> bf16[64,256] {
  %param_0 = bf16[64,512]{1,0:T(8,128)(2,1)} parameter(0)
  %param_1 = bf16[10,512,256]{2,1,0:T(8,128)(2,1)} parameter(1)
  %param_2 = s32[]{:T(128)S(6)} parameter(2)
  %slice.1 = bf16[1,512,256]{2,1,0:T(8,128)(2,1)} dynamic-slice(%param_1, %param_2), dynamic_slice_sizes={1,512,256}
  %bitcast.1 = bf16[512,256]{1,0:T(8,128)(2,1)} bitcast(%slice.1)
  ROOT %convolution.1 = bf16[64,256]{1,0:T(8,128)(2,1)} convolution(%param_0, %bitcast.1), dim_labels=bf_io->bf
}

%body (param: (s32[], bf16[64,256], bf16[10,512,256])) -> (s32[], bf16[64,256], bf16[10,512,256]) {
  %param = (s32[]{:T(128)}, bf16[64,256]{1,0:T(8,128)}, bf16[10,512,256]{2,1,0}) parameter(0)
  %index = s32[]{:T(128)} get-tuple-element(%param), index=0
  %x = bf16[64,256]{1,0:T(8,128)} get-tuple-element(%param), index=1
  %w = bf16[10,512,256]{2,1,0} get-tuple-element(%param), index=2
  %all-gather.1 = bf16[64,512]{1,0:T(8,128)} all-gather(%x), channel_id=2, replica_groups=[4,2]<=[8], dimensions={1}
  %fusion.1 = bf16[64,256]{1,0:T(8,128)} fusion(%all-gather.1, %w, %index), kind=kOutput, calls=%fused
  ROOT %tuple.1 = (s32[]{:T(128)}, bf16[64,256]{1,0:T(8,128)}, bf16[10,512,256]{2,1,0}) tuple(%index, %fusion.1, %w)
}

%condition (param.1: (s32[], bf16[64,256], bf16[10,512,256])) -> pred[] {
  %param.1 = (s32[]{:T(128)}, bf16[64,256]{1,0:T(8,128)}, bf16[10,512,256]{2,1,0}) parameter(0)
  %constant.1 = s32[]{:T(128)} constant(10)
  %index.1 = s32[]{:T(128)} get-tuple-element(%param.1), index=0
  ROOT %lt = pred[]{:T(512)} compare(%index.1, %constant.1), direction=LT
}

ENTRY %main (x.1: bf16[64,256], w.1: bf16[10,512,256]) -> bf16[64,256] {
  %x.1 = bf16[64,256]{1,0:T(8,128)} parameter(0)
  %w.1 = bf16[10,512,256]{2,1,0} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  %start = (s32[]{:T(128)}, bf16[64,256]{1,0:T(8,128)}, bf16[10,512,256]{2,1,0}) tuple(%zero, %x.1, %w.1)
  %while.1 = (s32[]{:T(128)}, bf16[64,256]{1,0}, bf16[10,512,256]{2,1,0}) while(%start), condition=%condition, body=%body
  ROOT %out = bf16[64,256]{1,0:T(8,128)} get-tuple-element(%while.1), index=1
}
"""


def test_loops_count_as_often_as_they_run():
    assert plan_collectives.sent(TPU_TEXT) == {"all-gather": 10 * 64 * 512 * 2 / 2}
    known = TPU_TEXT.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"7"}}')
    assert plan_collectives.sent(known) == {"all-gather": 7 * 64 * 512 * 2 / 2}


@pytest.mark.parametrize(
    ("line", "sent"),
    [
        ("f32[8]{0} all-reduce(%x), replica_groups={{0,1,2,3}}, to_apply=%sum", {"all-reduce": 4 * 8 * 2 * 3 / 4}),
        ("f32[2]{0} reduce-scatter(%x), replica_groups=[1,4]<=[4], to_apply=%sum", {"reduce-scatter": 4 * 2 * 3}),
        ("(f32[8]{0}, f32[32]{0}) all-gather-start(%x), replica_groups=[2,4]<=[8]", {"all-gather": 4 * 32 * 3 / 4}),
        ("f32[32]{0} all-gather-done(%x)", {}),
        ("(f32[8]{0}, f32[4]{0}) all-reduce(%x, %y), replica_groups={{0,1}}, to_apply=%sum", {"all-reduce": 4 * 12}),
        ("f32[8]{0} all-gather(%x), replica_groups=mesh['a'=2,'b'=4,'c'=3] {'a','b'}", {"all-gather": 4 * 8 * 7 / 8}),
        ("bf16[8]{0:T(256)S(1)} collective-permute(%x), source_target_pairs={{0,1},{1,0}}", {"collective-permute": 16}),
    ],
)
def test_what_a_chip_sends_in_a_ring(line, sent):
    assert plan_collectives.sent(f"ENTRY %main (x: f32[8]) -> f32[8] {{\n  ROOT %out = {line}\n}}\n") == sent


def test_a_program_of_this_machine_is_counted():
    """The text of a compiled program, whatever its platform: a sum over four devices in each turn of a scan."""
    grid = Mesh(np.array(jax.devices()[:4]), ("clients",), axis_types=(AxisType.Auto,))

    def total(x, w):
        return jax.lax.scan(lambda x, w: (jax.lax.psum(jnp.tanh(x @ w), "clients"), None), x, w)[0]

    whole = PartitionSpec()
    mapped = jax.jit(jax.shard_map(total, mesh=grid, in_specs=(whole, whole), out_specs=whole, check_vma=False))
    shapes = [(8, 64), (6, 64, 64)]
    arguments = [jax.ShapeDtypeStruct(s, jnp.float32, sharding=NamedSharding(grid, whole)) for s in shapes]
    sent = plan_collectives.sent(mapped.lower(*arguments).compile().as_text())
    assert sent == {"all-reduce": 6 * 4 * 8 * 64 * 2 * 3 / 4}


@pytest.fixture(scope="module")
def small(tiny_bert, finance_table):
    """A RunConfig of the tiny model on the tiny table."""
    words = f"--model={tiny_bert} --dataset=csv --data_dir={finance_table} --text_column=text --label_column=label"
    more = "--max_length=8 --clients=3 --rounds=2 --expected_batch_size=4 --noise_multiplier=1 --mesh=2x2 --rank=2 --ema=0.5"
    return cli.parse([*words.split(), *more.split()])


def test_the_plan_is_of_the_very_program_that_runs(small, quick_compile):
    """Shapes, types, placement and every static choice are those that `setup.prepare` makes from data and weights."""
    same_program(small, "classification", "loss")


@pytest.mark.parametrize("task", ["language_model", "label_words"])
@pytest.mark.parametrize("last_layers", [1, 2])
def test_so_is_a_language_models(task, last_layers, tmp_path, quick_compile):
    """With frozen layers, which a run goes through once, and without."""
    shutil.copytree(GOLDEN / "variants/llama_mqa", tmp_path / "base")
    write_tokenizer(tmp_path / "base")
    rows = [{"text": f"{noun} again", "label": verb} for noun in WORDS[5:9] for verb in ("rose", "fell")]
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text(
            "".join(json.dumps(row | {"text": f"{row['text']} {name}"}) + "\n" for row in rows)
        )
    words = f"--model={tmp_path}/base --dataset=jsonl --data_dir={tmp_path} --text_column=text --max_length=16"
    more = f"--clients=3 --rounds=2 --expected_batch_size=2 --noise_multiplier=1 --rank=2 --last_layers={last_layers}"
    labels = ["--label_column=label", "--labels=rose,fell"] if task == "label_words" else []
    config = cli.parse([*words.split(), *more.split(), *labels])
    made, prepared = same_program(config, task, *(["loss"] if task == "language_model" else []))
    assert made.federation.model.start == 2 - last_layers
    data = made.arguments[3]
    assert ("hidden" in data) == (last_layers == 1)
    assert ("input_ids" in data) == (task == "language_model" or last_layers == 2)
    if task == "label_words":
        planned, real = made.federation.loss, prepared.rounds.loss
        assert planned.func is real.func
        assert len(planned.args[0]) == len(real.args[0]) == 2


def same_program(config, task, *names):
    """The Program of a plan, once it is seen to be that of a run."""
    job = setup.prepare(config)
    prepared = job.federation.prepare(job.shards)
    program = plan_program.abstract(config, jax.devices(), prepared.sizes, task, 2)
    real = (prepared.state, prepared.params, prepared.placement.clients, prepared.placement.data)
    assert jax.tree.structure(real) == jax.tree.structure(program.arguments[:4])
    for have, planned in zip(jax.tree.leaves(real), jax.tree.leaves(program.arguments[:4]), strict=True):
        assert (have.shape, have.dtype) == (planned.shape, planned.dtype)
        assert have.sharding.is_equivalent_to(planned.sharding, have.ndim)
    for name in ("model", "local", "ema", "wave", "rule", "method", "attendance", "rows", *names):
        assert getattr(prepared.rounds, name) == getattr(program.federation, name), name
    return program, prepared


@pytest.mark.parametrize("task", ["language_model", "label_words"])
def test_an_encoder_says_nothing(small, task):
    with pytest.raises(InputError, match=f"{task} needs a model that reads from left to right"):
        plan_program.abstract(small, jax.devices(), [20, 30, 10], task, 2)


ON_ONE_CHIP = ["--topology=v5e:1x1", "--model=smollm2-135m", "--mesh=1x1", "--max_length=16", "--records=20"]


@pytest.mark.parametrize(
    ("flags", "task"),
    [
        ([], "language_model"),
        (["--objective=classifier"], "classification"),
        (["--head_only"], "classification"),
        (["--core", "--rank=2"], "label_words"),
    ],
)
def test_what_is_trained_follows_the_flags_of_a_run(monkeypatch, flags, task):
    monkeypatch.setattr(plan_program, "measure", lambda program, hbm: SimpleNamespace(fits=True))
    monkeypatch.setattr(plan, "tell", lambda config, name, task, *rest: task)
    config, options = plan.parse([*ON_ONE_CHIP, *flags])
    assert plan.plan(config, options, plan.CHIPS["v5e"], jax.devices()[:1]) == task


def test_a_core_without_labels_is_refused():
    config, options = plan.parse([*ON_ONE_CHIP, "--core", "--rank=2", "--task=language_model"])
    with pytest.raises(InputError, match="--core needs labels"):
        plan.plan(config, options, plan.CHIPS["v5e"], jax.devices()[:1])


def test_a_pass_reads_the_layers_that_have_not_run_before():
    every, six = (
        plan_program.abstract(plan.parse([*ON_ONE_CHIP, *more])[0], jax.devices()[:1], [20] * 5, "language_model", 2)
        for more in ([], ["--last_layers=6"])
    )
    whole = plan_program.device_bytes(every.arguments[1])
    layers = plan_program.device_bytes(every.arguments[1]["layers"])
    assert 0.7 * whole < layers < whole
    assert plan_program.read_bytes(every) == whole
    assert plan_program.read_bytes(six) == whole - layers * 24 / 30


@pytest.mark.slow
def test_state_stays_where_it_lies_and_memory_is_the_arguments_and_more(small, quick_compile):
    program = plan_program.abstract(small, jax.devices(), [20, 30, 10], "classification", 2)
    compiled = []
    measured = plan_program.measure(program, 1 << 30, lambda lowered: compiled.append(lowered.compile()) or compiled[0])
    # Over a model axis too, a dispatch hands the state on as it takes it: the next one is the same executable.
    for given, back in zip(
        jax.tree.leaves(program.arguments[0]), jax.tree.leaves(compiled[0].output_shardings[0]), strict=True
    ):
        assert back.is_equivalent_to(given.sharding, given.ndim)
    assert measured.fits
    assert measured.arguments == pytest.approx(plan_program.device_bytes(program.arguments), rel=0.1)
    assert measured.total > measured.arguments > measured.base > 0
    assert 0 < measured.work.flops < measured.work.passes < 6 * measured.work.flops
    assert measured.work.memory > 2 * measured.base
    assert "all-reduce" in measured.work.sent
    told = plan.tell(small, "v5e:2x2", "classification", plan.CHIPS["v5e"], program, measured)
    assert told["fits"]
    assert told["round_seconds"] == max(told["seconds"].values()) > 0
    # In a slice of 2x2 chips each has two neighbours, to each of whom it sends 50 GB a second.
    assert told["seconds"]["interconnect"] == pytest.approx(sum(measured.work.sent.values()) / 100e9)
    json.dumps(told)
    plan.show(told)


@pytest.mark.parametrize(
    ("topology", "links"),
    [("v5e:1x1", 0), ("v5e:2x2", 2), ("v5e:2x4", 3), ("v5e:4x8", 4), ("v5p:2x2x1", 2), ("v5p:4x4x4", 6)],
)
def test_a_chip_has_links_to_its_neighbours_in_the_slice_alone(topology, links):
    assert plan.links(topology) == links


def test_what_cannot_hold_its_arguments_is_not_compiled(small):
    program = plan_program.abstract(small, jax.devices(), [20, 30, 10], "classification", 2)

    def never(lowered):
        raise AssertionError("compiled")

    measured = plan_program.measure(program, 1000, never)
    assert not measured.fits
    assert measured.work is None

    def full(lowered):
        raise jax.errors.JaxRuntimeError(
            "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 30.50G of 15.75G hbm."
        )

    measured = plan_program.measure(program, 1 << 30, full)
    assert (measured.fits, measured.total) == (False, 30.5 * 2**30)


@pytest.mark.parametrize("unit", ["--privacy_unit=column:patient_id", "--unit_rows=4"])
def test_a_plan_with_units_of_several_rows_is_refused(unit, capsys):
    assert plan.main(["--topology=v5e:2x2", "--model=gpt2", "--noise_multiplier=1", unit]) == 2
    assert "--privacy_unit and --unit_rows cannot be used here" in capsys.readouterr().err


def test_a_plan_with_streamed_records_is_refused(capsys):
    assert plan.main(["--topology=v5e:2x2", "--model=gpt2", "--noise_multiplier=1", "--stream"]) == 2
    assert "--stream cannot be used here" in capsys.readouterr().err


def test_flags_that_make_room_are_tried_until_it_fits(small, monkeypatch):
    tried = []

    def measure(config, *_):
        tried.append(config)
        fits = config.base.remat and config.base.dtype == "bfloat16" and config.execution.mesh == "1x4"
        return plan_program.Measured(fits, 5.0, 4.0, 3.0), None

    monkeypatch.setattr(plan, "_measure", measure)
    rows = plan.search(small, {}, "classification", plan.CHIPS["v5e"], range(4))
    assert rows[-1] == {
        "flags": "--wave=1 --remat --dtype=bfloat16 --microbatch=1 --mesh=1x4",
        "total": 5.0,
        "fits": True,
    }
    assert [row["fits"] for row in rows[:-1]] == [False] * (len(rows) - 1)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--model=gpt2", "--topology"),
        ("--topology=v5e:2x4 --task=poems", "poems"),
        ("--topology=v5e:2x4 --records=3,x", "--records=3,x"),
        ("--topology=v5e:2x4 --clients=3 --records=3,4", "--records=3,4"),
        ("--topology=h100:8", "h100:8"),
        ("--topology=v5e", "v5e"),
    ],
)
def test_mistakes_end_with_one_sentence(words, said, capsys):
    assert plan.main(words.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert said in error
    assert error.count("\n") == 1


def test_without_the_compiler_one_sentence_tells_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setattr(plan.importlib.util, "find_spec", lambda name: None)
    assert plan.main(["--topology=v5e:2x4", "--model=gpt2"]) == 2
    error = capsys.readouterr().err
    assert "pip install" in error
    assert error.count("\n") == 1
