"""The launch scripts, rehearsed: what they would run is a run's command line, and stubs stand in for runs and clusters."""

import os
import pathlib
import re
import shlex
import signal
import subprocess
import time

import pytest
import yaml

from experiments import cli

LAUNCH = pathlib.Path(__file__).parent.parent / "launch"
LOG = '#!/bin/sh\necho "$(basename "$0") $*" >> "$STUB_LOG"\n'
# A run: says that it runs, and ends with its process's code, or when told to (TERM; or never, "deaf").
RUN = """
case "$*" in *--process=*) process=${*##*--process=};; *) process=0;; esac
eval "code=\\${STUB_CODE_$process:-$STUB_CODE}"
echo "devices ${XLA_FLAGS-} gpus ${CUDA_VISIBLE_DEVICES-}"
[ "$code" = deaf ] && trap '' TERM
[ "$code" = waits ] && trap 'exit 75' TERM
echo "running $process" >> "$STUB_LOG"
case "$code" in deaf | waits) for _ in $(seq 400); do sleep 0.05; done; exit 99;; esac
exit $code
"""


@pytest.fixture
def rehearse(tmp_path):
    """Run a script of launch/ -> (exit code, lines of output, lines that the stubs wrote); `code` is the run's exit code, and
    `act(script's process, log)` what happens meanwhile."""

    def stub(name, body):
        path = tmp_path / name
        path.write_text(LOG + body)
        path.chmod(0o755)

    stub("python", RUN)
    stub("srun", 'while [ "${1#-}" != "$1" ]; do shift; done\nexec "$@"')
    stub("scontrol", "")
    stub("git", "")
    stub("gcloud", 'case "$*" in *describe*) echo $STUB_HOSTS;; esac')

    def run(script, *arguments, code=0, hosts=1, act=None, **variables):
        log = tmp_path / "log"
        log.write_text("")
        stubs = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "STUB_LOG": str(log), "STUB_CODE": str(code)}
        env = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "CUDA_VISIBLE_DEVICES")}
        env |= stubs | {"STUB_HOSTS": str(hosts), "SLURM_JOB_ID": "7"} | variables
        command = ["bash", str(LAUNCH / script), *arguments]
        done = subprocess.Popen(
            command,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # what runs in the background ignores it
        )
        try:
            if act:
                act(done, log)
            out, _ = done.communicate(timeout=30)
        finally:
            done.kill()
        return done.returncode, out.splitlines(), log.read_text().splitlines()

    return run


def config_of(words):
    """The RunConfig of a command that ends in `python -m experiments.run ...`."""
    words = words[words.index("experiments.run") + 1 :]
    return cli.parse(words)


def test_dry_runs_print_a_command_that_a_run_accepts(rehearse):
    code, out, log = rehearse("local.sh", "--dry_run", "--seed=3", MESH="4x2", WORKDIR="runs/a b")
    config = config_of(shlex.split(out[-1]))
    assert (code, log) == (0, [])
    assert (config.execution.mesh, config.privacy.seed, config.output.workdir, config.execution.coordinator) == (
        "4x2",
        3,
        "runs/a b",
        None,
    )
    code, out, log = rehearse("slurm.sbatch", "--dry_run")
    config = config_of(shlex.split(out[-1]))
    assert (code, log) == (0, [])
    assert (config.execution.mesh, config.execution.coordinator) == ("16x1", "auto")
    code, out, log = rehearse("tpu_pod.sh", "--dry_run", "--rounds=3")
    config = config_of(shlex.split(shlex.split(out[-1])[-1].removeprefix("--command=")))
    assert (code, log) == (0, [])
    assert (config.schedule.rounds, config.execution.coordinator, config.output.workdir) == (
        3,
        "auto",
        "../dplora_runs/tpu",
    )
    code, out, log = rehearse("tpu_pod.sh", "--dry_run", WORKDIR="/mnt/runs/a b")
    assert config_of(shlex.split(shlex.split(out[-1])[-1].removeprefix("--command="))).output.workdir == "/mnt/runs/a b"


def test_the_gpu_check_hands_on_its_flags_and_exit_code(rehearse):
    code, _, log = rehearse("gpu_check.sh", "--small", "--parts=noise", code=1)
    assert (code, log[0]) == (1, "python -m experiments.gpu_check --small --parts=noise")


