"""What travels between coordinator and sites: two messages of fixed sizes, signed by Ed25519 (RFC 8032).

Down goes a `Request`: the plan's digest, round and attempt, who is asked, an adapter, and every site's signature on the adapter
of the round before. Up goes a `Reply`: a fixed code, and an upload where the code is OK. There is no free text, no loss and no
count in either. A message whose size or first bytes are others is refused before anything of it is looked at.

Letters: K sites, D numbers of the adapter.
"""

import enum
import hashlib
import struct
from typing import NamedTuple

import numpy as np
from cryptography.exceptions import InvalidSignature

MAGIC = b"DPLORA1\0"
MOST_SITES = 256
DIGEST, EPOCH, SIGNATURE = 32, 16, 64  # bytes
HEAD = struct.Struct("<8sB32sII32s32sI32s")
ANSWER = struct.Struct("<8sB32s32sHII16s64s")
NOBODY = frozenset()


class Kind(enum.IntEnum):
    """What a request asks for."""

    HELLO = 0  # an answer, and nothing else
    ROUND = 1  # an upload
    END = 2  # to end the part: the adapter is the released one


class Code(enum.IntEnum):
    """What a reply says."""

    OK = 0
    MALFORMED = 1  # no request of this plan's size, or numbers that are not finite
    FORGED = 2  # not signed by the plan's coordinator
    FOREIGN = 3  # of another plan
    STALE = 4  # a round or an attempt that is past, or a round that is not the next
    SPLIT = 5  # other sites signed another adapter of the round before, or did not sign
    PEERS = 6  # too few sites are asked, or this one is not
    SPENT = 7  # this site's budget is at its end
    LOST = 8  # nothing was kept of this attempt: a new one is needed
    ENDED = 9  # this site has ended its part
    FAILED = 10  # a fault at the site


class MessageError(ValueError):
    """Bytes that are no message of this plan."""


class Request(NamedTuple):
    """What the coordinator asks. `peers` are the sites that are asked, `before` those whose uploads the round before came to, and
    `statement` is what each of them signed in `witnesses` [K] (`statement`); `epochs` [K] say which start of each site's
    process is meant. `adapter` is float32 [D]."""

    kind: Kind
    plan: bytes
    round: int
    attempt: int
    peers: frozenset
    before: frozenset
    before_round: int
    statement: bytes
    epochs: tuple
    witnesses: tuple
    adapter: np.ndarray


class Reply(NamedTuple):
    """What a site answers to the request of `digest`. `round` and `attempt` are the last that it ran, `epoch` names this start of
    its process, `witness` is its signature on the adapter that it was sent, and `payload` the upload's bytes, or none."""

    code: Code
    plan: bytes
    digest: bytes
    site: int
    round: int
    attempt: int
    epoch: bytes
    witness: bytes
    payload: bytes = b""


def request_size(sites, numbers):
    """The bytes of a request in a federation of so many sites, with so many numbers in its adapter."""
    return HEAD.size + sites * (EPOCH + SIGNATURE) + 4 * numbers + SIGNATURE


def reply_sizes(numbers):
    """The bytes of a reply without and with an upload."""
    return ANSWER.size + SIGNATURE, ANSWER.size + 4 * numbers + SIGNATURE


def pack_request(request, key):
    """The bytes of `request`, signed by the coordinator's `key`."""
    head = HEAD.pack(
        MAGIC, request.kind, request.plan, request.round, request.attempt, _bits(request.peers), _bits(request.before),
        request.before_round, request.statement,
    )  # fmt: skip
    body = b"".join((head, *request.epochs, *request.witnesses, request.adapter.astype("<f4").tobytes()))
    return body + key.sign(body)


def unpack_request(data, sites, numbers):
    """The Request in `data`; MessageError where it is none of so many sites and numbers. The signature is not looked at."""
    if len(data) != request_size(sites, numbers) or not data.startswith(MAGIC):
        raise MessageError("no request of this plan")
    _, kind, plan, number, attempt, peers, before, before_round, statement = HEAD.unpack_from(data)
    epochs, place = _parts(data, HEAD.size, sites, EPOCH)
    witnesses, place = _parts(data, place, sites, SIGNATURE)
    adapter = np.frombuffer(data, "<f4", numbers, place).astype(np.float32)
    try:
        kind = Kind(kind)
        asked, had = _members(peers, sites), _members(before, sites)
    except ValueError:
        raise MessageError("no request of this plan") from None
    return Request(kind, plan, number, attempt, asked, had, before_round, statement, epochs, witnesses, adapter)


def pack_reply(reply, key):
    """The bytes of `reply`, signed by the site's `key`."""
    head = ANSWER.pack(
        MAGIC, reply.code, reply.plan, reply.digest, reply.site, reply.round, reply.attempt, reply.epoch, reply.witness
    )
    body = head + reply.payload
    return body + key.sign(body)


def unpack_reply(data, numbers):
    """The Reply in `data`; MessageError where it is none with so many numbers. The signature is not looked at."""
    if len(data) not in reply_sizes(numbers) or not data.startswith(MAGIC):
        raise MessageError("no reply of this plan")
    _, code, *rest = ANSWER.unpack_from(data)
    payload = data[ANSWER.size : -SIGNATURE]
    try:
        code = Code(code)
    except ValueError:
        raise MessageError("no reply of this plan") from None
    if payload and code is not Code.OK:
        raise MessageError("no reply of this plan")
    return Reply(code, *rest, payload)


def signed(data, key):
    """Whether a message's bytes end with the signature by `key` (an Ed25519PublicKey) of all before it."""
    return verified(key, data[-SIGNATURE:], data[:-SIGNATURE])


def verified(key, signature, data):
    """Whether `signature` is that of `data` by `key`."""
    try:
        key.verify(signature, data)
    except InvalidSignature:
        return False
    return True


def digest(data):
    """What names a request: SHA-256 of all its bytes but the signature, of which one message may have several."""
    return hashlib.sha256(data[:-SIGNATURE]).digest()


def answered(data):
    """The digest of the request that the bytes of a reply are about, by its place alone; b"" where they are too short."""
    return data[41 : 41 + DIGEST] if len(data) >= ANSWER.size else b""


def statement(plan, number, adapter, before):
    """What a site signs of round `number`: that it was sent this adapter, float32 [D], behind the statement `before` of the round
    before. Sites that were shown different adapters in any round sign different statements from then on."""
    parts = (
        b"dplora_jax adapter",
        plan,
        struct.pack("<I", number),
        before,
        hashlib.sha256(adapter.astype("<f4")).digest(),
    )
    return hashlib.sha256(b"".join(parts)).digest()


def _bits(members):
    return sum(1 << member for member in members).to_bytes(MOST_SITES // 8, "little")


def _members(bits, sites):
    number = int.from_bytes(bits, "little")
    if number >> sites:
        raise ValueError("a site that is not in the plan")
    return frozenset(site for site in range(sites) if number >> site & 1)


def _parts(data, place, count, size):
    """`count` strings of `size` bytes from `place` on, and the place behind them."""
    end = place + count * size
    return tuple(data[start : start + size] for start in range(place, end, size)), end
