"""The launch scripts, rehearsed: what they would run is a run's command line, and stubs stand in for clusters."""

import os
import pathlib
import shlex
import subprocess

import pytest
import yaml

from experiments import flags

LAUNCH = pathlib.Path(__file__).parent.parent / "launch"
LOG = '#!/bin/sh\necho "$(basename "$0") $*" >> "$STUB_LOG"\n'


@pytest.fixture
def rehearse(tmp_path):
    """Run a script of launch/ -> (exit code, lines of output, lines that the stubs wrote); `code` is the run's exit code."""

    def stub(name, body):
        path = tmp_path / name
        path.write_text(LOG + body)
        path.chmod(0o755)

    stub("python", "exit $STUB_CODE")
    stub("srun", 'while [ "${1#-}" != "$1" ]; do shift; done\nexec "$@"')
    stub("scontrol", "")
    stub("git", "")
    stub("gcloud", 'case "$*" in *describe*) echo $STUB_HOSTS;; esac')

    def run(script, *arguments, code=0, hosts=1, **variables):
        log = tmp_path / "log"
        log.write_text("")
        stubs = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "STUB_LOG": str(log), "STUB_CODE": str(code)}
        env = os.environ | stubs | {"STUB_HOSTS": str(hosts), "SLURM_JOB_ID": "7"} | variables
        command = ["bash", str(LAUNCH / script), *arguments]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=30)
        return done.returncode, (done.stdout + done.stderr).splitlines(), log.read_text().splitlines()

    return run


def config_of(words):
    """The RunConfig of a command that ends in `python -m experiments.run ...`."""
    words = words[words.index("experiments.run") + 1 :]
    return flags.parse(words)


def test_dry_runs_print_a_command_that_a_run_accepts(rehearse):
    code, out, log = rehearse("local.sh", "--dry_run", "--seed=3", MESH="4x2", WORKDIR="runs/a b")
    config = config_of(shlex.split(out[-1]))
    assert (code, log) == (0, [])
    assert (config.mesh, config.seed, config.workdir) == ("4x2", 3, "runs/a b")
    code, out, log = rehearse("slurm.sbatch", "--dry_run")
    assert (code, log) == (0, [])
    assert config_of(shlex.split(out[-1])).mesh == "8x1"
    code, out, log = rehearse("tpu_pod.sh", "--dry_run", "--rounds=3")
    remote = shlex.split(out[-1])[-1].removeprefix("--command=")
    assert (code, log) == (0, [])
    assert config_of(shlex.split(remote)).rounds == 3


def test_local_script_runs_what_it_prints_and_hands_on_the_exit_code(rehearse):
    code, _, log = rehearse("local.sh", "--seed=3", code=75)
    assert code == 75
    assert log == ["python -m experiments.run --flagfile=finance.flags --workdir=runs/local --mesh=auto --seed=3"]


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (2, False), (75, True)])
def test_slurm_script_queues_itself_again_when_stopped_and_only_then(rehearse, code, requeued):
    ended, _, log = rehearse("slurm.sbatch", code=code)
    assert ended == code
    assert log[0].startswith("srun ")
    assert log[1].startswith("python -m experiments.run")
    assert log[2:] == (["scontrol requeue 7"] if requeued else [])


def test_slurm_script_signals_the_task_before_the_end():
    options = [line for line in (LAUNCH / "slurm.sbatch").read_text().splitlines() if line.startswith("#SBATCH")]
    assert "#SBATCH --signal=TERM@120" in options
    assert {"#SBATCH --nodes=1", "#SBATCH --ntasks-per-node=1"} <= set(options)


def test_tpu_script_copies_the_last_commit_alone_and_refuses_more_than_one_host(rehearse):
    code, _, log = rehearse("tpu_pod.sh")
    assert code == 0
    copied = [line for line in log if " scp " in line]
    assert len(copied) == 1
    assert "dplora_jax.tar.gz dplora:dplora_jax.tar.gz" in copied[0]
    assert any(line.startswith("git archive --output=") and line.endswith(" HEAD") for line in log)
    code, out, log = rehearse("tpu_pod.sh", hosts=4)
    assert (code, len(out), len(log)) == (2, 1, 1)
    assert "4 hosts" in out[0]


def test_gke_jobset_parses_and_its_flags_are_a_runs():
    jobset = yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert (job["parallelism"], job["completions"]) == (1, 1)
    assert (pod["restartPolicy"], container["resources"]["limits"]["google.com/tpu"]) == ("Never", 8)
    assert container["command"] == ["python", "-m", "experiments.run"]
    config = flags.parse(container["args"])
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert config.workdir.startswith(mounts[pod["volumes"][0]["name"]])
    ends = {
        tuple(rule["onExitCodes"]["values"]): rule["action"]
        for rule in job["podFailurePolicy"]["rules"]
        if "onExitCodes" in rule
    }
    assert ends == {(75,): "Ignore", (2,): "FailJob"}
    assert {
        rule["onExitCodes"]["containerName"] for rule in job["podFailurePolicy"]["rules"] if "onExitCodes" in rule
    } == {"run"}
