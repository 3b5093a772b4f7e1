"""The federation as an object: `plan` says what it will cost, `fit` runs it, `save` writes what it released.

    federation = Federation(model, params, losses.classification, FederationConfig(privacy=Privacy(epsilon=8.0)))
    print(federation.plan([775] * 5))
    for round in federation.fit(shards, "runs/mine"):
        print(round.number, max(round.epsilon))
    federation.save("adapter")

There is one way through, for every command and every notebook, and one place that charges rounds (`dispatch.charge`); scores on
private records are charged where they are made (`private_scores.charge`).
"""

import contextlib
import functools
import math
import pathlib
import warnings
from typing import NamedTuple

from dplora_jax import config_checks
from dplora_jax.config import FederationConfig
from dplora_jax.errors import InputError, InputWarning
from dplora_jax.federation import (
    description,
    dispatch,
    final_adapter,
    finite,
    held_out,
    mesh,
    metrics_lines,
    planning,
    preparation,
    private_scores,
    processes,
    storage,
    trust,
)
from dplora_jax.federation.clock import Clock


class Round(NamedTuple):
    """A finished round; number 0 is the base model, or the start that `fit` was given. All of it is public."""

    number: int
    epsilon: list[float]  # what each client has spent, in all
    metrics: dict  # on the public test set and on what clients keep back, where this round was evaluated
    line: dict  # its line of metrics.jsonl: these, and seconds, bytes and who took part


