"""An adapter as one flat float32 vector, in the order of its leaves, and back."""

import math

import jax
import numpy as np


def layout(adapter):
    """What a plan says of an adapter: the name and shape of each leaf, in order."""
    return [
        {
            "name": "/".join(str(getattr(key, "key", getattr(key, "name", key))) for key in path),
            "shape": list(leaf.shape),
        }
        for path, leaf in jax.tree.leaves_with_path(adapter)
    ]


def flat(tree):
    """All numbers of `tree` in one vector [D]."""
    return np.concatenate([np.asarray(leaf).reshape(-1) for leaf in jax.tree.leaves(tree)])


def tree(vector, like):
    """The numbers of `vector` [D] in a tree like `like`."""
    leaves, treedef = jax.tree.flatten(like)
    ends = np.cumsum([math.prod(leaf.shape) for leaf in leaves])
    parts = np.split(vector, ends[:-1])
    return treedef.unflatten([part.reshape(leaf.shape) for part, leaf in zip(parts, leaves, strict=True)])
