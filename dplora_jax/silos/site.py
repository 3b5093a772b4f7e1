"""A site: what answers the coordinator's requests with this party's uploads, and with nothing else.

The order for a request is: its size, its signature, this plan, who is asked, this start of the process, the next round alone, the
other sites' signatures; then the budget, a durable begin entry, keys from its hash, the local steps, the upload kept, the commit,
and only then the answer. A request that was answered is answered again with the same bytes, and charged once.
"""

import hashlib
import os
import pathlib
import threading

import numpy as np

from dplora_jax.errors import InputError
from dplora_jax.federation.silo import Spent
from dplora_jax.privacy.chain import replace_durably
from dplora_jax.silos import keys as party_keys
from dplora_jax.silos import masks, messages, vectors
from dplora_jax.silos.messages import Code, Kind, Reply

SENT = "sent.bin"  # in private/: the newest upload, behind the digest of the request that it answers


class Site:
    """Site `number` of `plan`, with its `keys` and its `silo` (`federation.silo.Silo`), which keeps its own ledger. What
    was sent is kept in `folder`/private. `finish(adapter)` is called with the released adapter, float32 [D], at the end;
    `report(error)` with a fault of this program, which the coordinator is told nothing of but that there was one. `views`
    has (round, who was asked, what was signed of the adapter) of each upload, for its owner to see and compare."""

    def __init__(self, plan, number, keys, silo, folder, finish=None, report=None):
        self.plan, self.number, self.keys, self.silo = plan, number, keys, silo
        self.epoch, self.ended = os.urandom(messages.EPOCH), threading.Event()
        self._finish, self._report, self.views = finish, report, []
        self._path, self._lock = pathlib.Path(folder) / "private" / SENT, threading.Lock()
        self._last = (silo.done, 0)  # round and attempt that were run last
        self._signed = {}  # what was signed of each round
        self._kept_for, self._kept = self._read()
        silo.settle(self._kept_for.hex())

    def handle(self, data):
        """The reply to the request in `data`, as bytes. Whatever comes, it ends in one of the fixed codes, and charges
        nothing but for this plan's next round."""
        with self._lock:
            try:
                return self._answer(data)
            except Spent:
                return self._reply(Code.SPENT, data)
            except Exception as error:  # a fault must not travel: its text may quote a record
                if self._report:
                    self._report(error)
                return self._reply(Code.FAILED, data)

    def _answer(self, data):
        try:
            request = messages.unpack_request(data, len(self.plan.sites), self.plan.numbers)
        except messages.MessageError:
            return self._reply(Code.MALFORMED, data)
        if not messages.signed(data, self.plan.coordinator_key):
            return self._reply(Code.FORGED, data)
        if request.plan != self.plan.digest:
            return self._reply(Code.FOREIGN, data)
        if request.kind is Kind.HELLO:
            return self._reply(Code.OK, data)
        if messages.digest(data) == self._kept_for:
            return self._kept
        statement = messages.statement(self.plan.digest, request.round, request.adapter, request.statement)
        code = self._refusal(request, statement)
        if code is not Code.OK:
            return self._reply(code, data)
        witness = self.keys.sign.sign(statement)
        if request.kind is Kind.END:
            return self._end(request, data, witness)
        return self._train(request, data, statement, witness)

    def _refusal(self, request, statement):
        """OK, or why `request` is refused; nothing is charged yet."""
        if self.ended.is_set():
            return Code.ENDED
        if not np.isfinite(request.adapter).all():
            return Code.MALFORMED
        if self.number not in request.peers or (self.plan.mode.masked and len(request.peers) < self.plan.least):
            return Code.PEERS
        if request.epochs[self.number] != self.epoch:
            return Code.LOST
        used = request.kind is Kind.ROUND and (request.round, request.attempt) <= self._last
        if used or not self._follows(request):
            return Code.STALE
        another = request.kind is Kind.ROUND and self._signed.get(request.round, statement) != statement
        return Code.SPLIT if another or not self._witnessed(request) else Code.OK

    def _follows(self, request):
        """Whether this is the round that comes next here: the one after the last that this site ran, that one again, or a
        later one where the others went on without this site, as they sign."""
        number = request.round
        most = self.plan.config.schedule.rounds + (request.kind is Kind.END)
        if not 1 <= number <= most or (number > 1 and request.before_round != number - 1):
            return False
        return number in (self.silo.done, self.silo.done + 1) or (
            number > self.silo.done + 1 and self.number not in request.before
        )

    def _witnessed(self, request):
        """Whether those whose uploads the round before came to all signed one statement on it, this site its own."""
        if request.round == 1:
            blank = not request.before and request.statement == self.plan.digest
            return blank and hashlib.sha256(request.adapter.astype("<f4")).hexdigest() == self.plan.start
        own = self._signed.get(request.before_round)
        if own is not None and own != request.statement:
            return False
        return len(request.before) >= self.plan.least and all(
            messages.verified(self.plan.site_keys[site], request.witnesses[site], request.statement)
            for site in request.before
        )

    def _train(self, request, data, statement, witness):
        """The upload of a round: charged, computed, kept, committed."""
        digest = messages.digest(data)
        adapter = vectors.tree(request.adapter, self.silo.template)
        self._last = request.round, request.attempt

        def keep(upload):
            payload = self._payload(upload, request, digest)
            reply = self._reply(Code.OK, data, witness, payload)
            replace_durably(self._path, digest + statement + reply, 0o600)
            self._kept_for, self._kept = digest, reply
            self._signed = {number: held for number, held in self._signed.items() if number == request.before_round}
            self._signed[request.round] = statement

        if request.round > self.silo.done + 1:
            self.silo.missed(request.round - 1)
        self.silo.fit(adapter, request.round, request=digest.hex(), send=keep)
        self.views.append((request.round, sorted(request.peers), statement.hex()))
        return self._kept

    def _payload(self, upload, request, digest):
        """The bytes of an upload; where uploads are masked, under this request's masks."""
        numbers = vectors.flat(upload)
        if not self.plan.mode.masked:
            return numbers.astype("<f4").tobytes()
        others = {site: party_keys.agreement(self.plan.sites[site]["x25519"]) for site in request.peers - {self.number}}
        words = masks.mask(self.keys.agree, self.number, others, self.plan.digest, digest, len(numbers))
        return masks.hide(numbers, words).astype("<u4").tobytes()

    def _end(self, request, data, witness):
        """The released adapter is kept, and this party's part ends: its secret is destroyed."""
        if self._finish:
            self._finish(request.adapter)
        reply = self._reply(Code.OK, data, witness)
        self.silo.finish()
        forget(self._path.parent)
        self._kept_for, self._kept = messages.digest(data), reply
        self.ended.set()
        return reply

    def close(self):
        """Wait for the answer under way, and answer nothing more: what is charged is kept."""
        self._lock.acquire()

    def _reply(self, code, data, witness=bytes(messages.SIGNATURE), payload=b""):
        return messages.pack_reply(
            Reply(
                code, self.plan.digest, messages.digest(data), self.number, *self._last, self.epoch, witness, payload
            ),
            self.keys.sign,
        )

    def _read(self):
        """(the digest of the request that was answered last, the answer), as an earlier start kept them."""
        size = messages.DIGEST
        try:
            data = self._path.read_bytes()
        except FileNotFoundError:
            return b"", b""
        try:
            reply = messages.unpack_reply(data[2 * size :], self.plan.numbers)
        except messages.MessageError:
            reply = None
        whole = reply and messages.signed(data[2 * size :], self.keys.sign.public_key())
        if not whole or reply.plan != self.plan.digest or reply.digest != data[:size]:
            raise InputError(f"{self._path} is damaged, or of another plan: restore it.")
        self._last, self._signed = (reply.round, reply.attempt), {reply.round: data[size : 2 * size]}
        return data[:size], data[2 * size :]


def forget(private):
    """Destroy what a part that has ended leaves in the folder `private`: the upload that was sent last and the party's keys, with
    which masks could be made again."""
    for name in (SENT, party_keys.FILE):
        path = pathlib.Path(private) / name
        if path.exists():
            path.write_bytes(bytes(path.stat().st_size))
            path.unlink()
