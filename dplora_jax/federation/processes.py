"""Several processes as one run, by JAX's own coordination service: joining, agreeing, and an end for all when one is lost.

Each process drives its own devices and runs the same program; process 0 decides and writes. `watch` sees to it that all end
when one is lost. With one process nothing here does anything, and JAX is not touched.
"""

import functools
import json
import os
import signal
import socket
import sys

from dplora_jax import guard
from dplora_jax.config import to_flat
from dplora_jax.errors import InputError, Refused
from dplora_jax.federation import watch
from dplora_jax.federation.watch import LOST, ROOM
from dplora_jax.files import to_json

OWN = ("coordinator", "processes", "process", "stall_timeout")  # flags that need not be the same everywhere

_group = None


def count():
    """How many processes the run has."""
    return _group.count if _group else 1


def number():
    """Which of them this one is, from 0."""
    return _group.number if _group else 0


def primary():
    """Whether this process is the one that writes: ledger, metrics, adapter, report."""
    return number() == 0


def join(config):
    """Join the run's other processes, if the flags name any. Nothing of JAX may have run before."""
    global _group
    if config.execution.coordinator is None:
        return
    import jax
    from jax._src import distributed
    from jax._src.lib import _jax

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)  # SIGTERM is ours: it ends a dispatch, not the process
    explicit = config.execution.coordinator != "auto"
    where = (
        {"coordinator_address": config.execution.coordinator, "cluster_detection_method": "deactivate"}
        if explicit
        else {}
    )
    bound = int(watch.patience(config.execution.stall_timeout))
    real, real_service = _jax.get_distributed_runtime_client, _jax.get_distributed_runtime_service
    _jax.get_distributed_runtime_service = functools.partial(_at_its_address, real_service, distributed.global_state)
    # Without it JAX prints a C++ stack before it aborts; no Python can take what it would be called with, and so it aborts too.
    _jax.get_distributed_runtime_client = functools.partial(real, missed_heartbeat_callback=lambda _: None)
    try:
        jax.distributed.initialize(
            num_processes=config.execution.processes,
            process_id=config.execution.process,
            initialization_timeout=max(1, int(config.execution.stall_timeout)),
            heartbeat_timeout_seconds=4 * bound,  # ours comes first, with a better sentence
            shutdown_timeout_seconds=bound,
            **where,
        )
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        print(
            f"error: process {config.execution.process} could not join the others by coordinator={config.execution.coordinator} within "
            f"{config.execution.stall_timeout:g} s: start all {config.execution.processes or ''} processes, and let them reach process 0 at that "
            f"address: it listens there alone, or where JAX_COORDINATOR_BIND_ADDRESS says ({reason}).",
            file=sys.stderr,
        )
        watch.leave_at_once(LOST)
    finally:
        _jax.get_distributed_runtime_client, _jax.get_distributed_runtime_service = real, real_service
    state = distributed.global_state
    _group = watch.Group(
        state.client, state.process_id, state.num_processes, config.execution.stall_timeout, state.coordinator_address
    )
    watch.start(_group)
    signal.signal(signal.SIGTERM, _stop)  # before the others can be past the first meeting
    flags = {name: repr(value) for name, value in to_flat(config).items() if name not in OWN}
    told = gather({"host": socket.gethostname(), "flags": flags})
    _group.hosts = [f"process {index} ({one['host']})" for index, one in enumerate(told)]
    differ = sorted({f"--{n}" for one in told for n in flags if one["flags"].get(n) != told[0]["flags"].get(n)})
    if differ:
        raise InputError(
            f"the processes were started with different {', '.join(differ)}: start all with the same flags."
        )


def _at_its_address(service, state, _, *args, **options):
    """JAX's coordination `service`, listening where the others are told to find it alone: left to itself it listens to every
    network, and it asks nobody who he is."""
    address = os.environ.get("JAX_COORDINATOR_BIND_ADDRESS", state.coordinator_address)
    return service(address, *args, **options)


def _stop(*_):
    named = _group.hosts[_group.number]
    watch.end(_group, watch.STOPPED, f"{named} was stopped by SIGTERM before a round began: start all processes again.")


def gather(value):
    """Every process's `value` (JSON), in order; returns when all have come here."""
    group = _group
    if group is None:
        return [json.loads(to_json(value))]
    group.turn += 1
    folder = f"{ROOM}/turn/{group.turn}"
    group.client.key_value_set(f"{folder}/{group.number}", to_json(value))
    # The watch ends a wait that is too long, and with a better sentence than the barrier's own.
    group.client.wait_at_barrier(f"{ROOM}-{group.turn}", int(1000 * (2 * group.stall + 100)))
    told = {key.rsplit("/", 1)[1]: text for key, text in group.client.key_value_dir_get(folder)}
    if group.turn > 1:  # all have read the turn before, or they would not be here
        group.client.key_value_delete(f"{ROOM}/turn/{group.turn - 1}/{group.number}")
    return [json.loads(told[str(index)]) for index in range(group.count)]


def agree(make):
    """What `make()` (JSON) is at process 0, for all; the others do not call it."""
    return gather(make() if primary() else None)[0]


def once(paid):
    """Raise where this process was told before to draw from the ledger entry `paid` (its hash): whoever speaks for process 0
    might have two transcripts made under one set of keys, whose difference has no noise."""
    if _group is None:  # what decides is this process itself
        return
    if paid in _group.paid:
        raise InputError(
            "process 0 names a ledger entry for a second dispatch, which would draw the same keys again: trust neither its host "
            "nor the network to it."
        )
    _group.paid.add(paid)


def meet():
    """Return when all processes have come here."""
    gather(None)


def any_of(flag):
    """Whether any process has `flag` set."""
    return any(gather(bool(flag)))


def at(place):
    """Tell the others where this process is: from here on they wait for it `stall_timeout` seconds at most."""
    if _group:
        _group.steps, _group.place = _group.steps + 1, place


def leave(code):
    """Part from the others in order before exiting with `code`; not being able to is no fault any more."""
    if _group is None:
        return
    import jax

    at("the end")
    meet()
    _group.code = code
    _group.leaving.set()
    try:
        jax.distributed.shutdown()
    except Exception as error:  # one of them died after the work was done
        print(f"warning: the processes did not part in order ({type(error).__name__}).", file=sys.stderr)
    sys.stdout.flush()


def fail(error):
    """End the run for all because of an exception here: what a user can mend, a lost process (LOST), or a fault (1)."""
    group = _group
    if isinstance(error, InputError):
        who = (
            "" if isinstance(error, Refused) else f"{group.hosts[group.number]}: "
        )  # whose clients it is of is not for all
        watch.end(group, error.code, f"{who}{error}")
    lost = watch.silent(group)
    if lost:
        watch.end(group, LOST, watch.gone(group, lost, watch.SILENT))
    guard.show(error)
    watch.end(group, 1, f"{group.hosts[group.number]} failed with {type(error).__name__}: see what it printed.")
