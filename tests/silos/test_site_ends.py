"""A site that is killed, closed or at its end: what it charged is kept or paid for again, and its secrets do not outlive
its part."""

import threading
import time

import numpy as np
import pytest

from dplora_jax.errors import InputError
from dplora_jax.privacy.ledger import Ledger
from dplora_jax.silos.messages import Code, Kind
from tests.silos.asking import Asker, charged

pytestmark = pytest.mark.usefixtures("quick_compile")


def test_the_end_comes_after_a_round_that_was_refused_too(local):
    with local.site(0) as site:
        asker = Asker(local, site)
        for attempt in range(3):
            asker.ask(1, attempt)
        asker.go_on(local.start)
        assert asker.ask(2, 0, adapter=local.start + 1).code is Code.SPENT
        assert asker.ask(2, 0, kind=Kind.END, adapter=local.start + 1).code is Code.OK


def test_a_site_that_is_closed_has_kept_what_it_charged(local, monkeypatch):
    """It waits for the step under way, and answers nothing more."""
    with local.site(0) as site:
        asker, real, going = Asker(local, site), site.silo.fit, threading.Event()

        def slow(*arguments, **options):
            going.set()
            time.sleep(0.5)
            return real(*arguments, **options)

        monkeypatch.setattr(site.silo, "fit", slow)
        thread = threading.Thread(target=asker.ask, args=(1,), daemon=True)
        thread.start()
        going.wait()
        site.close()
        ledger = Ledger(local.folder / "north" / "privacy_ledger.jsonl", mend=False)
        assert ledger.charged_rounds() == 1
        assert not ledger.open_entry()
        assert site._kept


STEPS = {
    "before the charge": ("dplora_jax.federation.dispatch", "charge", 0, 1),
    "in the program": ("dplora_jax.federation.silo.Silo", "_program", 1, 2),
    "before the upload is kept": ("dplora_jax.silos.site", "replace_durably", 1, 2),
    "before the commit": ("dplora_jax.privacy.ledger.Ledger", "commit", 1, 1),
}


@pytest.mark.parametrize("step", STEPS)
def test_a_site_that_dies_at_any_step_replays_the_same_bits_or_pays_for_a_new_attempt(made, step, monkeypatch):
    target, name, before, after = STEPS[step]

    class Killed(BaseException):
        pass

    def die(*_, **__):
        raise Killed

    with made.site(0) as site:
        data = Asker(made, site).request()
        with monkeypatch.context() as broken:
            broken.setattr(f"{target}.{name}", die)
            with pytest.raises(Killed):
                site.handle(data)
        assert charged(made) == before
        kept = site._kept
    with made.site(0) as site:
        asker = Asker(made, site)
        again = asker.reply(data)
        if step == "before the commit":
            assert (again.code, site.handle(data)) == (Code.OK, kept)
        else:  # it may have been another request's answer that is lost: its masks must not be used again
            assert again.code is Code.LOST
            assert asker.ask(1, 1).code is Code.OK
        assert charged(made) == after
        assert not Ledger(made.folder / "north" / "privacy_ledger.jsonl", mend=False).open_entry()


def test_what_was_kept_is_this_sites_own_and_whole(local):
    with local.site(0) as site:
        Asker(local, site).ask(1)
    path = local.folder / "north" / "private" / "sent.bin"
    assert path.stat().st_mode & 0o777 == 0o600
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match="damaged"), local.site(0):
        pass


def test_the_end_gives_the_adapter_and_destroys_the_secret(local):
    kept = []
    with local.site(0, finish=kept.append) as site:
        asker = Asker(local, site)
        asker.ask(1)
        asker.go_on(local.start)
        data = asker.request(2, kind=Kind.END, adapter=local.start + 2)
        assert asker.reply(data).code is Code.OK
        np.testing.assert_array_equal(kept[0], local.start + 2)
        assert asker.reply(data).code is Code.OK  # the answer may have been lost on its way
        assert asker.ask(3).code is Code.ENDED
        assert len(kept) == 1
    assert list((local.folder / "north" / "private").iterdir()) == [], "with its keys, masks could be made again"
