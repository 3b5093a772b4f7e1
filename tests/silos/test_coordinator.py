"""The coordinator comes to the same adapter whatever is late, lost, doubled or killed, and stops where it cannot go on."""

import threading
import time

import numpy as np
import pytest

from dplora_jax.errors import InputError
from dplora_jax.privacy.ledger import Ledger
from dplora_jax.silos import coordinator as coordinators
from dplora_jax.silos import messages
from dplora_jax.silos.coordinator import Coordinator, Stopped
from dplora_jax.silos.messages import Code
from dplora_jax.silos.office import Office
from tests.silos import small_silos

pytestmark = pytest.mark.usefixtures("quick_compile")
MODES = {"local": {}, "masked": small_silos.MASKED}


@pytest.fixture(scope="module", params=MODES)
def expected(request, tmp_path_factory):
    """(fields, the adapter that three quiet rounds come to), of the seed of all tests here."""
    fields = MODES[request.param]
    done = small_silos.Federation(tmp_path_factory.mktemp("quiet"), **fields).run()
    return fields, done.state.adapter


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    """Who is gone at the end is not waited for long."""
    monkeypatch.setattr(coordinators, "END_SECONDS", 1.0)
    monkeypatch.setattr(coordinators, "WELCOME_SECONDS", 0.2)


def charges(made):
    return [
        Ledger(made.folder / name / "privacy_ledger.jsonl", mend=False).charged_rounds() for name in small_silos.NAMES
    ]


@pytest.mark.parametrize("order", [[1, 2, 0], [2, 1, 0], [0, 2, 1]])
def test_the_order_of_replies_changes_no_bit(expected, tmp_path, order):
    """Each round's replies are held until all are there, and let go one after the other in this order."""
    fields, adapter = expected
    turn, came, arrived = threading.Condition(), {}, []

    def carry(site, request, answer):
        with small_silos.ONE:
            reply = answer(request)
        number = messages.HEAD.unpack_from(request)[3]
        with turn:
            came.setdefault(number, []).append(site)
            turn.notify_all()
            before = order[: order.index(site)]
            assert turn.wait_for(lambda: len(came[number]) == 3 and arrived.count(number) == len(before), 60)
            arrived.append(number)
            turn.notify_all()
        return reply

    made = small_silos.Federation(tmp_path, **fields)
    done = made.run(carry, alone=False)
    np.testing.assert_array_equal(done.state.adapter, adapter)
    assert all(sorted(sites) == [0, 1, 2] for sites in came.values())


def test_replies_that_are_doubled_lost_forged_and_late_change_nothing(expected, tmp_path):
    """An engine that does all of this can delay; it cannot change a bit, and every site is charged once a round."""
    fields, adapter = expected
    seen, old = {0: 0, 1: 0, 2: 0}, {}

    def carry(site, request, answer):
        reply = answer(request)
        seen[site] += 1
        earlier, old[site] = old.get(site), reply
        if seen[site] % 4 == 1:
            return b""  # lost
        if seen[site] % 4 == 2:
            return reply[:-1] + bytes([reply[-1] ^ 1])  # forged
        if seen[site] % 4 == 3 and earlier:
            return old.get((site + 1) % 3) or earlier  # another site's, or an earlier one
        return reply

    made = small_silos.Federation(tmp_path, **fields)
    np.testing.assert_array_equal(made.run(carry).state.adapter, adapter)
    assert charges(made) == [3, 3, 3]


def test_a_coordinator_that_dies_at_any_step_asks_for_the_same_again(expected, tmp_path, monkeypatch):
    fields, adapter = expected
    made, chance = small_silos.Federation(tmp_path, **fields), np.random.default_rng(0)

    class Killed(BaseException):
        pass

    real = coordinators.replace_durably

    def perhaps(path, content):
        """Two of five writes are the last one of their process, half of them after the file is there."""
        fate = chance.integers(5)
        if fate:
            real(path, content)
        if fate < 2:
            raise Killed

    monkeypatch.setattr(coordinators, "replace_durably", perhaps)
    starts = 0
    while True:
        starts += 1
        try:
            done = made.run()
            break
        except Killed:
            assert starts < 40
    assert starts > 4
    np.testing.assert_array_equal(done.state.adapter, adapter)
    assert charges(made) == [3, 3, 3]


