"""A site charges this plan's next round once, and nothing else; what it cannot prove to be that ends in a fixed code."""

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dplora_jax.silos import keys, masks, messages
from dplora_jax.silos.messages import Code, Kind
from tests.silos import small_silos
from tests.silos.asking import Asker, charged

pytestmark = pytest.mark.usefixtures("quick_compile")


def test_a_round_is_charged_once_and_answered_twice_with_the_same_bytes(made):
    with made.site(0) as site:
        asker = Asker(made, site)
        data = asker.request()
        first = asker.reply(data)
        assert first.code is Code.OK
        assert len(first.payload) == 4 * made.plan.numbers
        assert site.handle(data) == site.handle(data) == site._kept
        assert charged(made) == 1


WRONG = {
    "another key": (lambda a: a.request(key=Ed25519PrivateKey.generate()), Code.FORGED),
    "another plan": (lambda a: a.request(plan=b"x" * 32), Code.FOREIGN),
    "a skipped round": (lambda a: a.request(3), Code.STALE),
    "round 0": (lambda a: a.request(0, 1), Code.STALE),
    "another start of the process": (lambda a: a.request(epochs=(b"z" * 16,) * 3), Code.LOST),
    "not asked": (lambda a: a.request(peers=frozenset({1, 2})), Code.PEERS),
    "another first adapter": (lambda a: a.request(adapter=a.made.start + 1), Code.SPLIT),
    "no number": (lambda a: a.request(adapter=a.made.start * np.nan), Code.MALFORMED),
    "cut off": (lambda a: a.request()[:-1], Code.MALFORMED),
    "nothing": (lambda a: b"", Code.MALFORMED),
    "a changed byte": (lambda a: a.request()[:200] + b"\1" + a.request()[201:], Code.FORGED),
    "unsigned round before": (lambda a: a.request(2, statement=b"s" * 32), Code.STALE),
}


def test_whatever_is_not_this_plans_next_round_charges_nothing(made):
    with made.site(0) as site:
        asker = Asker(made, site)
        for what, (request, code) in WRONG.items():
            assert asker.reply(request(asker)).code is code, what
        assert not (made.folder / "north" / "privacy_ledger.jsonl").exists() or charged(made) == 0


def test_a_total_of_fewer_than_the_survivors_is_refused(masked):
    with masked.site(0) as site:
        assert Asker(masked, site).ask(peers=frozenset({0})).code is Code.PEERS
        assert charged(masked) == 0


def test_hello_is_answered_and_charges_nothing(local):
    with local.site(0) as site:
        reply = Asker(local, site).ask(0, kind=Kind.HELLO)
        assert (reply.code, reply.payload, reply.epoch) == (Code.OK, b"", site.epoch)
        assert charged(local) == 0


def test_a_past_round_and_a_used_attempt_are_stale(local):
    with local.site(0) as site:
        asker = Asker(local, site)
        asker.ask(1, 3)
        used = asker.ask(
            1, 3, adapter=local.start, witnesses=(b"w" * 64,) * 3
        )  # another request under the same attempt
        assert (used.code, used.round, used.attempt) == (Code.STALE, 1, 3)
        assert asker.ask(1, 2).code is Code.STALE
        asker.go_on(local.start)
        assert asker.ask(2, adapter=local.start + 1).code is Code.OK
        asker.statement = local.plan.digest
        assert asker.ask(1, 9).code is Code.STALE
        assert charged(local) == 2


def test_a_second_attempt_is_of_the_same_adapter(made):
    """Another one would show this site two adapters in one round, and it signs one."""
    with made.site(0) as site:
        asker = Asker(made, site)
        asker.ask(1)
        asker.go_on(made.start)
        other = made.start + 1
        assert asker.ask(2, adapter=other).code is Code.OK
        assert asker.ask(2, 1, adapter=other + 1).code is Code.SPLIT
        assert asker.ask(2, 1, adapter=other).code is Code.OK
        assert charged(made) == 3


def test_no_more_rounds_than_planned_are_paid_for_whatever_the_noise(tmp_path):
    """A plan that gives the noise in place of epsilon has a budget all the same: what its sites agreed to."""
    made = small_silos.Federation(tmp_path, seed=None, epsilon=None, noise_multiplier=1.0)
    with made.site(0) as site:
        asker = Asker(made, site)
        codes = [asker.ask(1, attempt).code for attempt in range(5)]
        assert codes == [Code.OK] * 3 + [Code.SPENT] * 2
        assert charged(made) == 3


def test_half_of_the_sites_are_no_witness(local):
    """Two groups that know nothing of each other might each be shown its own adapters."""
    with local.site(0) as site:
        asker = Asker(local, site)
        asker.ask(1)
        asker.go_on(local.start)
        assert asker.ask(2, before=frozenset({0})).code is Code.SPLIT
        assert asker.ask(2, before=frozenset({0, 2})).code is Code.OK


def test_two_attempts_share_neither_noise_nor_masks(made):
    """A coordinator that asks for a round again gets other numbers, paid for again; their difference is as noisy as each."""
    with made.site(0) as site:
        asker = Asker(made, site)
        uploads = [np.frombuffer(asker.ask(1, attempt).payload, "<u4") for attempt in range(2)]
        assert charged(made) == 2
    equal = (uploads[0] == uploads[1]).mean()
    assert equal < 0.01


