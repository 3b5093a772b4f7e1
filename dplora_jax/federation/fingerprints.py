"""SHA-256 of what a run works with, so that a resumed run, or another process, can say that its own is another.

Digests of records are to be keyed before they are shown: a plain one would tell who is in.
"""

import hashlib
import importlib.metadata
import pathlib

import jax
import numpy as np

import dplora_jax

LIBRARIES = ("jax", "jaxlib", "flax", "optax", "numpy", "jax_privacy")


def digest_arrays(tree):
    """SHA-256 of the leaves' places, shapes, types and bytes."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree.leaves_with_path(tree):
        array = np.ascontiguousarray(leaf)
        digest.update(repr((jax.tree_util.keystr(path), array.shape, str(array.dtype))).encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.digest()


def remembered(memo, named, tree, make):
    """`make()`, which depends on the arrays of `tree` and on what `named` says, and on nothing else; `memo` (a dict, or None)
    keeps it for the next call with both the same."""
    if memo is None:
        return make()
    key = (named, digest_arrays(tree))
    if key not in memo:
        memo[key] = make()
    return memo[key]


def digest_base(model, params):
    """SHA-256 of a model's config and parameters."""
    return hashlib.sha256(repr((model.config, digest_arrays(params))).encode()).digest()


def digest_installation():
    """SHA-256 of this program's code and the versions of its libraries: processes of one run must have the same."""
    digest = hashlib.sha256(repr([importlib.metadata.version(name) for name in LIBRARIES]).encode())
    for package in (dplora_jax,):
        for path in sorted(pathlib.Path(package.__file__).parent.rglob("*.py")):
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.digest()
