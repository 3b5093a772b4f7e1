"""What coordinator and engine see and keep holds no exact statistic of any site's records: a search by value."""

import shutil

import jax
import numpy as np
import pytest

from dplora_jax.privacy import clipping
from dplora_jax.silos import messages
from tests.experiments import leaks, reductions
from tests.silos import small_silos

pytestmark = pytest.mark.usefixtures("quick_compile")
ROUNDS = 8


@pytest.fixture(scope="module", params=["local", "masked"])
def seen(request, quick_compile, tmp_path_factory):
    """(the folder of all that coordinator and engine see, the Sought statistics of the sites' own steps).

    The sites' programs tell each row's norm and loss, to this test alone.
    """
    fields = {} if request.param == "local" else small_silos.MASKED
    made = small_silos.Federation(tmp_path_factory.mktemp("leaks"), rounds=ROUNDS, seed=None, **fields)
    engine, heard, steps = (
        made.folder / "state",
        [],
        {},
    )  # what is noise may spell a float by chance: `leaks` knows the name
    engine.mkdir()
    real = clipping.clipped_grad_sum

    def overheard(loss_fn, adapter, batch, clip_norm, weights, *options, **how):
        out = real(loss_fn, adapter, batch, clip_norm, weights, *options, **how)
        jax.debug.callback(lambda *x: heard.append([np.array(v) for v in x]), out[1], out[2], weights)
        return out

    def carry(site, request, answer):
        heard.clear()
        reply = answer(request)
        jax.effects_barrier()
        number = messages.HEAD.unpack_from(request)[3]
        if heard:
            norms, losses, weights = heard[-1]
            steps[number, site] = norms[weights > 0].astype(float), losses[weights > 0].astype(float)
        for name, data in ("request", request), ("reply", reply):
            (engine / f"{name}.{number}.{site}").write_bytes(data)
        return reply

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clipping, "clipped_grad_sum", overheard)
        patch.setattr(small_silos, "PROGRAMS", {})
        made.run(carry)
    assert len(steps) == 3 * ROUNDS
    shutil.copytree(made.folder / "coordinator", engine / "coordinator")
    return engine, _sought(steps), made.folder


def _sought(steps):
    """Every row's norm and loss, and what is reckoned of these and of the counts."""
    shape = ROUNDS, 3, 1
    counts, totals = np.zeros(shape), {name: np.zeros(shape) for name in ("loss", "norm", "clipped")}
    singles = set()
    for (number, site), (norms, losses) in steps.items():
        place = number - 1, site, 0
        counts[place] = len(norms)
        for name, rows in ("loss", losses), ("norm", norms), ("clipped", norms > 1.0):
            totals[name][place] = rows.sum()
        singles |= {*norms.tolist(), *losses.tolist()}
    assert counts.min() > 0
    more, series = reductions.every(totals, counts, np.array(small_silos.SIZES))
    return leaks.Sought(singles | more, series)


def test_no_file_and_no_message_holds_an_exact_private_statistic(seen):
    folder, sought, _ = seen
    assert len(sought.singles) > 500
    assert len(list(folder.rglob("re*.*.*"))) > 6 * ROUNDS
    assert (folder / "coordinator" / "state.npz").exists()
    assert leaks.search(folder, sought) == []


def test_the_search_finds_them_where_they_are(seen, tmp_path):
    """In the messages' own form: two floats side by side, or a site's counts."""
    _, sought, _ = seen
    for name, content in {
        "floats": np.array(sought.singles[50:60], "<f4").tobytes(),
        "counts": str(max((s.values for s in sought.series if all(x == int(x) for x in s.values)), key=len)).encode(),
    }.items():
        place = tmp_path / name / "state"
        place.mkdir(parents=True)
        (place / "reply").write_bytes(b"head" + content)
        assert leaks.search(place, sought), name