def test_a_share_is_under_the_masks_of_its_request_and_its_peers(masked):
    """Without these masks it is a share's integers again; without any others it would be 32 bits of nothing."""
    own = keys.load(masked.folder / "north").agree
    with masked.site(0) as site:
        asker = Asker(masked, site)
        for attempt, peers in enumerate(({0, 1, 2}, {0, 2})):
            data = asker.request(1, attempt, peers=frozenset(peers))
            upload = np.frombuffer(asker.reply(data).payload, "<u4")
            others = {k: keys.agreement(masked.plan.sites[k]["x25519"]) for k in peers - {0}}
            words = masks.mask(own, 0, others, masked.plan.digest, messages.digest(data), len(upload))
            sizes = [np.abs(x.view(np.int32).astype(float)).mean() for x in (upload - words, upload)]
            assert 0 < sizes[0] < 2**24 < 2**28 < sizes[1]


def test_sites_that_were_shown_different_adapters_find_out_in_the_next_round(local):
    with local.site(0) as site:
        asker = Asker(local, site)
        asker.ask(1)
        asker.go_on(local.start + 1)  # what the others signed is not what this site was sent
        assert asker.ask(2).code is Code.SPLIT
        assert charged(local) == 1


def test_an_older_rounds_signatures_do_not_stand_for_the_round_before(local):
    """Of the round before, in which sites may have been shown different adapters, they say nothing."""
    with local.site(0) as site:
        asker = Asker(local, site)
        asker.ask(1)
        asker.go_on(local.start)
        assert asker.ask(2, adapter=local.start + 1).code is Code.OK
        assert asker.ask(3, before_round=1).code is Code.STALE
        assert asker.ask(3).code is Code.SPLIT
        assert charged(local) == 2


@pytest.mark.parametrize("forger", [1, 2])
def test_a_signature_that_is_missing_or_another_sites_is_no_witness(local, forger):
    with local.site(0) as site:
        asker = Asker(local, site)
        asker.ask(1)
        asker.go_on(local.start)
        good = asker.signatures.pop(forger)
        assert asker.ask(2).code is Code.SPLIT
        asker.signatures[forger] = asker.signatures[0]
        assert asker.ask(2).code is Code.SPLIT
        asker.signatures[forger] = good
        assert asker.ask(2).code is Code.OK
        assert charged(local) == 2


def test_a_site_that_was_left_out_takes_part_again_once_the_others_sign_for_it(local):
    with local.site(0) as site:
        asker = Asker(local, site)
        asker.go_on(local.start)
        asker.go_on(local.start + 1, 2)
        assert asker.ask(3).code is Code.STALE  # it is said to have been there, and was not
        assert asker.ask(3, before=frozenset({1, 2})).code is Code.OK
        assert site.silo.done == 3
        assert charged(local) == 1


def test_the_budget_is_the_sites_own_to_keep(local):
    with local.site(0) as site:
        asker = Asker(local, site)
        for attempt in range(3):
            assert asker.ask(1, attempt).code is Code.OK
        assert asker.ask(1, 3).code is Code.SPENT
        assert charged(local) == 3
        assert site.silo.epsilon <= 8


def test_a_fault_travels_as_a_code_and_its_words_stay(local, monkeypatch):
    told = []
    with local.site(0, report=told.append) as site:
        monkeypatch.setattr(site.silo, "fit", lambda *_, **__: 1 / 0)
        reply = Asker(local, site).ask(1)
        assert (reply.code, reply.payload) == (Code.FAILED, b"")
        assert isinstance(told[0], ZeroDivisionError)


@pytest.fixture(scope="module")
def idle(tmp_path_factory):
    """A site whose silo must not be reached."""
    made = small_silos.Federation(tmp_path_factory.mktemp("idle"), seed=None)
    with made.site(0) as site:
        site.silo.fit = lambda *_, **__: pytest.fail("trained")
        yield Asker(made, site)


@given(st.data())
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_fuzzed_requests_end_in_codes(idle, data):
    """Fields of any value, properly signed; and bytes changed anywhere."""
    size = {"plan": 32, "statement": 32}
    fields = data.draw(
        st.fixed_dictionaries(
            {},
            optional={
                "kind": st.sampled_from(list(Kind)), "round": st.integers(0, 2**32 - 1),
                "attempt": st.integers(0, 2**32 - 1), "before_round": st.integers(0, 2**32 - 1),
                "peers": st.frozensets(st.integers(0, 2)), "before": st.frozensets(st.integers(0, 2)),
                **{name: st.binary(min_size=length, max_size=length) for name, length in size.items()},
            },
        )
    )  # fmt: skip
    kind = fields.get("kind", Kind.ROUND)
    bad = np.full_like(idle.made.start, data.draw(st.sampled_from([np.nan, np.inf, 3e38, 0.0])))
    sent = bytearray(idle.request(**{"adapter": bad} | fields))
    for _ in range(data.draw(st.integers(0, 3))):
        sent[data.draw(st.integers(0, len(sent) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.sampled_from([None, -1, 1, 100]))
    reply = idle.reply(bytes(sent[:cut]))
    assert reply.code is not Code.FAILED
    assert kind is Kind.HELLO or reply.code is not Code.OK
    assert not reply.payload