def test_local_script_runs_what_it_prints_and_hands_on_the_exit_code(rehearse):
    code, _, log = rehearse("local.sh", "--seed=3", code=75)
    assert code == 75
    assert log[0] == "python -m experiments.run --flagfile=finance.flags --workdir=runs/local --mesh=auto --seed=3"


def test_dry_run_of_several_processes_prints_each_command(rehearse):
    code, out, log = rehearse("local.sh", "--dry_run", "--seed=3", PROCESSES="3", DEVICES="2", XLA_FLAGS="--xla_a=b")
    assert (code, log, len(out)) == (0, [], 3)
    configs = [config_of(shlex.split(line)) for line in out]
    assert [(config.execution.processes, config.execution.process, config.privacy.seed) for config in configs] == [
        (3, i, 3) for i in range(3)
    ]
    (coordinator,) = {config.execution.coordinator for config in configs}
    assert re.fullmatch(r"127\.0\.0\.1:[1-9]\d{4}", coordinator)
    settings = {"JAX_PLATFORMS=cpu", "XLA_FLAGS=--xla_a=b --xla_force_host_platform_device_count=2"}
    assert all(settings < set(shlex.split(line)) for line in out)


def test_processes_on_this_machine_know_each_other_and_their_output_is_told_apart(rehearse):
    code, out, log = rehearse("local.sh", PROCESSES="2", DEVICES="4", code=0)
    assert code == 0
    configs = [config_of(shlex.split(line)) for line in log if line.startswith("python")]
    assert {(config.execution.processes, config.execution.process) for config in configs} == {(2, 0), (2, 1)}
    assert len({config.execution.coordinator for config in configs}) == 1
    devices = "devices --xla_force_host_platform_device_count=4 gpus "
    assert sorted(out) == [f"[0] {devices}", f"[1] {devices}"]


@pytest.mark.parametrize(("processes", "shares"), [(2, ["4,5", "6,7"]), (4, ["4", "5", "6", "7"])])
def test_gpus_are_dealt_to_processes_evenly(rehearse, processes, shares):
    code, out, _ = rehearse("local.sh", PROCESSES=str(processes), CUDA_VISIBLE_DEVICES="4,5,6,7")
    assert code == 0
    assert sorted(out) == [f"[{i}] devices  gpus {share}" for i, share in enumerate(shares)]


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"PROCESSES": "3", "CUDA_VISIBLE_DEVICES": "4,5,6,7"}, "3 do not share 4 GPUs"),
        ({"PROCESSES": "0"}, "PROCESSES=0"),
        ({"PROCESSES": "two"}, "PROCESSES=two"),
        ({"PROCESSES": "2", "DEVICES": "x"}, "DEVICES=x"),
    ],
)
def test_local_script_refuses_what_cannot_be_in_one_sentence(rehearse, variables, said):
    code, out, log = rehearse("local.sh", **variables)
    assert (code, len(out), log) == (2, 1, [])
    assert out[0].startswith("error: ")
    assert said in out[0]


def until_all_run(count):
    """Wait until `count` stubs run."""

    def wait(log):
        for _ in range(200):
            if log.read_text().count("running") == count:
                return
            time.sleep(0.05)
        raise AssertionError(log.read_text())

    return wait


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_every_process_and_the_run_ends_as_stopped(rehearse, number):
    def act(script, log):
        until_all_run(3)(log)
        script.send_signal(number)

    code, _, _ = rehearse("local.sh", PROCESSES="3", DEVICES="1", GRACE="60", code="waits", act=act)
    assert code == 75


@pytest.mark.parametrize(
    ("codes", "ended"),
    [
        (["waits", "1", "waits"], 1),  # the others are told to end after the grace time
        (["69", "deaf", "waits"], 69),  # and made to, where they do not heed it
        (["waits", "waits", "75"], 75),
        (["75", "deaf", "waits"], 137),  # one that had to be killed saved nothing
    ],
)
def test_when_a_process_fails_the_others_are_ended_and_its_code_is_handed_on(rehearse, codes, ended):
    given = {f"STUB_CODE_{i}": code for i, code in enumerate(codes)}
    code, _, log = rehearse("local.sh", PROCESSES="3", DEVICES="1", GRACE="1", **given)
    assert log.count("running 0") + log.count("running 1") + log.count("running 2") == 3
    assert code == ended


