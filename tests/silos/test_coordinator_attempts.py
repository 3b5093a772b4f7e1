"""Sites that are missing, lose their upload or spend their budget: who is asked again, who pays, and where the run stops."""

import pytest

from dplora_jax.privacy.ledger import Ledger
from dplora_jax.silos import keys, messages
from dplora_jax.silos.coordinator import Coordinator, Stopped
from dplora_jax.silos.messages import Code
from dplora_jax.silos.office import Office
from tests.silos import small_silos
from tests.silos.small_silos import MODES, charges

GONE = 8  # seconds after which a site counts as missing: longer than one that is there takes on a busy machine

pytestmark = pytest.mark.usefixtures("quick_compile", "compiled")


@pytest.fixture(scope="module")
def compiled(quick_compile, tmp_path_factory):
    """The rounds of both modes, so that a site that is there answers long before it counts as missing."""
    for name, fields in MODES.items():
        small_silos.Federation(tmp_path_factory.mktemp(name), seed=None, **fields).run()


def test_a_deadline_ends_the_wait_with_a_sentence(tmp_path):
    made = small_silos.Federation(tmp_path)
    with pytest.raises(Stopped, match=r"south did not answer within 3 s"):
        made.run(lambda site, request, answer: b"" if site == 1 else answer(request), patience=3)
    assert charges(made) == [0, 0, 0]
    assert Stopped.code == 69


def goes_missing(site, request, answer):
    """South answers nothing of round 2 and later."""
    return b"" if site == 1 and messages.HEAD.unpack_from(request)[3] >= 2 else answer(request)


def test_without_a_site_that_is_missing_the_others_go_on(tmp_path):
    made = small_silos.Federation(tmp_path)
    done = made.run(goes_missing, without=GONE)
    assert done.past.round == 3
    assert done.past.members == {0, 2}
    assert charges(made) == [3, 1, 3]


def test_masked_the_others_go_on_in_a_new_attempt_that_they_pay_for(tmp_path):
    """Their first upload of the round stays under the masks of the one that is missing, for ever."""
    made = small_silos.Federation(tmp_path, seed=None, **small_silos.MASKED)
    done = made.run(goes_missing, without=GONE)
    assert done.past.members == {0, 2}
    north = Ledger(made.folder / "north" / "privacy_ledger.jsonl", mend=False)
    assert [entry["rounds"][0] for entry in north.begun[:3]] == [1, 2, 2]
    assert north.charged_rounds() == 3
    assert "budget of" in done.early
    assert done.asked[0] >= north.charged_rounds()


def test_a_site_that_never_came_costs_the_others_nothing(tmp_path):
    """It is not in any attempt's masks until it says hello."""
    made = small_silos.Federation(tmp_path, seed=None, **small_silos.MASKED)
    done = made.run(lambda site, request, answer: b"" if site == 1 else answer(request), without=GONE)
    assert done.past.round == 3
    assert done.early is None
    assert charges(made) == [3, 0, 3]
    assert done.asked == [3, 0, 3]


def test_a_site_that_comes_back_is_asked_again(tmp_path):
    made = small_silos.Federation(tmp_path)

    def carry(site, request, answer):
        return b"" if site == 1 and messages.HEAD.unpack_from(request)[3] == 2 else answer(request)

    done = made.run(carry, without=GONE)
    assert done.past.members == {0, 1, 2}
    assert charges(made) == [3, 2, 3]


def test_half_of_the_sites_are_no_federation(tmp_path):
    """Else two groups could go on apart, each shown its own adapters."""
    made = small_silos.Federation(tmp_path)
    with pytest.raises(Stopped, match="needs 2 sites or more, and north, south did not answer"):
        made.run(lambda site, request, answer: b"" if site < 2 else answer(request), without=GONE)


@pytest.mark.parametrize("name", MODES)
def test_a_run_that_ends_early_ends_at_every_site(tmp_path, name):
    made, office = small_silos.Federation(tmp_path, seed=None, **MODES[name]), Office(3)

    def carry(site, request, answer, lost=[]):  # noqa: B006 - once
        reply = answer(request)
        if site == 2 and messages.HEAD.unpack_from(request)[3] == 1 and not lost:
            lost.append(site)
            sites[2]._kept_for, sites[2]._kept, sites[2].epoch = b"", b"", b"n" * 16
            return answer(request)
        return reply

    with made.sites() as sites, made.engine(office, sites, carry):
        coordinator = made.coordinator(office)
        coordinator.run(60)
        assert "budget of" in coordinator.early
        assert coordinator.past.round == 2
        assert all(site.ended.is_set() for site in sites.values())
    for site in small_silos.NAMES:
        assert Ledger(made.folder / site / "privacy_ledger.jsonl").ended
        assert list((made.folder / site / "private").iterdir()) == []


