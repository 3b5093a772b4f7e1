"""`verify` makes each client's mechanism anew from flags and public sizes: an entry that claims another does not hold."""

import dataclasses

import pytest

from dplora_jax.federation.workdir_files import read_config
from tests.experiments.ledger_workdirs import MECHANISMS, edit, newer, reflag, reforge, run, write_run


@pytest.fixture
def workdir(tmp_path):
    return write_run(tmp_path)


def changed(**values):
    return lambda mechanism: dataclasses.replace(mechanism, **values)


CLAIMS = {
    "bands without banded noise": (changed(bands=2), {}, "bands"),
    "the bands of a tenth of the noise": (  # what an edited config.json had a run charge: epsilon 2 for 7.5
        lambda m: dataclasses.replace(m, bands=2, noise_multiplier=m.noise_multiplier / 2**0.5), {}, "bands, noise_multiplier",
    ),
    "more bands": (changed(bands=4), {"noise": "banded", "local_steps": 4, "bands": 2}, "bands"),
    "a count's noise without adaptive clipping": (changed(count_noise=3.0), {}, "count_noise"),
    "another noise on the count": (
        changed(count_noise=3.0), {"clipping": "adaptive", "count_noise_multiplier": 4.0}, "count_noise",
    ),
    "a lower sampling rate": (changed(sampling_rate=0.1), {}, "sampling_rate"),
    "more records": (changed(records=200), {}, "records"),
    "a larger batch": (changed(capacity=99), {}, "capacity"),
    "a smaller batch": (changed(capacity=20), {}, "capacity"),
    "more noise": (lambda m: dataclasses.replace(m, noise_multiplier=m.noise_multiplier * 1.01), {}, "noise_multiplier"),
    "more noise than flagged": (
        lambda m: dataclasses.replace(m, noise_multiplier=m.noise_multiplier * 1.0001),
        {"epsilon": None, "noise_multiplier": 1.5}, "noise_multiplier is not client 0's",
    ),
    "noise of half the rounds": (
        lambda m: MECHANISMS[m.records == 50], {"rounds": 8}, "noise_multiplier",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CLAIMS)
def test_a_mechanism_that_the_flags_exclude_is_refused(workdir, capsys, name):
    change, flags, words = CLAIMS[name]
    reflag(workdir, change, **flags)
    code, out, err = run(capsys, "verify", workdir)
    assert (code, out) == (2, "")
    assert words in err


@pytest.mark.parametrize(
    ("sizes", "flags"),
    [
        ((100, 50), {}),
        ((100, 50), {"noise": "banded", "local_steps": 4, "bands": 2, "expected_batch_size": 10.0}),
        ((100, 50), {"clipping": "adaptive"}),
        ((100, 50), {"epsilon": None, "noise_multiplier": 1.5}),
        ((100, 50), {"trust": "distributed", "local_steps": 1}),
        ((100, 50), {"trust": "client", "client_rate": 0.5}),
        (
            tuple(range(10, 50)),
            {"clients": 40, "epsilon": None, "noise_multiplier": 2.0, "expected_batch_size": 40.0},
        ),  # in classes of sizes
    ],
)
def test_what_the_flags_decide_holds(workdir, capsys, sizes, flags):
    reflag(workdir, sizes=sizes, **flags)
    assert run(capsys, "verify", workdir)[::2] == (0, "")


def test_another_config_json_than_the_entries_know_is_refused(workdir, capsys):
    """What no other check looks at included: here, the features' centre."""
    reforge(workdir, newer(config=read_config(workdir).digest))
    assert run(capsys, "verify", workdir)[0] == 0
    edit(workdir / "config.json", lambda config: config["federation"].update(features={"center": [0.5]}))
    assert "entry 1 has other config" in run(capsys, "verify", workdir)[2]