@pytest.mark.parametrize(
    ("code", "restarts", "requeued"),
    [
        *((code, "0", False) for code in (0, 1, 2)),
        *((code, "2", True) for code in (75, 69, 137)),
        *((code, "3", False) for code in (75, 69)),
    ],
)
def test_slurm_script_queues_itself_again_where_that_goes_on_and_not_for_ever(rehearse, code, restarts, requeued):
    ended, out, log = rehearse("slurm.sbatch", code=code, RESTARTS="3", SLURM_RESTART_COUNT=restarts)
    assert ended == code
    assert log[0].startswith("srun ")
    assert log[1].startswith("python -m experiments.run")
    assert [line for line in log if "scontrol" in line] == (["scontrol requeue 7"] if requeued else [])
    assert any("3 restarts" in line for line in out) == (restarts == "3")


def test_slurm_script_signals_the_tasks_before_the_end_and_a_task_that_ends_does_not_end_the_others_at_once(rehearse):
    options = [line for line in (LAUNCH / "slurm.sbatch").read_text().splitlines() if line.startswith("#SBATCH")]
    assert "#SBATCH --signal=TERM@120" in options  # with B: it would reach this script alone
    assert {"#SBATCH --nodes=2", "#SBATCH --ntasks-per-node=8", "#SBATCH --gres=gpu:8"} <= set(options)
    _, out, _ = rehearse("slurm.sbatch", "--dry_run")
    assert {"--kill-on-bad-exit=0", "--wait=120"} <= set(shlex.split(out[-1]))


def test_tpu_script_copies_the_last_commit_alone_to_every_host(rehearse):
    code, _, log = rehearse("tpu_pod.sh")
    assert code == 0
    copied = [line for line in log if " scp " in line]
    assert len(copied) == 1
    assert "--worker=all" in copied[0]
    assert "dplora_jax.tar.gz dplora:dplora_jax.tar.gz" in copied[0]
    assert any(line.startswith("git archive --output=") and line.endswith(" HEAD") for line in log)


def test_tpu_script_refuses_several_hosts_without_a_folder_that_all_see(rehearse):
    code, out, log = rehearse("tpu_pod.sh", hosts=4)
    assert (code, len(out), len(log)) == (2, 1, 1)
    assert "4 hosts" in out[0]
    code, _, log = rehearse("tpu_pod.sh", hosts=4, WORKDIR="/mnt/filestore/dplora")
    assert code == 0
    (started,) = [line for line in log if " ssh " in line]
    assert "--worker=all" in started
    assert "--workdir=/mnt/filestore/dplora --coordinator=auto" in started
    code, out, log = rehearse("tpu_pod.sh", "--dry_run", WORKDIR="gs://bucket/dplora")
    assert (code, len(out), log) == (2, 1, [])
    assert "gs://bucket/dplora" in out[0]


@pytest.fixture
def jobset():
    """The JobSet's spec, as parsed."""
    document = yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())
    assert (document["apiVersion"], document["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    return document["spec"]


def test_gke_jobset_has_a_pod_for_each_host_and_its_flags_are_a_runs(jobset):
    (job,) = jobset["replicatedJobs"]
    assert job["replicas"] == 1
    job = job["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    resources = container["resources"]
    assert resources["requests"] == resources["limits"] == {"google.com/tpu": 4}
    sides = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")
    hosts = int(sides[0]) * int(sides[1]) // resources["limits"]["google.com/tpu"]
    assert job["parallelism"] == job["completions"] == hosts == 4
    assert (job["completionMode"], pod["restartPolicy"]) == ("Indexed", "Never")
    assert container["command"] == ["python", "-m", "experiments.run"]
    config = cli.parse(container["args"])
    assert config.execution.coordinator == "auto"
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert config.output.workdir.startswith(mounts[pod["volumes"][0]["name"]])


def test_gke_jobset_starts_all_pods_again_so_many_times_and_never_after_bad_input(jobset):
    job = jobset["replicatedJobs"][0]["template"]["spec"]
    rules = [(rule["onExitCodes"], rule["action"]) for rule in job["podFailurePolicy"]["rules"]]
    assert {rule["containerName"] for rule, _ in rules} == {job["template"]["spec"]["containers"][0]["name"]}
    assert [(tuple(rule["values"]), action) for rule, action in rules] == [((2,), "FailJob"), ((75, 69), "Count")]
    # One pod that fails fails the Job, and the JobSet makes all of it anew, except where the pods' own policy failed it.
    assert job["backoffLimit"] == 0
    assert jobset["failurePolicy"]["maxRestarts"] > 0
    (rule,) = jobset["failurePolicy"]["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
