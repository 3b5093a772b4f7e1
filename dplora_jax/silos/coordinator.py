"""The coordinator: it sends each round's adapter, sums what comes back, and steps. It holds no text and no secret but its keys.

Its state is durable before anything of it is sent, so that a coordinator that was killed asks again for the very same; a site
answers that with the same bytes. An attempt that did not come to its end is followed by another with another number.
"""

import hashlib
import io
import os
import pathlib
import time
import zipfile
from typing import NamedTuple

import numpy as np

from dplora_jax import json_files
from dplora_jax.errors import InputError
from dplora_jax.files import to_json
from dplora_jax.privacy.chain import replace_durably
from dplora_jax.silos import messages
from dplora_jax.silos.gathering import Alone, Stopped, Together
from dplora_jax.silos.messages import Code, Kind, Request
from dplora_jax.silos.server import State

STATE, REQUESTS, ASKED = "state.npz", "requests.bin", "asked.json"
CHECK_SECONDS = 0.5  # between looks at who is missing
TELL_SECONDS = 30.0  # of waiting until it is said, and said again
END_SECONDS = 60.0  # that sites have to confirm the end
WELCOME_SECONDS = 1.0  # that a site which was absent has to say that it is back, before each round
MOST_ATTEMPTS = 7  # more of a round, by one start
FATAL = {
    Code.MALFORMED: "cannot read what it was sent",
    Code.FORGED: "says that the request is not signed by the plan's coordinator",
    Code.FOREIGN: "takes part in another plan",
    Code.STALE: "is in another round: its folder or this one was put back to an earlier state",
    Code.SPLIT: "says that sites were shown different adapters in the round before, or that signatures are missing",
    Code.PEERS: "refuses to take part with so few others",
    Code.ENDED: "has ended its part",
    Code.FAILED: "had a fault, which its own output tells of",
}


class Past(NamedTuple):
    """What the last finished round left for the next: its number, what all signed of it, who took part, and their signatures."""

    round: int
    statement: bytes
    members: frozenset
    witnesses: tuple


