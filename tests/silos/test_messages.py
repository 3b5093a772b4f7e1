"""Messages have one size, one form and a signature; whatever else comes is refused before it is looked at."""

import contextlib

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from dplora_jax.silos import messages
from dplora_jax.silos.messages import Code, Kind, MessageError, Reply, Request

KEY = Ed25519PrivateKey.from_private_bytes(b"k" * 32)
SITES, NUMBERS = 3, 5
ADAPTER = np.array([0.5, -1, 2, np.inf, 1e-30], np.float32)
REQUEST = Request(
    Kind.ROUND, b"p" * 32, 7, 2, frozenset({0, 2}), frozenset({1}), 6, b"s" * 32, (b"e" * 16,) * SITES, (b"w" * 64,) * SITES,
    ADAPTER,
)  # fmt: skip
REPLY = Reply(Code.OK, b"p" * 32, b"d" * 32, 2, 7, 2, b"e" * 16, b"w" * 64, b"1234" * NUMBERS)


def test_a_request_comes_back_as_it_was():
    data = messages.pack_request(REQUEST, KEY)
    assert len(data) == messages.request_size(SITES, NUMBERS)
    back = messages.unpack_request(data, SITES, NUMBERS)
    assert back._replace(adapter=None) == REQUEST._replace(adapter=None)
    np.testing.assert_array_equal(back.adapter, ADAPTER)
    assert messages.signed(data, KEY.public_key())


@pytest.mark.parametrize("reply", [REPLY, REPLY._replace(code=Code.LOST, payload=b"")])
def test_a_reply_comes_back_as_it_was(reply):
    data = messages.pack_reply(reply, KEY)
    assert len(data) in messages.reply_sizes(NUMBERS)
    assert messages.unpack_reply(data, NUMBERS) == reply
    assert messages.answered(data) == reply.digest
    assert messages.signed(data, KEY.public_key())


@pytest.mark.parametrize("place", [0, 9, 50, 300, -70, -1])
def test_any_changed_byte_breaks_the_signature(place):
    for data in (messages.pack_request(REQUEST, KEY), messages.pack_reply(REPLY, KEY)):
        changed = bytearray(data)
        changed[place if abs(place) < len(data) else 0] ^= 1
        assert not messages.signed(bytes(changed), KEY.public_key())


def test_a_refusal_carries_no_numbers():
    """Not even zeros: a code other than OK has no upload behind it."""
    with pytest.raises(MessageError):
        messages.unpack_reply(messages.pack_reply(REPLY._replace(code=Code.SPENT), KEY), NUMBERS)


def test_a_site_that_the_plan_does_not_have_is_no_request():
    with pytest.raises(MessageError):
        messages.unpack_request(messages.pack_request(REQUEST._replace(peers=frozenset({3})), KEY), SITES, NUMBERS)


@pytest.mark.parametrize(
    "unpack",
    [lambda data: messages.unpack_request(data, SITES, NUMBERS), lambda data: messages.unpack_reply(data, NUMBERS)],
)
@given(st.binary(max_size=600), st.integers(0, 600), st.binary(max_size=40))
@settings(max_examples=150, deadline=None)
def test_whatever_comes_is_a_message_or_a_message_error(unpack, noise, cut, splice):
    """Random bytes; and whole messages that were cut, or into which bytes were spliced."""
    for good in (messages.pack_request(REQUEST, KEY), messages.pack_reply(REPLY, KEY)):
        for data in (noise, good[:cut], good[:cut] + splice + good[cut + len(splice) :], good + splice):
            with contextlib.suppress(MessageError):
                unpack(data)


def test_a_requests_digest_is_another_whatever_field_is():
    """What is kept of a request, and what its masks are made of, go by the digest: two requests with one would share masks."""
    other = {
        "kind": Kind.END, "plan": b"q" * 32, "round": 8, "attempt": 3, "peers": frozenset({0, 1, 2}), "before": frozenset({2}),
        "before_round": 5, "statement": b"t" * 32, "epochs": (b"e" * 16, b"e" * 16, b"f" * 16),
        "witnesses": (b"w" * 64, b"w" * 64, b"v" * 64), "adapter": ADAPTER * np.array([1, 1, 1, 1, 2], np.float32),
    }  # fmt: skip
    assert set(other) == set(Request._fields)
    requests = [REQUEST, *(REQUEST._replace(**{name: value}) for name, value in other.items())]
    digests = {messages.digest(messages.pack_request(request, KEY)) for request in requests}
    assert len(digests) == 1 + len(other)


def test_a_statement_is_bound_to_plan_round_adapter_and_the_one_before():
    made = lambda plan=b"p", number=1, adapter=ADAPTER, before=b"b": messages.statement(plan, number, adapter, before)  # noqa: E731
    others = [made(plan=b"q"), made(number=2), made(adapter=-ADAPTER), made(before=b"c")]
    assert len({made(), *others}) == 5
