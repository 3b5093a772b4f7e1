"""The coordinator: send, sum and step, until all rounds are done."""

import contextlib
import io
import pathlib

import numpy as np
from absl import flags

from dplora_jax.errors import InputError
from dplora_jax.federation import storage, workdir_files
from dplora_jax.privacy import accounting
from dplora_jax.privacy.chain import replace_durably
from dplora_jax.silos import engines, keys, plan
from dplora_jax.silos.coordinator import Coordinator
from dplora_jax.silos.office import Office
from experiments.silo import options

RELEASED = "adapter.npy"


def main(arguments):
    """Run the command line -> exit code."""
    values = flags.FlagValues()
    flags.DEFINE_list("approvals", None, "comma-separated approval.json files of all sites", flag_values=values)
    flags.DEFINE_string("listen", "127.0.0.1:8443", "HOST:PORT of the mailbox", flag_values=values)
    flags.DEFINE_enum(
        "engine", "mailbox", ["mailbox", "socket"],
        "mailbox: listen at --listen for sites' relays; socket: for an engine's process on this machine, at WORKDIR/office.sock",
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_string(
        "relay_group",
        None,
        "engine=socket: group that may reach it, where the engine is another user",
        flag_values=values,
    )
    options.number("patience", "seconds that a round may take before the run stops; default: no end", None, values)
    options.number(
        "without", "seconds after which a round goes on without sites that are missing; default: never", None, values
    )
    path, values, workdir = options.read("coordinate", arguments, values, "coordinator")
    made = options.planned(path or workdir / plan.FILE)
    approved = {plan.approved(file, made) for file in values.approvals or ()}
    missing = [name for number, name in enumerate(made.names) if number not in approved]
    if missing:
        raise InputError(
            f"--approvals has none of {', '.join(missing)}: every site approves the plan before it begins."
        )
    with storage.locked(workdir):
        return _run(made, values, workdir)


def _run(made, values, workdir):
    """Coordinate in `workdir` -> exit code."""
    try:
        start = np.load(workdir / plan.START, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise InputError(f"{workdir / plan.START} cannot be read ({type(error).__name__}): restore it.") from None
    evaluate = _evaluator(made, values)
    office, own = Office(len(made.sites)), keys.load(workdir)
    workdir_files.write_config(workdir, made.config, made.body["federation"])
    show = Progress(made, workdir, evaluate)
    coordinator = Coordinator(made, own.sign, office, workdir, start, show, lambda text: print(text, flush=True))
    show.coordinator = coordinator
    with contextlib.ExitStack() as stack:
        if values.engine == "mailbox":
            address = options.address(values.listen, "listen")
            port = stack.enter_context(engines.mailbox(made, office, address, workdir / "relay"))
            print(f"The mailbox of plan {made.digest.hex()[:16]} listens at {address[0]}:{port}", flush=True)
        else:
            stack.enter_context(engines.socket(made, office, workdir / "office.sock", values.relay_group))
            print(f"The office of plan {made.digest.hex()[:16]} is at {workdir / 'office.sock'}", flush=True)
        coordinator.run(values.patience, values.without)
        released = coordinator.server.released(coordinator.state)
    content = io.BytesIO()
    np.save(content, released)
    replace_durably(workdir / RELEASED, content.getvalue())
    from experiments import report

    report.write(workdir)
    if coordinator.early:
        print(f"The run ended early: {coordinator.early}.")
    last = show.lines[-1]
    for name, epsilon in zip(made.names, last["epsilon"], strict=True):
        print(f"{name}: epsilon at most {epsilon:.4f} at delta {made.config.privacy.delta:g}")
    print(
        f"{last['round']} rounds; test {', '.join(scores(last)) or 'not evaluated'}; report: {workdir / 'report.html'}"
    )
    return 0


def _evaluator(made, values):
    """What measures an adapter, float32 [D], where the coordinator has a public test set; it needs JAX, and the base model."""
    own = options.own(values)
    if not own.get("test_data") or not made.config.execution.eval_every:
        return None
    from dplora_jax.federation import program
    from dplora_jax.finetuning import parties
    from dplora_jax.models import features
    from dplora_jax.silos import vectors

    config = plan.config_of(made, own)
    base = parties.public(config, {"federation": {features.KEY: made.body["measured"]}})
    adapter, params, _ = program.adapter(config, base.model, base.params)
    measure = parties.evaluator(config, base._replace(params=params))
    return lambda vector, ends: measure(vectors.tree(vector, adapter), ends)


def scores(line):
    """The public scores of a line of metrics.jsonl, in words."""
    return [f"{name} {line[name]:.3f}" for name in ("accuracy", "macro_f1", "perplexity") if name in line]


class Progress:
    """Writes metrics.jsonl after each round, from public facts alone, and tells of it."""

    def __init__(self, made, workdir, evaluate):
        self.made, self.workdir, self.evaluate, self.coordinator = made, pathlib.Path(workdir), evaluate, None
        self.lines = [line.values for line in workdir_files.read_metrics(self.workdir, made.config.schedule.rounds)]

    def __call__(self, number, state, seconds):
        if any(line["round"] == number for line in self.lines):  # an earlier start wrote it
            return
        config, sent = self.made.config, self.made.body["federation"]["communication"]
        nothing = {"bytes_up_per_client": 0, "bytes_down_per_client": 0}
        line = {"round": 0, "epsilon": [0.0] * len(self.made.sites), "epsilon_max": 0.0, "seconds": 0.0} | nothing
        if number:
            spent = self._spent()
            missing = sorted(set(range(len(self.made.sites))) - self.coordinator.past.members)
            line = {
                "round": number, "epsilon": spent, "epsilon_max": max(spent), "seconds": seconds,
                "release": self.made.body["federation"]["release"] or "NO PRIVACY",
                "bytes_up_per_client": sent["bytes_up_per_client_per_round"],
                "bytes_down_per_client": sent["bytes_down_per_client_per_round"],
            } | ({"finished": len(self.made.sites) - len(missing), "dropped": []} if missing else {})  # fmt: skip
        ends = number in (0, config.schedule.rounds)
        if self.evaluate and (ends or (config.execution.eval_every and number % config.execution.eval_every == 0)):
            line |= self.evaluate(self.coordinator.server.released(state), ends)
        self.lines = [*(old for old in self.lines if old["round"] < number), line]
        workdir_files.write_metrics(self.workdir, self.lines)
        spent = f"epsilon at most {line['epsilon_max']:.4f}"
        print(", ".join([f"round {number}: {seconds:.1f} s", spent, *scores(line)]), flush=True)

    def _spent(self):
        """The most that each site can have paid for what it was asked."""
        privacy, steps = self.made.config.privacy, self.made.mode.steps_per_round(self.made.config)
        if not self.made.mode.private:
            return [float("inf")] * len(self.made.sites)
        spent = [
            accounting.epsilon(mechanism, steps * asked, privacy.delta)
            for mechanism, asked in zip(self.made.mechanisms, self.coordinator.asked, strict=True)
        ]
        return [value if privacy.epsilon is None else min(value, privacy.epsilon) for value in spent]