class Coordinator:
    """The coordinator of `plan`, with the Ed25519 `key` that the plan names. Engines meet it at `office`; its state is in
    `folder`, and `start` is the adapter before round 1, float32 [D]. `show(round, State, seconds)` is called after each
    round and before the next is sent, with round 0 first; `say` with a line on who is waited for."""

    def __init__(self, plan, key, office, folder, start, show=lambda *_: None, say=print):
        self.plan, self.office, self.server = plan, office, plan.server()
        self._key, self._folder, self._show, self._say = key, pathlib.Path(folder), show, say
        self._everyone = frozenset(range(len(plan.sites)))
        self._epochs = [bytes(messages.EPOCH)] * len(plan.sites)
        if hashlib.sha256(start.astype("<f4")).hexdigest() != plan.start:
            raise InputError("the start adapter is not the plan's: restore the file that was written with the plan.")
        nothing = (bytes(messages.SIGNATURE),) * len(plan.sites)
        self.state, self.past = self.server.init(start), Past(0, plan.digest, frozenset(), nothing)
        # How many attempts each site was sent: the most that it can have been charged for.
        self.asked, self._absent = [0] * len(plan.sites), frozenset()
        self.early = None  # why the run ended before its last planned round, in words
        self._restore()

    def run(self, patience=None, without=None):
        """Run all rounds that are left, and end -> how many there are now. `patience` is how many seconds an attempt may take
        before the run stops with what is saved; after `without` seconds it goes on without the sites that are missing.
        Raises Stopped."""
        if self.past.round < self.plan.config.schedule.rounds:
            self._greet(self._everyone, patience, without)
        self._show(self.past.round, self.state, 0.0)  # a start before may have died on the way to it
        while self.past.round < self.plan.config.schedule.rounds and self.early is None:
            begun = time.monotonic()
            answers = self._round(patience, without)
            if answers is not None:
                self._step(*answers)
                self._show(self.past.round, self.state, time.monotonic() - begun)
        self._end()
        return self.past.round

    def _greet(self, sites, patience, without):
        """Wait for `sites` before anyone is charged, and learn which start of their processes is meant; those that do not answer
        are absent, and not asked for uploads until they do."""
        fresh = int.from_bytes(os.urandom(4))  # so that an answer is of now
        replies = self._ask(self._request(Kind.HELLO, 0, fresh, sites), sites, frozenset(), patience, without)
        self._absent = (self._absent | sites) - set(replies)

    def _round(self, patience, without):
        """(the round's statement, {site: upload}, {site: signature}) of the next round; None where the budget is at its end."""
        number = self.past.round + 1
        gathered = (Together if self.plan.mode.masked else Alone)(self.plan.least)
        if self._absent:
            self._greet(self._absent, None, WELCOME_SECONDS)
        attempts = self._kept_attempts() or [self._attempt(number, 0, self._everyone - self._absent, [])]
        todo, begun = gathered.todo(attempts), len(attempts)
        while todo:
            data, peers = todo.pop(0)
            replies = self._ask(data, peers, gathered.needed(peers), patience, without)
            if spent := [site for site, reply in replies.items() if reply.code is Code.SPENT]:
                self.early = f"the budget of {self._names(spent)} ended after round {number - 1}"
                return None
            again = {site: reply for site, reply in replies.items() if reply.code in (Code.LOST, Code.STALE)}
            fine = {site: reply for site, reply in replies.items() if site not in again}
            missing = frozenset() if again else peers - set(replies)
            self._absent |= missing
            if more := gathered.take(peers, fine, set(again), missing):
                known = [reply.attempt for reply in again.values() if reply.round == number and reply.attempt < 2**31]
                newest = max([self._parsed(attempts[-1][0]).attempt, *known])
                if len(attempts) == begun + MOST_ATTEMPTS:
                    raise Stopped(
                        f"round {number} was tried again {MOST_ATTEMPTS} times: look at {self._names(again or missing)}."
                    )
                if missing:
                    self._say(f"going on without {self._names(missing)}: a new attempt, which the others pay for again")
                attempts = [*attempts, self._attempt(number, 1 + newest, more, attempts)]
                todo.append(attempts[-1])
        if len(gathered.replies) < gathered.least:
            raise Stopped(
                f"round {number} needs {gathered.least} sites or more, and {self._names(self._absent)} did not "
                "answer; start again to go on."
            )
        request = self._parsed(attempts[0][0])
        statement = messages.statement(self.plan.digest, number, request.adapter, request.statement)
        return statement, gathered.uploads(), {site: reply.witness for site, reply in gathered.replies.items()}

    def _parsed(self, data):
        return messages.unpack_request(data, len(self.plan.sites), self.plan.numbers)

    def _attempt(self, number, attempt, peers, before):
        """(the bytes of a new request of round `number` to `peers`, who they are), durable behind the attempts `before`."""
        data = self._request(Kind.ROUND, number, attempt, peers)
        self.asked = [count + (site in peers) for site, count in enumerate(self.asked)]
        replace_durably(self._folder / ASKED, to_json(self.asked) + "\n")
        replace_durably(self._folder / REQUESTS, b"".join([*(old for old, _ in before), data]))
        return data, frozenset(peers)

    def _ask(self, request, asked, needed, patience, without, lenient=False):
        """Post `request` to the sites `asked` -> {site: Reply} of all, or, after `without` seconds, of those that answered.
        Once one of the `needed` cannot answer this attempt, the others are not waited for. What no attempt can mend raises
        Stopped, unless `lenient`."""
        digest, replies, begun, told = messages.digest(request), {}, time.monotonic(), 0.0
        for site in asked:
            self.office.post(site, request)
        try:
            while set(replies) != asked:
                waited = time.monotonic() - begun
                if without is not None and waited > without:
                    break
                missing = self._names(asked - set(replies))
                if patience is not None and waited > patience:
                    raise Stopped(f"{missing} did not answer within {patience:g} s; start again to go on.")
                if waited - told > TELL_SECONDS:
                    told = waited
                    self._say(f"waiting for {missing} ({waited:.0f} s)")
                came = self.office.receive(CHECK_SECONDS)
                reply = came and self._checked(*came, digest)
                if came and reply is None and came[0] in asked - set(replies):
                    self.office.post(came[0], request)  # whatever that was, the question stands
                if reply is None:
                    continue
                if not lenient:
                    self._refuse_fatal(reply, request)
                replies[reply.site], self._epochs[reply.site] = reply, reply.epoch
                if needed and reply.code in (Code.LOST, Code.SPENT, Code.STALE):
                    break
        finally:
            for site in asked:
                self.office.post(site, None)
        return replies

    def _checked(self, site, data, digest):
        """The Reply in `data`, if `site` signed it about the request of `digest`; else None."""
        try:
            reply = messages.unpack_reply(data, self.plan.numbers)
        except messages.MessageError:
            return None
        if reply.site != site or reply.digest != digest or reply.plan != self.plan.digest:
            return None
        return reply if messages.signed(data, self.plan.site_keys[site]) else None

    def _refuse_fatal(self, reply, request):
        """Stopped where no other attempt can mend what a site answered."""
        again = reply.code is Code.STALE and reply.round == self.past.round + 1
        if reply.code in FATAL and not again:
            raise Stopped(f"site {self.plan.names[reply.site]} {FATAL[reply.code]}.")
        if reply.code is Code.OK and bool(reply.payload) != (self._parsed(request).kind is Kind.ROUND):
            raise Stopped(
                f"site {self.plan.names[reply.site]} answered without an upload, or with one that nobody asked for."
            )

    def _request(self, kind, number, attempt, peers, adapter=None):
        past = self.past
        return messages.pack_request(
            Request(
                kind, self.plan.digest, number, attempt, frozenset(peers), past.members, past.round, past.statement,
                tuple(self._epochs), past.witnesses, self.state.adapter if adapter is None else adapter,
            ),
            self._key,
        )  # fmt: skip

    def _step(self, statement, uploads, witnesses):
        """The new state, durable before it is sent."""
        nothing = bytes(messages.SIGNATURE)
        signed = [
            site for site in witnesses if messages.verified(self.plan.site_keys[site], witnesses[site], statement)
        ]
        if set(signed) != set(witnesses):
            names = self._names(set(witnesses) - set(signed))
            raise Stopped(f"{names} signed another adapter than the one that was sent.")
        self.state = self.server.step(self.state, uploads)
        every = tuple(witnesses.get(site, nothing) for site in range(len(self.plan.sites)))
        self.past = Past(self.past.round + 1, statement, frozenset(signed), every)
        self._save()

    def _end(self):
        """Send the released adapter, which ends every site's part; who does not confirm it in time is named."""
        missing, released = self._everyone, self.server.released(self.state)
        for attempt in range(2):  # a site that was started again has to be asked by its new start
            request = self._request(Kind.END, self.past.round + 1, attempt, self._everyone, released)
            replies = self._ask(request, missing, frozenset(), None, END_SECONDS, lenient=True)
            missing -= {site for site, reply in replies.items() if reply.code in (Code.OK, Code.ENDED)}
            if not any(reply.code is Code.LOST for reply in replies.values()):
                break
        if missing:
            self._say(f"{self._names(missing)} did not confirm the end: start again to send it again.")

    def _names(self, sites):
        return ", ".join(self.plan.names[site] for site in sorted(sites)) or "nobody"

    def _save(self):
        content, past = io.BytesIO(), self.past
        np.savez(
            content, plan=np.frombuffer(self.plan.digest, np.uint8), **self.state._asdict(), round=past.round,
            statement=np.frombuffer(past.statement, np.uint8), members=np.array(sorted(past.members), np.int64),
            witnesses=np.frombuffer(b"".join(past.witnesses), np.uint8),
        )  # fmt: skip
        replace_durably(self._folder / STATE, content.getvalue())

    def _restore(self):
        path, asked = self._folder / STATE, self._folder / ASKED
        try:
            self.asked = json_files.load(asked, json_files.list_of(json_files.whole(0, 10**9), len(self.plan.sites)))
        except FileNotFoundError:
            pass
        except json_files.Unfit as error:
            raise InputError(f"{asked} is damaged: {error}; restore it.") from None
        if not path.exists():
            return
        try:
            with np.load(path, allow_pickle=False) as held:
                if held["plan"].tobytes() != self.plan.digest:
                    raise InputError(f"{self._folder} is of another plan: give another workdir.")
                fields = {name: held[name] for name in State._fields}
                self.state = State(**fields)._replace(rounds=int(fields["rounds"]))
                size, witnesses = messages.SIGNATURE, held["witnesses"].tobytes()
                every = tuple(witnesses[start : start + size] for start in range(0, len(witnesses), size))
                members = frozenset(held["members"].tolist())
                self.past = Past(int(held["round"]), held["statement"].tobytes(), members, every)
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{path} is damaged ({type(error).__name__}): restore it.") from None

    def _kept_attempts(self):
        """[(request, peers)] of the next round that an earlier start made durable, or may have sent."""
        size, path = self.plan.request_size(), self._folder / REQUESTS
        data = path.read_bytes() if path.exists() else b""
        kept = []
        for start in range(0, len(data), size):
            one = data[start : start + size]
            try:
                request = messages.unpack_request(one, len(self.plan.sites), self.plan.numbers)
            except messages.MessageError:
                raise InputError(f"{path} is damaged: restore it.") from None
            if request.plan == self.plan.digest and request.round == self.past.round + 1:
                kept.append((one, request.peers))
        return kept
