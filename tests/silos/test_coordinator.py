"""The coordinator comes to the same adapter whatever is late, lost, doubled or killed, and stops where it cannot go on."""

import threading
import time

import numpy as np
import pytest

from dplora_jax.errors import InputError
from dplora_jax.silos import coordinator as coordinators
from dplora_jax.silos import keys, messages
from dplora_jax.silos.coordinator import Coordinator, Stopped
from dplora_jax.silos.messages import Code, Reply
from dplora_jax.silos.office import Office
from tests.silos import small_silos
from tests.silos.small_silos import MODES, charges

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.fixture(scope="module", params=MODES)
def expected(request, tmp_path_factory):
    """(fields, the adapter that three quiet rounds come to), of the seed of all tests here."""
    fields = MODES[request.param]
    done = small_silos.Federation(tmp_path_factory.mktemp("quiet"), **fields).run()
    return fields, done.state.adapter


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
            return reply[:-70] + bytes([reply[-70] ^ 1]) + reply[-69:]  # forged, where the upload is
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


def test_a_reply_counts_that_its_own_site_signed_about_this_very_request(tmp_path):
    made, digest = small_silos.Federation(tmp_path), b"d" * 32
    coordinator, good = made.coordinator(), Reply(Code.LOST, made.plan.digest, digest, 1, 1, 0, b"e" * 16, b"w" * 64)

    def signed(name="south", **fields):
        return messages.pack_reply(good._replace(**fields), keys.load(made.folder / name).sign)

    assert coordinator._checked(1, signed(), digest) == good
    wrong = [signed("north"), signed(site=0), signed(digest=b"f" * 32), signed(plan=b"p" * 32), signed()[:-1]]
    assert [coordinator._checked(1, data, digest) for data in wrong] == [None] * len(wrong)
    assert coordinator._checked(0, signed(), digest) is None


def test_a_site_that_signed_another_adapter_stops_the_run(tmp_path):
    made = small_silos.Federation(tmp_path)
    witness = keys.load(made.folder / "south").sign.sign(b"of another adapter")
    with pytest.raises(Stopped, match="south signed another adapter"):
        made.coordinator()._step(b"of this adapter", {}, {1: witness})


def test_a_hello_is_never_the_same(tmp_path):
    """An old answer, of a site's process that is gone, answers no other."""
    made, seen = small_silos.Federation(tmp_path), []
    for _ in range(2):
        coordinator = made.coordinator()
        coordinator._ask = lambda request, *rest: seen.append(request) or {}
        coordinator._greet(coordinator._everyone, None, None)
    assert seen[0] != seen[1]


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
    kept = storage.InMemory()
    job = whole._job(prepared, kept, kept.secrets(3, whole.config.privacy.seed), None)
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
