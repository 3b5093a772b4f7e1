"""What the mailbox adds to a round between parties that share no machine, by the number of sites.

    python -m experiments.benchmark --measure=mailbox

Sites answer at once with an upload of NUMBERS numbers, signed, through a Unix socket, a relay and TLS, all on this machine and in
one process; beside that the same round by function calls. The rounds of both are interleaved.
"""

import contextlib
import pathlib
import tempfile
import threading
import time

import numpy as np

from dplora_jax.silos import frames, keys, mailbox, messages
from dplora_jax.silos.messages import Code, Kind, Reply, Request
from dplora_jax.silos.office import Office
from experiments.text import formats
from experiments.text.tables import Table

SITES, NUMBERS = (3, 5, 10), 10_371  # as many numbers as the main job's adapter has
PLAN, NOTHING = bytes(messages.DIGEST), bytes(messages.SIGNATURE)


def table(sites, repeats):
    """Lines of the table: medians and quartiles of `repeats` rounds for each number of `sites`."""
    body = []
    for count in sites:
        with tempfile.TemporaryDirectory(prefix="dplora_jax_") as folder:
            called, sent, size = _measured(count, pathlib.Path(folder), repeats)
        added = np.quantile(sent - called, [0.25, 0.5, 0.75])
        body.append(
            [
                str(count),
                f"{np.median(called):.4f}",
                f"{np.median(sent):.4f}",
                f"{added[1]:.4f} ({added[0]:.4f} to {added[2]:.4f})",
                *map(formats.size, size),
            ]
        )
    head = [
        "sites",
        "by calls, s",
        "by the mailbox, s",
        "added, s (quartiles)",
        "bytes down, a site",
        "bytes up, a site",
    ]
    yield Table(head, body).text()


def _measured(count, folder, repeats):
    """(seconds of rounds by calls, seconds by the mailbox, bytes of a request and of a reply)."""
    names = [f"site{number}" for number in range(count)]
    cards = [keys.create(folder / name, name, 1) for name in names]
    own = keys.create(folder / "coordinator", "coordinator", 0)
    key, stop = keys.load(folder / "coordinator").sign, threading.Event()
    answers = [_site(keys.load(folder / name).sign, keys.verifier(own["ed25519"]), k) for k, name in enumerate(names)]
    sizes = messages.request_size(count, NUMBERS), messages.reply_sizes(NUMBERS)[1]
    by_calls, by_mailbox = Office(count), Office(count)
    certificates = [card["certificate"] for card in cards]
    relays = [threading.Thread(target=_call, args=(by_calls, k, answers[k], stop), daemon=True) for k in range(count)]
    with contextlib.ExitStack() as stack:
        files = folder / "coordinator" / "relay"
        port = stack.enter_context(
            mailbox.serving(
                by_mailbox, ("127.0.0.1", 0), files / keys.TLS_KEY, files / keys.CERTIFICATE, certificates, sizes[1]
            )
        )
        for k, name in enumerate(names):
            path = folder / f"{k}.sock"
            stack.enter_context(frames.listening(path, answers[k], sizes[0]))
            own_files = folder / name / "relay"
            arguments = (
                ("127.0.0.1", port), own_files / keys.TLS_KEY, own_files / keys.CERTIFICATE, own["certificate"],
                lambda request, path=path: frames.ask(path, request, sizes[1]), sizes[0], stop.is_set,
            )  # fmt: skip
            relays.append(threading.Thread(target=mailbox.relay, args=arguments, daemon=True))
        for relay in relays:
            relay.start()
        seconds = [
            [_round(office, key, count, number) for office in (by_calls, by_mailbox)] for number in range(repeats + 1)
        ]
        stop.set()
    called, sent = np.array(seconds[1:]).T  # the first connects
    return called, sent, sizes


def _site(key, coordinator, number):
    """What answers at once."""
    payload = np.arange(NUMBERS, dtype="<f4").tobytes()

    def answer(data):
        if not messages.signed(data, coordinator):
            raise ValueError("no request of the coordinator's")
        reply = Reply(
            Code.OK, PLAN, messages.digest(data), number, 1, 0, bytes(messages.EPOCH), key.sign(PLAN), payload
        )
        return messages.pack_reply(reply, key)

    return answer


def _call(office, number, answer, stop):
    reply = b""
    while not stop.is_set():
        request = office.exchange(number, reply, 0.1)
        reply = answer(request) if request else b""


def _round(office, key, count, number):
    """Seconds from a request's numbers to all replies."""
    begun, everyone = time.perf_counter(), frozenset(range(count))
    request = Request(
        Kind.ROUND, PLAN, number, 0, everyone, everyone, 0, PLAN, (bytes(messages.EPOCH),) * count, (NOTHING,) * count,
        np.zeros(NUMBERS, np.float32),
    )  # fmt: skip
    data, missing = messages.pack_request(request, key), set(everyone)
    for site in everyone:
        office.post(site, data)
    while missing:
        came = office.receive(60)
        if came is None:
            raise TimeoutError("a site did not answer")
        messages.unpack_reply(came[1], NUMBERS)
        missing.discard(came[0])
    return time.perf_counter() - begun
