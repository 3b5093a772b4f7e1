"""The fit of memory by clients and waves, and one measurement of it."""

import pytest

from experiments.benchmark import scale

QUICK = {"xla_backend_optimization_level": 0}


def test_the_fit_finds_base_wave_and_client():
    rows = [(count, wave, 1e8 + 2e6 * wave + 5200 * count) for count in scale.CLIENTS for wave in scale.WAVES]
    assert scale.fit(rows) == pytest.approx([1e8, 2e6, 5200], rel=1e-6)
    assert scale.row_bytes(20, 32) == 5200


@pytest.mark.slow
def test_xlas_account_of_a_round_grows_by_little_more_than_a_clients_own_rows(tiny_bert):
    """Neither uploads nor optimizer state, each larger than what is allowed, are held for all clients at once."""
    import jax

    from dplora_jax.federation import round

    taken = []
    for clients in (8, 40):
        federation, grid, arguments = scale._arguments(str(tiny_bert), clients, 1, 20, 8)
        memory = round.make(federation, grid).lower(*arguments).compile(compiler_options=QUICK).memory_analysis()
        outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
        taken.append(memory.argument_size_in_bytes + memory.temp_size_in_bytes + outputs)
    upload = sum(leaf.nbytes for leaf in jax.tree.leaves(arguments[0].adapter))
    assert upload > scale.ALLOWED
    assert (taken[1] - taken[0]) / 32 <= scale.row_bytes(20, 8) + scale.ALLOWED
