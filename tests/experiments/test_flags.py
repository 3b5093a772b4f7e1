"""The command line: what it settles, and the one sentence for each mistake."""

import pytest

from dplora_jax.config import field_value
from dplora_jax.data import tasks
from dplora_jax.errors import InputError
from dplora_jax.federation import trust
from experiments import cli
from experiments.cli import flagfile_reader


def test_flagfile_is_read_and_later_flags_win():
    config = cli.parse(["--flagfile=finance.flags", "--rounds=2"])
    assert config.data.dataset == "finance_demo"
    assert config.schedule.rounds == 2
    assert config.privacy.epsilon == 8.0
    assert config.output.workdir == "runs/finance"


def test_flagfile_here_comes_before_the_shipped_one(tmp_path, monkeypatch):
    (tmp_path / "finance.flags").write_text("--epsilon=3\n--rounds=7\n")
    monkeypatch.chdir(tmp_path)
    assert cli.parse(["--flagfile", "finance.flags"]).schedule.rounds == 7


def test_noise_multiplier_takes_the_place_of_a_flagfiles_epsilon():
    config = cli.parse(["--flagfile=finance.flags", "--epsilon=none", "--noise_multiplier=2"])
    assert config.privacy.epsilon is None
    assert config.privacy.noise_multiplier == 2.0


def test_infinite_epsilon_is_trust_none():
    config = cli.parse(["--epsilon=inf"])
    assert config.privacy.trust == "none"
    assert not trust.mode(config).private
    assert config.privacy.epsilon is None


def test_head_learning_rate_follows_the_adapters_unless_given():
    assert cli.parse(["--epsilon=8", "--client_lr=0.5"]).optimizer.head_lr == 0.5
    assert cli.parse(["--epsilon=8", "--client_lr=0.5", "--head_lr=2"]).optimizer.head_lr == 2


def test_head_only_has_no_targets():
    assert cli.parse(["--epsilon=8", "--head_only"]).lora.trained_targets == ()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--epsilon=0"], "--epsilon"),
        (["--epsilon=-1"], "--epsilon"),
        (["--epsilon=nan"], "--epsilon"),
        (["--epsilon=many"], "--epsilon"),
        (["--epsilon=8", "--delta=0"], "--delta"),
        (["--epsilon=8", "--delta=1"], "--delta"),
        (["--epsilon=8", "--delta=nan"], "--delta"),
        (["--epsilon=8", "--noise_multiplier=1"], "exclude"),
        (["--noise_multiplier=0"], "--noise_multiplier"),
        ([], "--epsilon"),
        (["--trust=blind", "--epsilon=8"], "--trust"),
        (["--epsilon=8", "--clip_norm=0"], "--clip_norm"),
        (["--epsilon=8", "--clip_norm=inf"], "--clip_norm"),
        (["--epsilon=8", "--clip_norm=nan"], "--clip_norm"),
        (["--epsilon=8", "--rounds=0"], "--rounds"),
        (["--epsilon=8", "--clients=0"], "--clients"),
        (["--epsilon=8", "--client_lr=nan"], "--client_lr"),
        (["--epsilon=8", "--expected_batch_size=0"], "--expected_batch_size"),
        (["--epsilon=8", "--ema=1"], "--ema"),
        (["--epsilon=8", "--targets="], "--targets"),
        (["--epsilon=8", "--rank=many"], "rank"),
        (["--epsilon=8", "--colour=red"], "colour"),
        (["--epsilon=8", "stray"], "stray"),
        (["--flagfile=nowhere.flags"], "nowhere.flags"),
        (["--epsilon=8", "--processes=2", "--process=0"], "--coordinator"),
        (["--epsilon=8", "--process=1"], "--coordinator"),
        (["--epsilon=8", "--coordinator=host:1"], "--processes"),
        (["--epsilon=8", "--coordinator=host", "--processes=2", "--process=0"], "HOST:PORT"),
        (["--epsilon=8", "--coordinator=host:70000", "--processes=2", "--process=0"], "HOST:PORT"),
        (["--epsilon=8", "--coordinator=host:1", "--processes=2", "--process=2"], "--process=2"),
        (["--epsilon=8", "--coordinator=host:1", "--processes=0", "--process=0"], "--processes=0"),
        (["--epsilon=8", "--stall_timeout=1"], "--stall_timeout"),
    ],
)
def test_mistake_is_one_sentence_that_names_the_flag(argv, words):
    with pytest.raises(InputError, match=words) as caught:
        cli.parse(argv)
    assert "\n" not in str(caught.value)


def test_processes_need_no_number_where_the_cluster_gives_it():
    assert cli.parse(["--epsilon=8", "--coordinator=auto"]).execution.process is None


PAPER = sorted(path.name for path in flagfile_reader.SHIPPED.glob("paper_*.flags"))


def test_there_is_a_federation_of_the_papers_for_each_model_and_domain_that_it_can_have():
    models = {name.removeprefix("paper_").rsplit("_", 1)[0] for name in PAPER}
    assert models == {"gpt2", "bert", "chatglm6b", "llama2_7b"}
    assert len(PAPER) == 10  # BERT writes no answer and predicts no next token: finance alone


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_federations_have_its_values(name):
    config = cli.parse([f"--flagfile={name}"])
    paper = {
        "clients": 5, "rounds": 50, "expected_batch_size": 8, "noise_multiplier": 2, "client_lr": 5e-4, "clip_norm": 10,
        "rank": 512,
    }  # fmt: skip
    assert {flag: field_value(config, flag) for flag in paper} == paper
    assert config.data.dataset in tasks.TRAINABLE
    assert all(benchmark in tasks.TASKS for benchmark in config.evaluation.benchmarks)
    assert config.output.workdir == f"runs/{name.removesuffix('.flags')}"


TUNING = [
    "flowertune_general_mistral_7b.flags",
    "flowertune_medical_qwen2.5_0.5b.flags",
    "oasst_qwen2.5_0.5b.flags",
]


@pytest.mark.parametrize("name", TUNING)
def test_instruction_tuning_is_of_a_chat_on_a_public_task(name):
    config = cli.parse([f"--flagfile={name}"])
    assert config.data.chat
    assert tasks.TASKS[config.data.dataset].kind == tasks.ANSWERS
    assert config.privacy.epsilon == 8
    assert config.output.workdir == f"runs/{name.removesuffix('.flags')}"


@pytest.mark.parametrize("name", [name for name in TUNING if name.startswith("flowertune")])
def test_flowertunes_challenges_have_its_values(name):
    config = cli.parse([f"--flagfile={name}"])
    theirs = {
        "clients": 20, "participation": "fixed:2", "rounds": 200, "local_steps": 10, "expected_batch_size": 16, "rank": 32,
        "alpha": 64, "max_length": 512, "client_lr": 5e-5, "lr_decay": 0.02,
    }  # fmt: skip
    assert {flag: field_value(config, flag) for flag in theirs} == theirs


def test_openassistant_is_private_by_user():
    config = cli.parse(["--flagfile=oasst_qwen2.5_0.5b.flags"])
    assert (config.privacy.unit_column, config.privacy.unit_rows) == ("user_id", 4)