def test_a_run_with_a_site_that_sleeps_goes_on_when_it_wakes_and_names_it(expected, tmp_path, monkeypatch):
    fields, adapter = expected
    monkeypatch.setattr(coordinators, "TELL_SECONDS", 0.5)
    said, slept = [], []

    def carry(site, request, answer):
        if site == 1 and len(slept) < 40 and messages.HEAD.unpack_from(request)[3] == 2:
            slept.append(time.sleep(0.1))
            return b""
        return answer(request)

    made = small_silos.Federation(tmp_path, **fields)
    office = Office(3)
    coordinator = Coordinator(made.plan, made.key, office, made.folder / "coordinator", made.start, say=said.append)
    with made.sites() as sites, made.engine(office, sites, carry):
        coordinator.run(120)
    np.testing.assert_array_equal(coordinator.state.adapter, adapter)
    assert any("waiting for south (" in line for line in said)


def test_a_deadline_ends_the_wait_with_a_sentence(tmp_path):
    made = small_silos.Federation(tmp_path)
    with pytest.raises(Stopped, match=r"south did not answer within 1 s"):
        made.run(lambda site, request, answer: b"" if site == 1 else answer(request), patience=1)
    assert charges_or_none(made) == [0, 0, 0]
    assert Stopped.code == 69


def charges_or_none(made):
    paths = [made.folder / name / "privacy_ledger.jsonl" for name in small_silos.NAMES]
    return [Ledger(path, mend=False).charged_rounds() if path.exists() else 0 for path in paths]


def goes_missing(site, request, answer):
    """South answers nothing of round 2 and later."""
    return b"" if site == 1 and messages.HEAD.unpack_from(request)[3] >= 2 else answer(request)


def test_without_a_site_that_is_missing_the_others_go_on(tmp_path):
    made = small_silos.Federation(tmp_path)
    done = made.run(goes_missing, without=4)
    assert done.past.round == 3
    assert done.past.members == {0, 2}
    assert charges(made) == [3, 1, 3]


def test_masked_the_others_go_on_in_a_new_attempt_that_they_pay_for(tmp_path):
    """Their first upload of the round stays under the masks of the one that is missing, for ever."""
    made = small_silos.Federation(tmp_path, seed=None, **small_silos.MASKED)
    done = made.run(goes_missing, without=4)
    assert done.past.members == {0, 2}
    north = Ledger(made.folder / "north" / "privacy_ledger.jsonl", mend=False)
    assert [entry["rounds"][0] for entry in north.begun[:3]] == [1, 2, 2]
    assert north.charged_rounds() == 3
    assert "budget of" in done.early
    assert done.asked[0] >= north.charged_rounds()


def test_a_site_that_never_came_costs_the_others_nothing(tmp_path):
    """It is not in any attempt's masks until it says hello."""
    made = small_silos.Federation(tmp_path, seed=None, **small_silos.MASKED)
    done = made.run(lambda site, request, answer: b"" if site == 1 else answer(request), without=3)
    assert done.past.round == 3
    assert done.early is None
    assert charges_or_none(made) == [3, 0, 3]
    assert done.asked == [3, 0, 3]


def test_a_site_that_comes_back_is_asked_again(tmp_path):
    made = small_silos.Federation(tmp_path)

    def carry(site, request, answer):
        return b"" if site == 1 and messages.HEAD.unpack_from(request)[3] == 2 else answer(request)

    done = made.run(carry, without=4)
    assert done.past.members == {0, 1, 2}
    assert charges(made) == [3, 2, 3]


def test_half_of_the_sites_are_no_federation(tmp_path):
    """Else two groups could go on apart, each shown its own adapters."""
    made = small_silos.Federation(tmp_path)
    with pytest.raises(Stopped, match="needs 2 sites or more, and north, south did not answer"):
        made.run(lambda site, request, answer: b"" if site < 2 else answer(request), without=2)


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


