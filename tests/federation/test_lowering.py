"""The whole dispatch lowers for accelerators that are not there: sampling, clipping, noise, waves, aggregation."""

import re

import pytest
from jax import export

from tests.conftest import mostly_slow
from tests.federation import small

SETUPS = {
    "local": small.Setup(rows=4, columns=2, wave=2, transcript=False, diagnostics=False),
    "distributed": small.Setup(4, 2, local_steps=1, transcript=False, diagnostics=False, trust="distributed"),
    "pooled": small.Setup(4, 2, wave=2, local_steps=1, transcript=False, diagnostics=False, pool=9, microbatch=4),
    "client": small.Setup(4, 2, transcript=False, diagnostics=False, trust="client"),
    "banded": small.Setup(4, 2, local_steps=4, transcript=False, diagnostics=False, bands=2),
    "halves": small.Setup(4, 2, transcript=False, diagnostics=False, method="rolora", robust="median", partial=True),
    "fedex": small.Setup(4, 2, transcript=False, diagnostics=False, method="fedex", plain=True),
    "flexlora": small.Setup(4, 2, transcript=False, diagnostics=False, method="flexlora", plain=True),
}
# Singular values, the one thing that no XLA operation gives: what JAX has for each platform.
SOLVERS = {"cuda": {"cusolver_gesvdj_ffi"}, "tpu": {"Eigh", "Qr", "ProductOfElementaryHouseholderReflectors"}}


RUNS = [(platform, name) for platform in ("cuda", "tpu") for name in SETUPS]


@pytest.mark.parametrize(("platform", "name"), mostly_slow([("cuda", "local"), ("tpu", "local")], RUNS))
def test_a_dispatch_lowers_for_an_accelerator_on_a_mesh_of_4x2(platform, name):
    """Clients meet in all-reduces (for robust means: gathers) over the clients axis alone. Nothing calls back to the host or, but
    for FlexLoRA's singular values, a library: all of it is the operations that every XLA backend has."""
    setup = SETUPS[name]
    arguments = small.arguments(setup, small.ROUNDS)
    lowered = export.export(small.program(setup), platforms=[platform])(*arguments)
    assert lowered.platforms == (platform,)
    assert lowered.nr_devices == 8
    text = lowered.mlir_module()
    assert '<["clients"=4, "model"=2]>' in text
    groups = (
        r"dense<(\[\[.*?\]\])>|#stablehlo\.replica_group_mesh_axes<.*?axes = (\[.*?>\])>"  # the second since JAX 0.12
    )
    met = [
        "".join(found)
        for found in re.findall(rf'"stablehlo\.all_(?:reduce|gather)".*?replica_groups = (?:{groups})', text)
    ]
    assert len(met) >= 5  # a term of each matrix, or their product, the head's, and the weights'
    assert set(met) in ({"[[0, 2, 4, 6], [1, 3, 5, 7]]"}, {'[#stablehlo.axis_ref<name = "clients">]'})
    assert "chlo.top_k" in text  # the sample
    assert set(re.findall(r"custom_call @(\w+)", text)) <= (SOLVERS[platform] if name == "flexlora" else set())
    assert not re.search(r"stablehlo\.(infeed|outfeed|send|recv|rng\b)|callback", text)
