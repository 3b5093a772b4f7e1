"""LoRA adapters as pytrees: the trainable arrays, the product that they add, and how they move in and out of the base.

Letters: B rows, T tokens, L layers, I inputs, O outputs, R rank.

An adapter is a dict `{"layers": {target: Pair}, "head": {...}}`, either part of which may be missing. Its leaves are exactly
the arrays that are trained; a frozen A is not a leaf (`freeze_a` moves it into the base parameters).
"""

import dataclasses
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from dplora_jax.errors import InputWarning
from dplora_jax.per_row import EXACT, PerRow, linear

FROZEN = {"a": "lora_a", "b": "lora_b"}  # the keys of the base parameters under which frozen A and B matrices live
HEAD_DENSE = "head_dense"  # and the one of a dense layer that PEFT counts to the head, and that stays frozen here


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """What an adapter is: W + (alpha / rank) B A on every matrix named by `targets` (Hu et al. 2021, section 4.1).

    `targets` are a family's short names ("q", "v"), or ("all-linear",); empty means no matrix (a head alone).
    `last_layers` adapts only that many layers nearest the output (and what is named above them); None adapts all.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...] = ("q", "v")
    last_layers: int | None = None

    def __post_init__(self):
        if self.rank < 1:
            raise ValueError(f"rank must be 1 or more, not {self.rank}.")


@struct.dataclass
class Pair:
    """One adapted matrix, stacked over layers: a [L, R, I], b [L, O, R], each None when frozen; the scale is not a leaf. Where a
    core [L, R, R] is trained between the two (LoRA-XS, Balazy et al. 2024, arXiv 2405.17604), both are frozen."""

    a: Any
    b: Any
    scale: float = struct.field(pytree_node=False)
    core: Any = None


def product(x, pair):
    """The adapter's part of an adapted dense layer, scale * B A x: x [B, T, I] -> [B, T, O] (Hu et al. 2021, eq. 3); with a core,
    scale * B core A x."""
    inner = linear(x, pair.a)
    return pair.scale * linear(inner if pair.core is None else linear(inner, pair.core), pair.b)


def head(x, params):
    """A classification head on x [B, I] with `kernel` [I, O] and, where it has one, `bias` [O] -> logits [B, O] float32."""
    x = x.astype(jnp.float32)[:, None]
    kernel = jax.tree.map(lambda w: jnp.swapaxes(w, -1, -2) if w.ndim > 1 else w, params["kernel"])
    y = linear(x, kernel)
    if "bias" in params:
        y = y + linear(jnp.ones_like(x[..., :1]), _column(params["bias"]))
    return y[:, 0]


def _column(bias):
    """A bias [O] as the weight [O, 1] of a constant input."""
    if isinstance(bias, PerRow):
        return PerRow(bias.weight[:, None], bias.slot[..., None])
    return bias[:, None]


def groups(tree):
    """Which parts a tree like an adapter has: each adapted matrix of each layer (its A and B together), and the head ->
    (how many, the tree of each leaf's part: a slice of parts, one a layer, for a leaf stacked over layers, else a number).
    Every other tree's parts are its top-level ones."""
    first, count = {}, 0

    def part(path, leaf):
        nonlocal count
        stacked = path[:1] == (jax.tree_util.DictKey("layers"),)
        name, size = (path[:2], leaf.shape[0]) if stacked else (path[:1], 1)
        if name not in first:
            first[name], count = count, count + size
        return slice(first[name], first[name] + size) if stacked else first[name]

    parts = jax.tree_util.tree_map_with_path(part, tree)
    return count, parts


def init(key, model, params, config):
    """A fresh adapter for `model`: A uniform as PEFT draws it (Kaiming, a = sqrt(5)), B zero, the head as it stands.

    `key` is a JAX key; leaves are float32. A rank above a matrix's own size warns. Raises ValueError on unknown targets.
    """
    adapter = {}
    if config.targets:
        depth = model.config.num_layers if config.last_layers is None else config.last_layers
        if not 1 <= depth <= model.config.num_layers:
            raise ValueError(f"last_layers must lie in 1..{model.config.num_layers}, not {depth}.")
        adapter["layers"] = {}
        for index, (name, (inputs, outputs)) in enumerate(sorted(resolve_targets(model, config.targets).items())):
            if config.rank > min(inputs, outputs):
                warnings.warn(
                    f"rank {config.rank} exceeds {name}'s own {min(inputs, outputs)}: full rank costs less.",
                    InputWarning,
                    stacklevel=2,
                )
            bound, layers = inputs**-0.5, depth if model.targets[name].layered else 1
            a = jax.random.uniform(
                jax.random.fold_in(key, index), (layers, config.rank, inputs), jnp.float32, -bound, bound
            )
            b = jnp.zeros((layers, outputs, config.rank), jnp.float32)
            adapter["layers"][name] = Pair(a, b, config.alpha / config.rank)
    if "head" in params:
        adapter["head"] = jax.tree.map(lambda x: x.astype(jnp.float32), params["head"])
    if not adapter:
        raise ValueError("nothing to train: no targets, and the model has no classification head.")
    return adapter


def resolve_targets(model, targets):
    """The matrices that `targets` name in `model`, once each: {name: (inputs, outputs)}."""
    if tuple(targets) == ("all-linear",):
        return {name: target.shape for name, target in model.targets.items()}
    chosen = {}
    for name in targets:
        full = [t for t, target in model.targets.items() if name in (t, *target.aliases)]
        if not full:
            known = ", ".join(alias for target in model.targets.values() for alias in target.aliases)
            raise ValueError(f"unknown target {name!r}; this model has {known}, or all-linear.")
        chosen.update({t: model.targets[t].shape for t in full})
    return chosen


def freeze(params, adapter, letter):
    """Move every A (`letter` "a") or every B ("b") out of the adapter into the base parameters -> (params, adapter)."""
    if "layers" not in adapter:
        return params, adapter
    frozen = {name: getattr(pair, letter) for name, pair in adapter["layers"].items()}
    bare = {name: pair.replace(**{letter: None}) for name, pair in adapter["layers"].items()}
    return {**params, FROZEN[letter]: frozen}, {**adapter, "layers": bare}


def freeze_a(params, adapter):
    """`freeze` of every A, for the whole run (FFA-LoRA, Sun et al. 2024) -> (params, adapter)."""
    return freeze(params, adapter, "a")


def between(params, adapter, bases):
    """Put a core of zeros between an A and a B that are frozen: `bases` {target: (a [L, R, I], b [L, O, R])} -> (params,
    adapter)."""
    pairs = {name: adapter["layers"][name].replace(a=a, b=b) for name, (a, b) in bases.items()}
    for letter in FROZEN:
        params, adapter = freeze(params, {**adapter, "layers": pairs}, letter)
        pairs = adapter["layers"]
    cores = {name: jnp.zeros((len(a), a.shape[1], a.shape[1]), jnp.float32) for name, (a, _) in bases.items()}
    return params, {**adapter, "layers": {name: pair.replace(core=cores[name]) for name, pair in pairs.items()}}


def without_cores(adapter):
    """`adapter`, whole, with each core multiplied into its B, as files have it."""
    if "layers" not in adapter:
        return adapter

    def one(pair):
        if pair.core is None:
            return pair
        return pair.replace(b=jnp.einsum("lor,lrs->los", pair.b, pair.core, precision=EXACT), core=None)

    return {**adapter, "layers": {name: one(pair) for name, pair in adapter["layers"].items()}}


def with_frozen(params, adapter):
    """The adapter with the matrices that `freeze` moved into `params` put back, and the head with its frozen dense layer, for
    `apply` and for files."""
    if adapter is None:
        return adapter
    if "head" in adapter and HEAD_DENSE in params:
        dense = jax.tree.map(lambda x: x.astype(jnp.float32), params[HEAD_DENSE])  # as every leaf of an adapter
        adapter = {**adapter, "head": {"dense": dense, **adapter["head"]}}
    if "layers" not in adapter:
        return adapter
    pairs = dict(adapter["layers"])
    for letter in (letter for letter, key in FROZEN.items() if key in params):
        for name, pair in pairs.items():
            if getattr(pair, letter) is None:
                pairs[name] = pair.replace(**{letter: params[FROZEN[letter]][name]})
    return {**adapter, "layers": pairs}


def truncate(tree, rank):
    """A tree shaped like an adapter with its rank components from `rank` (int32, traced or not) on set to zero: rows of A,
    columns of B. An adapter cut so has no gradient in what was cut, since the one half's is a product with the other."""
    if "layers" not in tree:
        return tree
    kept = lambda size: jnp.arange(size) < rank  # noqa: E731

    def cut(pair):
        a = None if pair.a is None else jnp.where(kept(pair.a.shape[1])[:, None], pair.a, 0)
        b = None if pair.b is None else jnp.where(kept(pair.b.shape[2]), pair.b, 0)
        return pair.replace(a=a, b=b)

    return {**tree, "layers": {name: cut(pair) for name, pair in tree["layers"].items()}}


def merge(model, params, adapter, config):
    """Fold the adapter into the base: W + (alpha / rank) B A, and its head in the head's place -> params without adapter.

    `config` is the adapter's own LoraConfig; kernels keep their dtype. Raises ValueError where they are quantised: rounded
    again, they would lose much of what was learned.
    """
    adapter = without_cores(with_frozen(params, adapter))
    merged = {name: value for name, value in params.items() if name not in FROZEN.values()}
    if "head" in adapter:
        head, dtype = dict(adapter["head"]), params["head"]["kernel"].dtype
        dense = head.pop("dense", None)
        merged["head"] = jax.tree.map(lambda new, old: new.astype(old.dtype), head, params["head"])
        if dense is not None:
            merged[HEAD_DENSE] = jax.tree.map(lambda new: new.astype(dtype), dense)
    for name, pair in adapter.get("layers", {}).items():
        merged = _added(
            merged,
            model.targets[name],
            (pair.a, pair.b),
            lambda factors, scale=pair.scale: scale * jnp.einsum("or,ri->io", factors[1], factors[0], precision=EXACT),
        )
    return merged


def shifted(model, params, change):
    """`params` with `change` {target: [L, I, O]} added to the last L layers' kernels. ValueError where these are quantised."""
    for name, delta in change.items():
        params = _added(params, model.targets[name], delta, lambda x: x)
    return params


def _added(params, target, parts, delta):
    if target.layered:
        return {**params, "layers": _add_at(params["layers"], target.path, parts, delta)}
    return _add_at(params, target.path, parts, delta)


def _add_at(tree, path, parts, delta):
    """`tree` with `delta` of each layer's `parts` (a pytree of [L, ...]) added to the last layers of the kernel at `path`, in
    float32, a layer at a time; a kernel that is not stacked is one layer's."""
    if path:
        return {**tree, path[0]: _add_at(tree[path[0]], path[1:], parts, delta)}
    if not isinstance(tree, jax.Array | np.ndarray):
        raise ValueError("an adapter does not merge into quantised matrices: load the base unquantised.")
    kernels = jnp.asarray(tree) if tree.ndim == 3 else jnp.asarray(tree)[None]
    first = kernels.shape[0] - jax.tree.leaves(parts)[0].shape[0]

    def one(layer):
        kernel, pair = layer
        return (kernel.astype(jnp.float32) + delta(pair)).astype(kernel.dtype)

    return kernels.at[first:].set(jax.lax.map(one, (kernels[first:], parts))).reshape(tree.shape)


def count(tree):
    """How many numbers the leaves of `tree` hold: what a client sends each round, less its bytes a number."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))
