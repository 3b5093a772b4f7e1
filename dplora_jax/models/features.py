"""Features of a classifier, centred and scaled by public text, so that its head learns more from each clipped gradient.

The gradient of a head W h + b is the error times (h, 1). Where all texts share much of h, and the constant 1 is as long as h,
most of a clipped gradient says no more than which label is common. With (h - center) * scale in place of h, it tells texts apart.
What is trained is another head for the same functions; `outward` says it as one on h, for files.
"""

import jax.numpy as jnp
import numpy as np

KEY = "measured"  # of a base's params: what public text told of it
BASES = "bases"  # of that: A and B for each adapted matrix (`public_bases`)


def prepared(pooled, params):
    """`pooled` [B, D] float32 as the head of `params` takes it: centred and scaled where `measure` says so, else as it is."""
    if "center" not in params.get(KEY, {}):
        return pooled
    return (pooled - params[KEY]["center"]) * params[KEY]["scale"]


def measure(pooled, norm):
    """{"center": [D], "scale": []} float32 of public rows' features, `pooled` [N, D]: (pooled - center) * scale has mean 0 and
    root-mean-square norm `norm`. Raises ValueError where all rows are alike."""
    center = pooled.mean(0, dtype=np.float64)
    spread = np.sqrt(np.square(pooled - center).sum(1).mean())
    if not spread > 1e-6 * max(1.0, np.linalg.norm(center)):
        raise ValueError("the public rows' features are all alike: there is nothing to scale.")
    return {"center": center.astype(np.float32), "scale": np.float32(norm / spread)}


def inward(head, normalisation):
    """The head {"kernel" [D, O], "bias" [O]} that is to prepared features what `head` is to plain ones."""
    kernel = jnp.asarray(head["kernel"], jnp.float32)
    return {"kernel": kernel / normalisation["scale"], "bias": head["bias"] + normalisation["center"] @ kernel}


def outward(head, normalisation):
    """The head on plain features that is what `head` is on prepared ones."""
    kernel = head["kernel"] * normalisation["scale"]
    return {**head, "kernel": kernel, "bias": head["bias"] - normalisation["center"] @ kernel}
