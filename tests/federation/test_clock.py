"""What counts as the devices' waiting."""

import time

import pytest

from tests.federation import small_federation as small

pytestmark = pytest.mark.usefixtures("quick_compile")


def test_neither_what_is_prepared_nor_what_is_written_at_the_end_keeps_a_device_waiting(tmp_path, monkeypatch):
    made, prepared, written = small.federation(), [], []
    prepare = made.prepare
    monkeypatch.setattr(made, "prepare", lambda *args: (prepare(*args), prepared.append(time.perf_counter()))[0])
    list(made.fit(small.shards(), tmp_path / "run", closing=lambda: written.append(time.perf_counter())))
    assert prepared[0] < made.clock.start < made.clock.end < written[0]
