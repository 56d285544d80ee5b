"""fake_quantize(lm, scheme): a new model whose linear weights are rounded to the scheme's grid and stored back as
floating point, with the error of each matrix. The model given is untouched.

Only `Linear` weights are distorted: the matrices of the blocks. Embedding, head and norms stay as they are, and
are shared with the original, not copied.
"""

import zlib
from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from qsae_jax.errors import UserError
from qsae_jax.lm.layers import Linear
from qsae_jax.lm.model import LM
from qsae_jax.quant.control import matched_noise
from qsae_jax.quant.grid import Bounds, IntGrid, from_codes, to_codes
from qsae_jax.quant.scale import RULES
from qsae_jax.quant.scheme import Scheme, parse_scheme


@partial(jax.jit, static_argnames=("n_in", "group", "convention"))
def round_weight(w: Float[Array, "..."], b: Bounds, n_in: int, group: int, convention: str) -> Float[Array, "..."]:
    """A weight `[in..., out...]` rounded to a grid, in its own shape and dtype.

    The `n_in` leading dimensions, flattened in order, are the input features; a group is `group` consecutive inputs
    of one output channel. The last group of a channel may be shorter: it is padded with zeros, which change no
    largest magnitude and no range that includes zero.
    """
    n = int(np.prod(w.shape[:n_in]))
    x = w.astype(jnp.float32).reshape(n, -1).T
    out = x.shape[0]
    size = {0: n, -1: n * out}.get(group, group)
    x = x.reshape(1, 1, n * out) if group == -1 else jnp.pad(x, ((0, 0), (0, -n % size))).reshape(out, -1, size)
    scale, zero = RULES[convention](x, b)
    x = from_codes(to_codes(x, scale, zero, b), scale, zero)
    x = x.reshape(out, -1)[:, :n]
    return x.T.reshape(w.shape).astype(w.dtype)


def linear_weights(lm: LM) -> Iterator[tuple[str, Linear]]:
    """(path, weight) of every matrix that a scheme acts on, in a fixed order."""
    for path, leaf in nnx.to_flat_state(nnx.state(lm)):
        if isinstance(leaf, Linear):
            yield ".".join(map(str, path)), leaf


def fake_quantize(lm: LM, scheme: str | Scheme) -> LM:
    """A new LM with the scheme's distortion in its linear weights."""
    scheme = parse_scheme(scheme)
    graph, state = nnx.split(lm)
    bounds = IntGrid(scheme.bits or 8, scheme.convention).bounds()

    def distort(path: str, leaf: nnx.Variable) -> nnx.Variable:
        if not isinstance(leaf, Linear) or not scheme.bits:
            return leaf
        n_in = leaf.get_metadata()["n_in"]
        w = leaf.get_value()
        rounded = round_weight(w, bounds, n_in, scheme.group, scheme.convention)
        if scheme.noise:
            key = jax.random.fold_in(jax.random.key(scheme.draw), zlib.crc32(path.encode()))
            rounded = matched_noise(key, w, rounded)
        return leaf.replace(rounded)

    flat = list(nnx.to_flat_state(state))
    if scheme.group > 0:
        _check_group(flat, scheme)
    return nnx.merge(graph, nnx.from_flat_state([(k, distort(".".join(map(str, k)), v)) for k, v in flat]))


def _check_group(flat: list, scheme: Scheme) -> None:
    widest = max(int(np.prod(v.shape[: v.get_metadata()["n_in"]])) for _, v in flat if isinstance(v, Linear))
    if scheme.group > widest:
        raise UserError(f"scheme `{scheme}`: groups of {scheme.group} are wider than every matrix ({widest} inputs)")


@jax.jit
def _norms(w: Array, v: Array) -> tuple[Array, Array]:
    w, v = w.astype(jnp.float32), v.astype(jnp.float32)
    return jnp.sum((w - v) ** 2), jnp.sum(w**2)


def weight_errors(lm: LM, twin: LM) -> dict[str, float]:
    """Relative error `|W - W'| / |W|` (Frobenius) of each matrix, and of all together under `all`."""
    pairs = list(zip(linear_weights(lm), linear_weights(twin), strict=True))
    sums = [(path, [float(x) for x in _norms(a.get_value(), b.get_value())]) for (path, a), (_, b) in pairs]
    errors = {path: (e / w) ** 0.5 if w else 0.0 for path, (e, w) in sums}
    total = sum(w for _, (_, w) in sums)
    return errors | {"all": (sum(e for _, (e, _) in sums) / total) ** 0.5 if total else 0.0}
