"""Quantised kernels: how far they lie from the float ones, the bytes they take, and products that never keep a float matrix."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from scipy.stats import norm

from dplora_jax import lora
from dplora_jax.models import bert, layers, quantized
from dplora_jax.models.quantized import KINDS, NF4, is_quantized, matmul, nbytes, quantize_kernel

pytestmark = pytest.mark.usefixtures("quick_compile")
LAYERS, INPUTS, OUTPUTS = 8, 192, 160
dequantize = jax.jit(quantized.dequantize, static_argnums=1)
both = pytest.mark.parametrize("kind", KINDS)


def draw(*shape, seed=0, scale=1.0):
    return np.random.default_rng(seed).normal(0, scale, shape).astype(np.float32)


def stacked(kind):
    return quantize_kernel(draw(LAYERS, INPUTS, OUTPUTS, scale=INPUTS**-0.5), kind)


def layer_of(kernel, index):
    return jax.tree.map(lambda leaf: leaf[index], kernel)


def naive(x, kernel):
    return x @ dequantize(kernel, x.dtype)


def run_stack(kernel, x, multiply, remat=False):
    """sum tanh(... tanh(x W_1) ...)^2 through square kernels, as one scan."""

    def block(x, layer):
        return jnp.tanh(multiply(x, layer)), None

    return jnp.square(jax.lax.scan(jax.checkpoint(block) if remat else block, x, kernel)[0]).sum()


def test_codebook_is_the_published_quantiles_with_exact_zero_and_ends():
    tail = (
        1 - 1 / 32 + 1 - 1 / 30
    ) / 2  # the outermost probability: QLoRA has 8 quantiles below and 9 above, 0 in both
    below, above = -norm.ppf(np.linspace(tail, 0.5, 8)), norm.ppf(np.linspace(tail, 0.5, 9))
    quantiles = np.concatenate([below, above[-2::-1]]) / norm.ppf(tail)
    np.testing.assert_allclose(NF4, quantiles, atol=1e-6)
    assert (NF4[[0, 7, 15]] == [-1, 0, 1]).all()
    assert len(NF4) == 16


def test_int8_errs_by_at_most_half_a_step_of_its_output():
    kernel = draw(3, 50, 20) * np.exp(draw(20, seed=1))
    step = np.abs(kernel).max(1, keepdims=True) / 127
    error = np.abs(dequantize(quantize_kernel(kernel, "int8")) - kernel)
    assert (error <= step / 2 + 1e-6).all()
    assert error.max() > step.max() / 4


@pytest.mark.parametrize("inputs", [1, 2, 7, 64, 65, 100, 128, 200])
def test_nf4_errs_by_at_most_half_the_largest_gap_of_its_group(inputs):
    kernel = draw(2, inputs, 5) * np.exp(draw(inputs, 1, seed=1))
    groups = -(-inputs // 64)
    size = 2 * -(-inputs // (2 * groups))
    error = np.abs(dequantize(quantize_kernel(kernel, "nf4")) - kernel)
    assert error.shape == kernel.shape
    for start in range(0, inputs, size):
        largest = np.abs(kernel[:, start : start + size]).max(1, keepdims=True)
        bound = largest * (1 + 2**-8) * np.diff(NF4).max() / 2  # a bfloat16 scale is rounded by 2^-9 at most
        assert (error[:, start : start + size] <= bound).all()


def test_values_of_either_grid_come_back_exactly():
    values = np.random.default_rng(0).permutation(np.tile(NF4, 4 * 3 * 6)).reshape(3 * 64, 6)
    values[::64] = 1  # every group's largest, so that its scale is a power of two
    scaled = values * np.float32(2.0**-7)
    np.testing.assert_array_equal(dequantize(quantize_kernel(scaled, "nf4")), scaled)
    grid = np.arange(-127, 128, dtype=np.float32)[:, None] * np.float32(2.0**-9) * [1, 4]
    np.testing.assert_array_equal(dequantize(quantize_kernel(grid, "int8")), grid)


@both
def test_zeros_stay_zero(kind):
    kernel = draw(130, 3)
    kernel[:, 1] = 0
    rounded = quantize_kernel(kernel, kind)
    assert (dequantize(rounded)[:, 1] == 0).all()
    assert (rounded.codes[..., 1] == {"int8": 0, "nf4": 7 | 7 << 4}[kind]).all()
    assert np.isfinite(dequantize(rounded)).all()


@both
def test_a_kernel_that_is_not_finite_shows(kind):
    kernel = draw(130, 3)
    kernel[5, 1] = np.nan
    assert np.isnan(dequantize(quantize_kernel(kernel, kind))[:, 1]).any()


@both
def test_bytes_held_are_one_or_half_a_number(kind):
    kernel = quantize_kernel(draw(4, 256, 64), kind)
    numbers = 4 * 256 * 64
    held = sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(kernel))
    # int8: a float32 scale for 256 inputs. nf4: half a byte, and a bfloat16 scale for 64 inputs.
    assert held == nbytes(kernel) == numbers * {"int8": 1 + 4 / 256, "nf4": 1 / 2 + 2 / 64}[kind]


@both
def test_layers_arrays_and_precisions_quantise_alike(kind):
    kernel = draw(3, 70, 9).astype(jnp.bfloat16)
    one = quantize_kernel(kernel, kind)
    for other in (
        quantize_kernel(jnp.asarray(kernel), kind),
        quantize_kernel(kernel.astype(np.float32), kind),
        quantized.quantize_layers(iter(kernel), 3, kind),
        jax.tree.map(lambda *leaves: jnp.stack(leaves), *[quantize_kernel(layer, kind) for layer in kernel]),
    ):
        assert jax.tree.structure(one) == jax.tree.structure(other)
        jax.tree.map(np.testing.assert_array_equal, one, other)


@both
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_product_and_gradient_are_those_of_the_float_matrix(kind, dtype):
    kernel, x = layer_of(stacked(kind), 1), draw(2, 5, INPUTS).astype(dtype)

    def loss(multiply, x):
        y = multiply(x, kernel)
        return jnp.square(y.astype(jnp.float32)).sum(), y

    def run(multiply):
        return jax.jit(jax.value_and_grad(functools.partial(loss, multiply), has_aux=True))(x)

    tolerance = {"atol": 1e-4, "rtol": 1e-4} if dtype == jnp.float32 else {"atol": 0.1, "rtol": 2**-6}
    ((_, y), grad), ((_, expected_y), expected_grad) = run(matmul), run(naive)
    assert y.dtype == grad.dtype == dtype
    assert y.shape == (2, 5, OUTPUTS)
    for ours, expected in ((y, expected_y), (grad, expected_grad)):
        np.testing.assert_allclose(ours.astype(jnp.float32), expected.astype(jnp.float32), **tolerance)


@both
def test_the_kernel_has_no_gradient(kind):
    kernel, x = layer_of(stacked(kind), 0), draw(3, INPUTS)
    y, pull = jax.vjp(matmul, x, kernel)
    codes, scale = jax.tree.leaves(pull(jnp.ones_like(y))[1])
    assert codes.dtype == jax.dtypes.float0
    assert not np.asarray(scale, np.float32).any()


@both
@pytest.mark.parametrize("remat", [False, True])
def test_jit_scan_vmap_and_remat_agree_with_the_float_matrix(kind, remat):
    kernel, x = quantize_kernel(draw(3, 96, 96, scale=0.1), kind), draw(4, 2, 96)

    def grads(multiply):
        return jax.jit(jax.vmap(jax.grad(lambda x: run_stack(kernel, x, multiply, remat))))(x)

    np.testing.assert_allclose(grads(matmul), grads(naive), atol=1e-4)


@both
@pytest.mark.parametrize("check_vma", [False, True])
def test_rows_and_outputs_may_be_split_over_devices(kind, check_vma):
    kernel, x = layer_of(stacked(kind), 0), draw(4, INPUTS)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("rows", "model"))
    rows, replicated = PartitionSpec("rows"), PartitionSpec()

    def outputs(leaf):
        return NamedSharding(mesh, PartitionSpec(*[None] * (leaf.ndim - 1), "model"))

    def grad(kernel, x):
        return jax.grad(lambda x: jnp.square(matmul(x, kernel)).sum())(x)

    mapped = jax.shard_map(
        grad, mesh=mesh, in_specs=(replicated, rows), out_specs=rows, axis_names={"rows"}, check_vma=check_vma
    )
    split = jax.device_put(kernel, jax.tree.map(outputs, kernel))
    np.testing.assert_allclose(jax.jit(mapped)(split, x), grad(kernel, x), atol=1e-4)


@both
def test_backward_pass_keeps_no_float_kernel(kind):
    kernel = quantize_kernel(draw(LAYERS, 256, 256, scale=0.05), kind)
    x = jnp.asarray(draw(2, 256))

    def kept(multiply):
        pull = jax.eval_shape(lambda x: jax.vjp(lambda x: run_stack(kernel, x, multiply), x)[1], x)
        return sum(s.size for s in jax.tree.leaves(pull) if jnp.issubdtype(s.dtype, jnp.floating) and s.size >= 256**2)

    assert kept(matmul) == 0
    assert kept(naive) >= LAYERS * 256**2


@both
@pytest.mark.usefixtures("full_compile")
def test_compiled_step_holds_few_float_layers_at_a_time(kind):
    kernel = quantize_kernel(draw(LAYERS, 256, 256, scale=0.05), kind)
    x = jnp.asarray(draw(2, 256))

    def temporary(multiply):
        grad = jax.jit(jax.grad(lambda x, kernel: run_stack(kernel, x, multiply)))
        return grad.lower(x, kernel).compile().memory_analysis().temp_size_in_bytes

    assert temporary(matmul) < 2.5 * 4 * 256**2 < LAYERS * 4 * 256**2 <= temporary(naive)


@both
def test_either_pass_expands_the_kernel_behind_a_barrier(kind):
    kernel, x = layer_of(stacked(kind), 0), draw(2, INPUTS)
    program = str(jax.make_jaxpr(jax.grad(lambda x: jnp.square(matmul(x, kernel)).sum()))(x))
    assert len(re.findall("= optimization_barrier", program)) == 2  # the CPU drops them: memory there tells nothing


@both
def test_rows_share_one_kernel_under_vmap(kind):
    kernel, x = layer_of(stacked(kind), 0), draw(5, 2, INPUTS)
    program = str(jax.make_jaxpr(jax.vmap(jax.grad(lambda x: jnp.square(matmul(x, kernel)).sum())))(x))
    sizes = [np.prod([int(n) for n in dims.split(",")]) for dims in re.findall(r"\w\[(\d[\d,]*)\]", program)]
    assert INPUTS * OUTPUTS <= max(sizes) < 2 * INPUTS * OUTPUTS


@both
def test_adapted_layer_takes_a_quantised_kernel_as_its_parameter(kind):
    x, kernel = draw(2, 3, 70), quantize_kernel(draw(70, 6), kind)
    pair = lora.Pair(draw(2, 70), draw(6, 2), 0.5)

    @jax.jit
    def grads(kernel):
        def loss(pair, x):
            return jnp.square(layers.Dense(6, use_bias=False).apply({"params": {"kernel": kernel}}, x, pair)).sum()

        return jax.value_and_grad(loss, (0, 1))(pair, x)

    expected = grads(dequantize(kernel))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-3), grads(kernel), expected)


@pytest.fixture(scope="module")
def model():
    return bert.Bert(bert.BertConfig(11, 16, 1, 2, 40, 8, 2, num_labels=3))


@pytest.fixture
def params(model):
    shapes = jax.eval_shape(model.init, jax.random.key(0))  # init itself would compile a forward pass
    return jax.tree.map(lambda shape: jnp.asarray(draw(*shape.shape, scale=0.2)), shapes)


def test_model_with_quantised_kernels_is_the_model_with_the_rounded_ones(model, params):
    small = quantized.quantize(params, model, "nf4")
    rounded = jax.tree.map(lambda p: dequantize(p) if is_quantized(p) else p, small, is_leaf=is_quantized)
    adapter = lora.init(jax.random.key(2), model, params, lora.LoraConfig(2, 4, ("q", "down")))
    adapter = jax.tree.map(lambda leaf: leaf + 0.1 * draw(*leaf.shape), adapter)
    batch = {"input_ids": np.arange(12).reshape(2, 6) % 11}

    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def grads(params):
        return jax.grad(lambda adapter: jnp.square(model.apply(params, batch, adapter)).sum())(adapter)

    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-3, rtol=1e-3), grads(small), grads(rounded))


def test_every_target_is_quantised_and_nothing_else(model, params):
    small = quantized.quantize(params, model, "int8")
    flat = jax.tree_util.tree_flatten_with_path(small, is_leaf=is_quantized)[0]
    changed = {tuple(key.key for key in path) for path, leaf in flat if is_quantized(leaf)}
    assert changed == {("layers", *target.path) for target in model.targets.values() if target.layered}
    assert params["layers"]["up"]["kernel"].shape == (1, 16, 40)
    before = dict(jax.tree_util.tree_flatten_with_path(params)[0])
    assert all(is_quantized(leaf) or before[path] is leaf for path, leaf in flat)


def test_donated_sources_are_freed_and_others_kept(model, params):
    quantized.quantize(params, model, "nf4")
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(params))
    quantized.quantize(params, model, "nf4", donate=True)
    deleted = [path for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0] if leaf.is_deleted()]
    assert len(deleted) == sum(target.layered for target in model.targets.values())


def test_sizes_of_a_large_base_are_known_without_making_it(model, params):
    planned = jax.eval_shape(lambda params: quantized.quantize(params, model, "nf4"), params)
    assert nbytes(planned) == nbytes(quantized.quantize(params, model, "nf4"))


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="unknown kind 'int5'"):
        quantize_kernel(draw(4, 4), "int5")
    with pytest.raises(ValueError, match=r"\[I, O\]"):
        quantize_kernel(draw(4), "int8")
    with pytest.raises(ValueError, match="2 layers came where 3 were announced"):
        quantized.quantize_layers(iter(draw(2, 4, 4)), 3, "int8")
