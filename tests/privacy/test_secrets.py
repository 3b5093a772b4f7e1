"""Secrets are private files; keys derive from them by all that tells two draws apart; the run's end destroys them."""

import itertools
import os
import stat

import numpy as np
import pytest
import scipy.stats

from dplora_jax.privacy import secrets


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def loose_umask():
    previous = os.umask(0)
    yield
    os.umask(previous)


@pytest.mark.usefixtures("loose_umask")
def test_only_the_owner_can_read_the_secrets(tmp_path):
    private = tmp_path / "private"
    secrets.load_or_create(private, 3)
    assert mode(private) == 0o700
    assert mode(private / secrets.FILE) == 0o600
    assert [path.name for path in private.iterdir()] == [secrets.FILE]


def test_a_directory_that_others_could_read_is_closed(tmp_path):
    (tmp_path / "private").mkdir(mode=0o755)
    secrets.load_or_create(tmp_path / "private", 1)
    assert mode(tmp_path / "private") == 0o700


def test_secrets_persist_and_no_two_are_alike(tmp_path):
    first = secrets.load_or_create(tmp_path / "a", 5)
    assert secrets.load_or_create(tmp_path / "a", 5) == first
    assert [len(secret) for secret in first] == [32] * 5
    assert len({*first, *secrets.load_or_create(tmp_path / "b", 5)}) == 10


def test_secrets_come_from_the_operating_system_and_are_durable_before_use(tmp_path, monkeypatch):
    asked, synced = [], []
    monkeypatch.setattr(secrets.os, "urandom", lambda count: asked.append(count) or bytes([len(asked)]) * count)
    real = os.fsync
    monkeypatch.setattr(secrets.os, "fsync", lambda handle: synced.append(os.fstat(handle).st_ino) or real(handle))
    made = secrets.load_or_create(tmp_path / "private", 3)
    assert asked == [32, 32, 32]
    assert made == [bytes([k]) * 32 for k in (1, 2, 3)]
    assert synced == [(tmp_path / "private" / secrets.FILE).stat().st_ino, (tmp_path / "private").stat().st_ino]


def test_what_a_killed_start_or_end_left_is_no_secret(tmp_path):
    made = secrets.load_or_create(tmp_path, 2)
    path = tmp_path / secrets.FILE
    path.write_bytes(bytes(path.stat().st_size))  # killed while destroying
    (tmp_path / f"{secrets.FILE}.{os.getpid()}").write_text(
        "["
    )  # killed while creating, by a process of the same number
    assert secrets.load(tmp_path) is None
    assert not set(secrets.load_or_create(tmp_path, 2)) & set(made)
    assert [file.name for file in tmp_path.iterdir()] == [secrets.FILE]


def test_destroying_overwrites_the_content_and_removes_the_file(tmp_path):
    made = secrets.load_or_create(tmp_path / "private", 2)
    path, witness = tmp_path / "private" / secrets.FILE, tmp_path / "witness"
    os.link(path, witness)
    length = path.stat().st_size
    assert made[0].hex() in witness.read_text()
    secrets.destroy(tmp_path / "private")
    assert not path.exists()
    assert witness.read_bytes() == bytes(length)
    secrets.destroy(tmp_path / "private")
    assert secrets.load_or_create(tmp_path / "private", 2) != made


def test_a_seed_makes_the_same_secrets_and_another_makes_others():
    assert secrets.from_seed(1, 3) == secrets.from_seed(1, 5)[:3]
    assert len({*secrets.from_seed(1, 5), *secrets.from_seed(11, 5), *secrets.from_seed(2, 5)}) == 15
    assert all(len(secret) == 32 for secret in secrets.from_seed(1, 3))


def test_round_keys_are_deterministic_and_shaped_by_round_client_and_draw():
    own = secrets.from_seed(3, 4)
    keys, again = secrets.round_keys(own, range(2, 5), 1), secrets.round_keys(own, range(2, 5), 1)
    assert set(keys) == {"noise", "sampling"}
    for purpose, value in keys.items():
        assert value.shape == (3, 4, 4, 2)
        assert value.dtype == np.uint32
        np.testing.assert_array_equal(value, again[purpose])
    np.testing.assert_array_equal(keys["noise"][2], secrets.round_keys(own, [4], 1)["noise"][0])
    assert secrets.round_keys(own, [], 0)["noise"].shape == (0, 4, 4, 2)


def test_no_two_of_client_purpose_round_attempt_and_draw_share_a_key():
    """8 clients x 2 purposes x 13 rounds x 4 attempts x 4 draws."""
    seen = []
    for attempt in range(4):
        for value in secrets.round_keys(secrets.from_seed(3, 8), range(1, 14), attempt).values():
            seen.append(value.reshape(-1, 2))
    seen = np.concatenate(seen)
    assert len(seen) == 8 * 2 * 13 * 4 * 4
    assert len(np.unique(seen, axis=0)) == len(seen)


def test_a_digest_tells_its_parts_apart():
    """Neither moving a digit between two parts nor another type or order gives the same digest."""
    parts = [("noise", 1, 11), ("noise", 11, 1), ("noise", 111), ("noise1", 1, 1), ("noise", "1", 11), (11, 1, "noise")]
    digests = [secrets.digest(secret, *part) for secret in secrets.from_seed(0, 2) for part in parts]
    assert all(x != y for x, y in itertools.combinations(digests, 2))
    assert {len(digest) for digest in digests} == {32}


def test_the_servers_keys_are_its_own_and_clients_keys_do_not_change_by_them():
    own = secrets.from_seed(3, 5)
    keys, alone = secrets.round_keys(own, range(1, 4), 0, 4), secrets.round_keys(own[:4], range(1, 4), 0)
    assert keys["server"].shape == (3, 4, 2)
    for purpose, value in alone.items():
        np.testing.assert_array_equal(keys[purpose], value)
    np.testing.assert_array_equal(keys["server"], secrets.round_keys(own[4:], range(1, 4), 0)["noise"][:, 0])


def test_each_client_joins_each_round_independently_with_the_rate():
    """4,000 draws of 40 clients and 100 rounds: counts are binomial over clients and over rounds (chi-square of their spread),
    and another attempt draws anew. False alarms: about 4e-5."""
    own, rate = secrets.from_seed(4, 40), 0.3
    drawn = secrets.joins(own, range(100), 0, rate)
    assert set(np.unique(drawn)) == {0, 1}
    assert abs(drawn.mean() - rate) < 4.5 * np.sqrt(rate * (1 - rate) / drawn.size)
    for axis in 0, 1:
        count, groups = drawn.shape[axis], drawn.shape[1 - axis]
        spread = ((drawn.sum(axis) - count * rate) ** 2).sum() / (count * rate * (1 - rate))
        assert scipy.stats.chi2.ppf(1e-5, groups) < spread < scipy.stats.chi2.ppf(1 - 1e-5, groups)
    other = secrets.joins(own, range(100), 1, rate)
    assert abs(np.corrcoef(drawn.ravel(), other.ravel())[0, 1]) < 0.08
    assert (secrets.joins(own, range(100), 0, 1.0) == 1).all()
    assert secrets.joins(own, [], 0, rate).shape == (0, 40)
    np.testing.assert_array_equal(secrets.round_keys(own, [7], 0, rate=rate)["joins"][0], drawn[7])
