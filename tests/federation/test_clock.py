"""Where the time of a run goes, and what counts as the devices' waiting."""

import contextlib
import time

import pytest

from dplora_jax.federation import clock
from tests.federation import small_federation as small

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.fixture
def turn(monkeypatch):
    """A function that moves the time on by so many seconds."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return lambda seconds: now.__setitem__(0, now[0] + seconds)


def test_a_part_within_a_part_counts_once(turn):
    made = clock.Clock()
    turn(1)
    with made.part("reading"):
        turn(2)
        with made.part("public text"):
            turn(4)
        with contextlib.suppress(KeyError), made.part("public text"):
            turn(8)
            raise KeyError
    turn(16)
    assert made.parts() == {"public text": 12.0, "reading": 2.0, "all else": 17.0}


def test_the_devices_wait_where_no_busy_part_is_open_between_the_first_round_and_the_last(turn):
    made = clock.Clock()
    with made.part("evaluating"):
        turn(3)  # before the rounds
    made.begin()
    turn(1)
    with made.part("rounds"):
        turn(6)
    with made.part("report"):
        turn(1)
    made.stop()
    with made.part("evaluating"):
        turn(5)  # after the rounds
    assert list(made.in_words()) == [
        "16 s: evaluating 8.0, rounds 6.0, report 1.0, all else 1.0.",
        "The devices waited 2.0 s of 8.0 s (25.0%) for input, keys, ledger and checkpoints.",
    ]


def test_rounds_that_begin_again_are_counted_anew(turn):
    made = clock.Clock()
    assert len(list(made.in_words())) == 1, "no round was run, so nothing waited"
    for _ in range(2):
        made.begin()
        turn(1)
        with made.part("rounds"):
            turn(3)
        made.stop()
        turn(100)
        assert list(made.in_words())[1].startswith("The devices waited 1.0 s of 4.0 s")


def test_neither_what_is_prepared_nor_what_is_written_at_the_end_keeps_a_device_waiting(tmp_path, monkeypatch):
    made, prepared, written = small.federation(), [], []
    prepare = made.prepare
    monkeypatch.setattr(made, "prepare", lambda *args: (prepare(*args), prepared.append(time.perf_counter()))[0])
    list(made.fit(small.shards(), tmp_path / "run", closing=lambda: written.append(time.perf_counter())))
    assert prepared[0] < made.clock.start < made.clock.end < written[0]
    assert {"calibrating", "frozen layers", "compiling", "rounds"} <= {*made.clock.parts()}


def test_public_records_take_time_where_a_run_begins_with_them_alone(tmp_path):
    plain, warm = small.federation(), small.federation()
    list(plain.fit(small.shards(), tmp_path / "plain"))
    list(warm.fit(small.shards(), tmp_path / "warm", start=lambda prepared: prepared.adapter))
    assert "public records" not in plain.clock.parts()
    assert "public records" in warm.clock.parts()