class Federation:
    """Clients who fine-tune one frozen language model together, each under its own (epsilon, delta).

    `model` and `params` come from `models.from_pretrained`; `loss` makes the local loss, (model, params) -> loss
    (`losses.classification`, `losses.language_model`); `config` is a FederationConfig. `programs`, a dict, keeps compiled
    rounds, and `memo` what the frozen layers made of records: given the same dicts, federations that differ in no more than
    records and `seed` share them. `base_name` is what others know the base model by, for the adapter's files; `clock` (a
    `clock.Clock`) learns where time goes.

    Raises InputError where the configuration has no guarantee, or no meaning.
    """

    def __init__(self, model, params, loss, config=None, *, base_name=None, programs=None, memo=None, clock=None):
        self.config = config_checks.settle(config or FederationConfig())
        self.model, self.params, self.loss = model, params, loss
        self.mesh = mesh.make(self.config.execution.mesh, self.config.schedule.clients, model)
        self._programs, self._memo = {} if programs is None else programs, memo
        self.base_name, self.stopped, self._released = base_name, False, None
        self.history, self.prepared, self.clock = [], None, clock or Clock()
        self._state = self._held = None

    def plan(self, sizes):
        """The Plan for clients of `sizes` records, which are public: nothing runs, and no record is looked at."""
        self._check_count(sizes)
        return planning.plan(self.config, list(sizes))

    def local_clients(self, length):
        """The numbers of the clients whose records this process must give to `fit`, of rows of `length` tokens: all, where
        there is one process."""
        if processes.count() == 1:
            return list(range(self.config.schedule.clients))
        wave = preparation.adapter_and_wave(self.config, self.mesh, self.model, self.params, length)[-1]
        return mesh.own_clients(self.mesh, self.config.schedule.clients, wave)

    def fit(
        self, shards, workdir=None, *, evaluate=None, probe=None, score=None, describe=None, start=None, stop=lambda: False,
        closing=None,
    ):  # fmt: skip
        """Run all rounds, or those that an earlier start in `workdir` left -> an iterator of `Round`, those of earlier starts
        first.

        `shards` has for each client a dict of [n_k, ...] arrays: `input_ids` and `attention_mask` [n_k, T] int32, and what the
        loss reads (`labels` [n_k]; `loss_mask` [n_k, T]); None for a client whose records another process holds. Where units
        may have several rows (`privacy_unit`, `unit_rows`), there is one entry for each row, and `unit` int numbers its unit.
        Each dispatch of rounds is charged before it runs, saved, committed, and only then yielded. Without a `workdir` (a path,
        or a `storage.Workdir`) the run is kept in memory, and a warning says that nothing of it is durable.

        Where the run of `workdir` has ended already, its rounds are yielded as they were. `evaluate(prepared)` gives a function
        (adapter, residual, ends) -> metrics on public records (`evaluation.on`), called every `execution.eval_every` rounds;
        `probe` likewise one that only tells whether a run that is not evaluated still has finite logits. With `private_test`,
        noisy scores on what clients keep back (`held_out`) join the metrics, by `score(prepared, held)` (default:
        `private_scores.of_rows`). `describe(prepared)` gives what config.json says beyond the configuration. `start(prepared)`
        gives the adapter before round 1, by public data alone (default: a fresh one). Where `stop()` holds after a dispatch, the
        run ends there with `stopped` set, and everything saved. Process 0 calls `closing()` when the adapter is saved and before
        the ledger says that the run has ended: after a kill, it is called again.

        Raises InputError for records that a run cannot have or is not to go on with, NotFiniteError where training diverged.
        """
        self.history, self.stopped, self._state, self._released = [], False, None, None
        with self._open(workdir) as kept:
            if kept.finished:
                self.history = kept.lines()
                yield from map(_round, self.history)
                return
            self._check_count(shards)
            keys = kept.secrets(trust.mode(self.config).parties(self.config), self.config.privacy.seed)
            training, held = held_out.split(self.config, shards, keys)
            prepared = self.prepare(training, kept.stored, held)
            wanted = evaluate and self.config.execution.eval_every
            with self.clock.part("frozen layers"):  # of the public test set
                evaluated = self._measuring(prepared, evaluate) if wanted else _nothing
                probed = self._measuring(prepared, probe) if probe else None
            job = self._job(prepared, kept, keys, describe)
            score = score or functools.partial(private_scores.of_rows, self.loss)
            start = start and self.clock.part("public records")(start)
            begin = functools.partial(preparation.begun, prepared, start)
            yield from self._run(job, begin, private_scores.beside(evaluated, job, held, score), probed, stop, closing)

    def save(self, directory):
        """Write the released adapter to `directory` in PEFT's format (with aggregation=fedsa each client's own beside it).

        Raises InputError before `fit` has ended, and where its run had ended before: its `workdir` holds the adapter then."""
        if self._released is None:
            raise InputError("there is no adapter here: iterate over `fit` to its end, or look into its `workdir`.")
        final_adapter.save(
            pathlib.Path(directory), self.config, self.model, self.prepared.lora_config, self._released, self.base_name
        )

    def describe(self, describe=None):
        """What config.json says under "federation", with what `describe(prepared)` (see `fit`) adds; needs `prepare` before."""
        p = self.prepared
        described = description.describe(
            self.config, p.sizes, p.mechanisms, p.model, p.adapter, self.mesh, p.rounds.local.noise
        )
        described = private_scores.described(described, self.config, self._held)
        more = describe(p) if describe else {}
        return described | more | {"method": [*described["method"], *more.get("method", ())]}

    def evaluate(self, evaluate):
        """The metrics that `evaluate(prepared)` (see `fit`) gives of the adapter as it stands: the base model's before `fit`.

        Everything is measured, also what takes longer. It needs `prepare` or `fit` before."""
        state = self.prepared.state if self._state is None else self._state
        return self._measuring(self.prepared, evaluate)(state, ends=True)

    @property
    def adapter(self):
        """The released adapter (a pytree on the host), once `fit` has ended."""
        return self._released and self._released.adapter

    def prepare(self, shards, stored=None, held=None):
        """Calibrate, run the frozen layers, and place everything on the mesh -> Prepared. All records of `shards` train; `held`
        (a `held_out.HeldOut`) is what was kept back of them. `stored` is the config.json (a dict) of a run that was charged
        already, whose mechanisms are kept. Raises InputError."""
        self._check_count(shards)
        prepared = preparation.prepare(
            self.config, self.model, self.params, self.loss, self.mesh, shards, stored, self._memo, self.clock
        )
        self._held, self.prepared = held, private_scores.covered(prepared, held)
        return self.prepared

    def _check_count(self, values):
        if len(values) != self.config.schedule.clients:
            raise InputError(
                f"records of {len(values)} clients are given, and clients={self.config.schedule.clients}: give one entry for "
                "each client."
            )

    @contextlib.contextmanager
    def _open(self, workdir):
        """Where the run is kept, as a context."""
        if isinstance(workdir, str | pathlib.Path):
            with storage.open_workdir(workdir, self.config) as opened:
                yield opened
            return
        if workdir is None:
            warnings.warn(
                "there is no workdir: nothing of this run is durable, its ledger included.", InputWarning, stacklevel=4
            )
        elif workdir.directory is not None:
            workdir.check(self.config)
        yield workdir or storage.InMemory()

    def _job(self, prepared, kept, keys, describe):
        """The Job of a run that is kept in `kept`: described, its secrets `keys` at hand, its ledger sealed."""
        config, described = self.config, self.describe(describe)
        if trust.mode(config).private and not all(math.isfinite(client["epsilon"]) for client in described["clients"]):
            raise InputError(
                f"no finite epsilon holds at delta={config.privacy.delta:g} with this noise: raise delta, or the noise."
            )
        kept.describe(config, described)
        if kept.ledger is not None:
            kept.ledger.seal_with(b"".join(keys))
            kept.ledger.promise()
        inputs = dispatch.keyed_inputs(keys, prepared.base_digest, preparation.records_digest(prepared, keys))
        self.clock.begin()  # preparing is no waiting of the devices
        return dispatch.Job(config, prepared, kept, keys, inputs, described, self.clock, self._programs)

    def _measuring(self, prepared, evaluate):
        """A function (state, ends) -> metrics of what `evaluate(prepared)` measures."""
        measure = evaluate(prepared)
        return lambda state, ends=False: final_adapter.metrics(
            self.config, prepared.sizes, functools.partial(measure, ends=ends), state
        )

    def _run(self, job, begin, evaluate, probe, stop, closing):
        """Dispatch after dispatch until the rounds, or the budget, are at their end; yields each finished Round."""
        config = self.config
        processes.agree(lambda: dispatch.check_past(job))
        done, state, self.history = self._restored(job, begin, evaluate)
        yield from map(_round, self.history)
        self._state = state
        while True:
            finite.check(state, self.history, probe)
            self.stopped = processes.any_of(stop())
            if self.stopped or (todo := dispatch.agreed_charge(job, done)) is None:
                break
            rounds, attempt, paid, earlier = todo
            job = job._replace(paid=paid, earlier=earlier)
            state, shown, seconds = dispatch.execute(job, state, rounds, attempt)
            self._state, done = state, rounds[1] - 1
            fresh = metrics_lines.dispatch_lines(job, rounds, attempt, seconds, shown)
            if len(state.clip_norms):
                fresh[-1]["clip_norm"] = state.clip_norms.tolist()  # public: it follows from released counts
            last = done == config.schedule.rounds
            if config.execution.eval_every and (done % config.execution.eval_every == 0 or last):
                with self.clock.part("evaluating"):
                    fresh[-1] |= evaluate(state, done, ends=last)
            if last:
                fresh[-1] |= processes.agree(functools.partial(metrics_lines.charged, job))
            self.history = [*self.history, *fresh]
            dispatch.commit(job, done, state, self.history, shown, (rounds, attempt))
            yield from map(_round, fresh)
        self.stopped &= done < config.schedule.rounds
        self.clock.stop()
        if not self.stopped:
            yield from self._finish(job, state, evaluate, probe, closing)

    def _restored(self, job, begin, evaluate):
        """(rounds done, state, metrics lines) of the newest checkpoint, or of `begin()`, which is evaluated and saved."""
        processes.at("the newest checkpoint")
        restored = job.storage.restore(job.prepared.state)
        if restored is None:
            line = metrics_lines.base_line(job.config.schedule.clients)
            state = begin()
            with self.clock.part("evaluating"):
                line |= evaluate(state, 0, ends=True)
            done, notes = 0, {"lines": [line], "ledger": job.ledger and job.ledger.anchor}  # process 0 writes the notes
            job.storage.save(0, state, notes)
        else:
            done, state, notes = restored
        if processes.primary():
            entry = job.ledger.open_entry()
            if entry and entry["rounds"][1] - 1 <= done:  # killed between the checkpoint and its commit
                job.ledger.commit(entry["rounds"], entry["attempt"])
            job.storage.release(notes["lines"])
        return done, state, notes["lines"]

    def _finish(self, job, state, evaluate, probe, closing):
        """Settle the last line, write the adapter, close the ledger and destroy the secrets; yields the last Round once more
        where only now it was evaluated."""
        config, last = self.config, dict(self.history[-1])
        if config.execution.eval_every and not {*finite.METRICS, held_out.SPENT} & {*last}:
            # `eval_every` was 0 until this start, or the budget ended early
            with self.clock.part("evaluating"):
                last |= evaluate(state, last["round"], ends=True)
        last |= processes.agree(functools.partial(metrics_lines.charged, job))
        changed = last != self.history[-1]
        self.history = [*self.history[:-1], last]
        finite.check(state, self.history, probe)
        self._state, self._released = state, final_adapter.fetched(config, job.prepared.params, state)
        if processes.primary():
            job.storage.release(self.history)
            if job.storage.directory is not None:
                self.save(job.storage.directory / "adapter")
            if closing:
                closing()
            job.ledger.append(entry="end", round=last["round"])
            job.storage.finish()
        if changed:
            yield _round(last)


def _nothing(state, ends=False):
    """The metrics of a run that is not evaluated."""
    return {}


def _round(line):
    metrics = {name: value for name, value in line.items() if name not in metrics_lines.FIELDS}
    return Round(line["round"], line.get("epsilon", []), metrics, line)