def test_a_coordinator_that_died_before_it_showed_a_round_shows_it(tmp_path):
    made, shown = small_silos.Federation(tmp_path), []

    class Killed(BaseException):
        pass

    def show(number, state, seconds):
        if number == 3 and shown[-1:] != ["killed"]:
            shown.append("killed")
            raise Killed
        shown.append(number)

    with pytest.raises(Killed):
        made.run(show=show)
    made.run(show=show)
    assert shown == [0, 1, 2, "killed", 3]


def test_a_hello_is_never_the_same(tmp_path):
    """An old answer, of a site's process that is gone, answers no other."""
    made, seen = small_silos.Federation(tmp_path), []
    for _ in range(2):
        coordinator = made.coordinator()
        coordinator._ask = lambda request, *rest: seen.append(request) or {}
        coordinator._greet(coordinator._everyone, None, None)
    assert seen[0] != seen[1]


@pytest.mark.parametrize("code", [Code.LOST, Code.OK])
def test_a_site_that_never_gives_an_upload_stops_the_run(tmp_path, code):
    """Before it makes the others pay for every round that they have."""
    from dplora_jax.silos import keys

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
    assert max(charges_or_none(made)) <= 8
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
        made.run(goes_missing, without=4)


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
            from dplora_jax.silos import keys

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
            from dplora_jax.silos import keys

            return messages.pack_reply(reply._replace(code=code, payload=b""), keys.load(made.folder / "south").sign)
        return answer(request)

    with pytest.raises(Stopped, match=r"^site south "):
        made.run(carry)


def test_a_workdir_of_another_plan_or_another_start_is_refused(tmp_path):
    made, other = small_silos.Federation(tmp_path / "one"), small_silos.Federation(tmp_path / "two")
    made.run()
    folder = made.folder / "coordinator"
    with pytest.raises(InputError, match="another plan"):
        Coordinator(other.plan, other.key, Office(3), folder, other.start)
    with pytest.raises(InputError, match="start adapter"):
        Coordinator(made.plan, made.key, Office(3), folder, made.start + 1)
    (folder / "state.npz").write_bytes(b"PK\3\4 no archive")
    with pytest.raises(InputError, match="damaged"):
        Coordinator(made.plan, made.key, Office(3), folder, made.start)


def test_the_integer_total_is_exactly_the_simulations(tmp_path):
    """Of the first round, whose shares the seed decides: what the compiled program sums, the masked uploads sum to."""
    import jax

    from dplora_jax import losses
    from dplora_jax.federation import dispatch, storage
    from dplora_jax.federation.federation import Federation
    from dplora_jax.privacy import integers
    from dplora_jax.silos import vectors
    from tests.federation import small_federation as small

    made, totals = small_silos.Federation(tmp_path, **small_silos.MASKED), []
    office = Office(3)
    coordinator = made.coordinator(office)
    with made.sites() as sites, made.engine(office, sites):
        coordinator._greet(coordinator._everyone, 60, None)
        _, uploads, _ = coordinator._round(60, None)
    totals.append(coordinator.server.total(uploads))
    whole = Federation(*small.model(), losses.classification, small.config(rounds=3, **small_silos.MASKED))
    prepared = whole.prepare(small_silos.shards())
    job = whole._job(prepared, storage.InMemory(), None)
    rounds, attempt = dispatch.charge(job, 0)
    keys = dispatch.round_keys(job, (1, 2), attempt)
    from dplora_jax.federation import mesh

    placed = mesh.place_keys(whole.mesh, keys, 3)
    arguments = (jax.tree.map(jax.numpy.array, prepared.state), prepared.params, prepared.placement.clients)
    arguments = (*arguments, prepared.placement.data, placed)
    program = dispatch.compiled({}, whole.config, prepared.rounds, whole.mesh, arguments, transcript=True)
    shown = program(*arguments)[1][0]
    shares = [vectors.flat(jax.tree.map(lambda x, k=k: np.asarray(x)[0, k], shown["uploads"])) for k in range(3)]
    assert shares[0].dtype == np.int32
    np.testing.assert_array_equal(np.sum(shares, axis=0, dtype=np.int32), totals[0])
    assert made.plan.bits == integers.bits_for([prepared.shares])
    assert rounds[0] == 1