@pytest.mark.parametrize("code", [Code.LOST, Code.OK])
def test_a_site_that_never_gives_an_upload_stops_the_run(tmp_path, code):
    """Before it makes the others pay for every round that they have."""
    made = small_silos.Federation(
        tmp_path, seed=None, rounds=30, epsilon=None, noise_multiplier=1.0, **small_silos.MASKED
    )

    def carry(site, request, answer):
        if site != 1 or messages.HEAD.unpack_from(request)[3] != 1:
            return answer(request)
        reply = messages.Reply(code, made.plan.digest, messages.digest(request), 1, 1, 2**32 - 1, bytes(16), bytes(64))
        return messages.pack_reply(reply, keys.load(made.folder / "south").sign)

    with pytest.raises(
        Stopped, match="was tried again 7 times: look at south" if code is Code.LOST else "south answered without"
    ):
        made.run(carry)
    assert max(charges(made)) <= 8
    if code is Code.LOST:  # and once the site is mended, a new start goes on
        with made.sites() as sites:
            office = Office(3)
            with made.engine(office, sites):
                coordinator = made.coordinator(office)
                coordinator._greet(coordinator._everyone, 60, None)
                assert set(coordinator._round(60, None)[1]) == {0, 1, 2}


def test_masked_fewer_than_the_survivors_stop(tmp_path):
    made = small_silos.Federation(tmp_path, **small_silos.MASKED | {"survivors": 3})
    with pytest.raises(Stopped, match="needs 3 sites or more, and south did not answer"):
        made.run(goes_missing, without=GONE)


def test_a_site_that_lost_its_upload_is_asked_anew(tmp_path):
    """Local: it alone. Masked: all, since their masks were this attempt's."""
    for name, fields in MODES.items():
        made = small_silos.Federation(tmp_path / name, seed=None, **fields)
        office, broken = Office(3), []

        def carry(site, request, answer, broken=broken, made=made):
            number = messages.HEAD.unpack_from(request)[3]
            if site == 2 and number == 1 and not broken:
                answer(request)
                broken.append(request)
                lost = sites[2]
                lost._kept_for, lost._kept, lost.epoch = b"", b"", b"n" * 16  # as a restart without the kept file
                return answer(request)
            return answer(request)

        coordinator = made.coordinator(office)
        with made.sites() as sites, made.engine(office, sites, carry):
            coordinator._greet(coordinator._everyone, 60, None)
            coordinator._step(*coordinator._round(60, None))
        assert charges(made) == ([1, 1, 2] if name == "local" else [2, 2, 2])
        assert coordinator.asked == charges(made)


def test_a_coordinator_that_dies_after_one_site_was_asked_again_still_has_the_others(tmp_path, monkeypatch):
    """Local: their uploads are of the attempt before, and are asked for by that very request."""
    made, broken = small_silos.Federation(tmp_path, seed=None), []

    class Killed(BaseException):
        pass

    def carry(site, request, answer):
        reply = messages.unpack_reply(answer(request), made.plan.numbers)
        if site == 2 and reply.round == 1 and not broken:
            broken.append(True)
            lost = reply._replace(code=Code.LOST, payload=b"", epoch=sites[2].epoch)
            return messages.pack_reply(lost, keys.load(made.folder / "east").sign)
        return answer(request)

    with made.sites() as sites:
        office = Office(3)
        with made.engine(office, sites, carry), monkeypatch.context() as dying:
            coordinator, real = made.coordinator(office), Coordinator._ask

            def ask(self, data, asked, *rest):
                if asked == {2}:
                    raise Killed
                return real(self, data, asked, *rest)

            dying.setattr(Coordinator, "_ask", ask)
            coordinator._greet(coordinator._everyone, 60, None)
            with pytest.raises(Killed):
                coordinator._round(60, None)
        office = Office(3)
        with made.engine(office, sites):
            coordinator = made.coordinator(office)
            coordinator._greet(coordinator._everyone, 60, None)
            _, uploads, _ = coordinator._round(60, None)
    assert set(uploads) == {0, 1, 2}
    assert charges(made) == [1, 1, 2]


@pytest.mark.parametrize("code", [Code.SPLIT, Code.FOREIGN, Code.FAILED, Code.ENDED])
def test_what_no_new_attempt_can_mend_stops_the_run_and_names_the_site(tmp_path, code):
    made = small_silos.Federation(tmp_path)

    def carry(site, request, answer):
        reply = messages.unpack_reply(answer(request), made.plan.numbers)
        if site == 1 and messages.HEAD.unpack_from(request)[3] == 1:
            return messages.pack_reply(reply._replace(code=code, payload=b""), keys.load(made.folder / "south").sign)
        return answer(request)

    with pytest.raises(Stopped, match=r"^site south "):
        made.run(carry)
