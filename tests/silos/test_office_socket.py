"""The office's Unix socket, which an engine's process asks for all sites."""

import concurrent.futures
import threading
import types

from dplora_jax.silos import engines, frames

SITES = 3 * frames.THREADS


def test_the_questions_of_all_sites_may_wait_at_once(tmp_path):
    everyone = threading.Barrier(SITES)

    def exchange(site, reply, seconds):
        everyone.wait(20)
        return b"request of %d after %s" % (site, reply)

    plan = types.SimpleNamespace(sites=range(SITES), reply_size=lambda: 16)
    path = tmp_path / "office.sock"

    def ask(site):
        return frames.ask(path, frames.SITE.pack(site) + b"reply", 64, 30)

    with (
        engines.socket(plan, types.SimpleNamespace(exchange=exchange), path),
        concurrent.futures.ThreadPoolExecutor(SITES) as pool,
    ):
        assert list(pool.map(ask, range(SITES))) == [b"request of %d after reply" % site for site in range(SITES)]


def test_a_site_that_is_not_in_the_plan_is_answered_nothing(tmp_path):
    plan = types.SimpleNamespace(sites=range(2), reply_size=lambda: 16)
    with engines.socket(plan, None, tmp_path / "office.sock"):
        assert frames.ask(tmp_path / "office.sock", frames.SITE.pack(2), 64, 30) == b""
        assert frames.ask(tmp_path / "office.sock", b"0", 64, 30) == b""
