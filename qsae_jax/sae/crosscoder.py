"""A crosscoder over twins: one dictionary over the activations of several models side by side (Lindsey et al. 2024).

Its d is the twins' widths one after the other, so it is an SAE and trains as one; what differs is the penalty, where a
latent weighs the sum of its decoder parts' norms (`make_objective(twins=)`). Here is what tells shared latents from
those of one model. Twins that differ by quantization are almost the same: judge each figure beside that of a control
(noise of matched size, another seed), never alone.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from qsae_jax.hosts import here
from qsae_jax.products import matmul
from qsae_jax.sae.model import SAE


def parts_of(sae: SAE, twins: int) -> Float[Array, "twins m d"]:
    """The decoder rows of each twin."""
    return jnp.moveaxis(sae.W_dec[...].reshape(sae.latents, twins, -1), 1, 0)


def relative_norms(sae: SAE, twins: int = 2) -> Float[Array, "twins m"]:
    """The length of a latent's decoder row in each twin, over the longest of them: 1 and 1 is shared, 1 and 0 belongs
    to the first (Lindsey et al. 2024). The L1 penalty drives these apart where it need not: see `Scaling`."""
    lengths = jnp.linalg.norm(parts_of(sae, twins), axis=-1)
    return lengths / jnp.maximum(jnp.max(lengths, axis=0, keepdims=True), 1e-12)


class Scaling(NamedTuple):
    """Sums for latent scaling (Minder et al. 2025, arXiv 2504.02922), over tokens: memory does not grow with them.

    For each latent and twin, `beta = argmin sum_t |y_t - beta f_t d|^2 = sum f (y . d) / (sum f^2 |d|^2)`, y being what
    the twin's other latents leave of its activation and d the latent's row in its home, the twin where it is longest.
    A latent that a twin has as well has nearly the same beta there; one that it lacks has a beta near 0."""

    along: Float[Array, "twins m"]
    squares: Float[Array, "m"]

    @staticmethod
    def empty(sae: SAE, twins: int = 2) -> "Scaling":
        return Scaling(jnp.zeros((twins, sae.latents)), jnp.zeros(sae.latents))

    def add(self, sae: SAE, x: Float[Array, "b d"]) -> "Scaling":
        """The sums with a batch of activations, twins side by side, added."""
        codes, twins = sae.encode(x), len(self.along)
        error = (x.astype(jnp.float32) - sae.decode(codes)).reshape(len(x), twins, -1)
        parts, own, squares = parts_of(sae, twins), home(sae, twins), jnp.sum(codes**2, axis=0)
        along = []
        for twin in range(twins):
            # y = error + f d_twin: the first part by one product, the second by the rows' inner products.
            left = jnp.sum(matmul(codes.T, error[:, twin]) * own, axis=-1)
            along.append(left + squares * jnp.sum(parts[twin] * own, axis=-1))
        return Scaling(self.along + jnp.stack(along), self.squares + squares)

    def betas(self, sae: SAE) -> Float[Array, "twins m"]:
        """The least-squares scale of each latent in each twin; NaN for a latent that never fired."""
        lengths = jnp.sum(home(sae, len(self.along)) ** 2, axis=-1)
        return self.along / (self.squares * lengths)[None]


def home(sae: SAE, twins: int) -> Float[Array, "m d"]:
    """Each latent's decoder row in the twin where it is longest."""
    parts = parts_of(sae, twins)
    longest = jnp.argmax(jnp.linalg.norm(parts, axis=-1), axis=0)
    return jnp.take_along_axis(parts, longest[None, :, None], axis=0)[0]


def told_apart(sae: SAE, batches: Iterable[Float[Array, "b d"]], names: Sequence[str]) -> dict[str, np.ndarray]:
    """A row for each latent: how often it fired on these batches, and for each twin its `relative_norm` and `beta`."""
    add = jax.jit(lambda sae, sums, x: sums.add(sae, x))
    fired = jax.jit(lambda sae, x: jnp.sum(sae.encode(x) > 0, axis=0))
    sums, counts, n = Scaling.empty(sae, len(names)), np.zeros(sae.latents), 0
    for x in batches:
        sums, counts, n = add(sae, sums, x), counts + np.asarray(here(fired(sae, x))), n + len(x)
    norms, betas = (np.asarray(here(x)) for x in (relative_norms(sae, len(names)), sums.betas(sae)))
    columns = {"feature": np.arange(sae.latents), "firing_rate": counts / max(n, 1)}
    columns |= {f"relative_norm {name}": norms[i] for i, name in enumerate(names)}
    return columns | {f"beta {name}": betas[i] for i, name in enumerate(names)}


LONE = 0.3
"""A twin has a latent of its own where no other twin's scale is above this share of its own."""


def tally(columns: Mapping[str, np.ndarray], names: Sequence[str]) -> dict[str, int]:
    """How many of the latents that fired are one twin's alone, by its name, and how many are `shared`, from what
    `told_apart` gives. Twins of one model share nearly all latents, and a handful of rare ones look lone by chance."""
    betas = np.stack([columns[f"beta {name}"] for name in names])
    seen = np.isfinite(betas).all(0)
    lone = {
        name: int(np.sum(seen & (np.delete(np.abs(betas), i, 0).max(0) < LONE * np.abs(betas[i]))))
        for i, name in enumerate(names)
    }
    return lone | {"shared": int(seen.sum()) - sum(lone.values())}
