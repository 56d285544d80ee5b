"""fake_quantize(lm, scheme): a new model whose weights are distorted as the scheme says and stored back as floating
point, with the error of each matrix. The model given is untouched.

Only what a rule of the scheme takes is distorted; the rest is shared with the original, not copied. Gradients pass
through as if nothing had been rounded, so that a model can be trained through its quantizer.
"""

import zlib
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from qsae_jax.errors import UserError
from qsae_jax.hosts import here
from qsae_jax.lm.layers import Linear
from qsae_jax.lm.model import LM
from qsae_jax.mesh import put
from qsae_jax.quant.codebook import Lookup
from qsae_jax.quant.control import Matched
from qsae_jax.quant.ggml import Ggml, kept_as
from qsae_jax.quant.group import CHANNEL, DUAN2026, Groups
from qsae_jax.quant.how import How
from qsae_jax.quant.mx import Blocks
from qsae_jax.quant.rounding import straight_through
from qsae_jax.quant.scaled import Scaled
from qsae_jax.quant.scheme import Scheme, parse_scheme
from qsae_jax.quant.where import OUTSIDE, check_used


@partial(jax.jit, static_argnames=("form", "n_in"))
def _distorted(w: Float[Array, "..."], numbers: Any, seed: Any, form: How, n_in: int) -> tuple[Array, Array]:
    """The distorted weight, and whether it is finite: looked at here, where it is at hand."""
    key = jax.random.fold_in(jax.random.key(seed[0]), seed[1])
    matrix, back = _as_matrix(jax.lax.stop_gradient(w).astype(jnp.float32), form, n_in)
    made = straight_through(w, back(form.round(matrix, numbers, key)).astype(w.dtype))
    # Of what was made: what is not finite before is not finite after. By columns first, which the compiler makes
    # vectors of; NaN passes through a maximum.
    return made, jnp.max(jnp.max(jnp.abs(made.reshape(matrix.shape)), axis=0)) < jnp.inf


def _as_matrix(w: Array, form: How, n_in: int) -> tuple[Array, Any]:
    """`[inputs, outputs]`, and the way back. `n_in` leading dimensions are the inputs, flattened in order; 0 is a
    matrix of rows as it stands in a file, `[outputs, inputs]`."""
    if not n_in:
        return w.T, lambda x: x.T
    if getattr(_base(form), "groups", None) == DUAN2026 and n_in == 1 and w.ndim == 3:
        d, h, k = w.shape
        return w.reshape(d * h, k), lambda x: x.reshape(d, h, k)
    n = int(np.prod(w.shape[:n_in]))
    return w.reshape(n, -1), lambda x: x.reshape(w.shape)


def _base(how: How) -> Any:
    """The quantizer whose errors a control takes; anything else itself."""
    return getattr(how, "of", how)


def round_weight(w: Float[Array, "..."], how: How, n_in: int = 1, path: str = "") -> Float[Array, "..."]:
    """A weight `[in..., out...]` distorted, in its own shape and dtype. Its path and the draw seed what is random."""
    return _rounded(w, how, n_in, path)[0]


def _rounded(w: Array, how: How, n_in: int, path: str) -> tuple[Array, Array]:
    seed = np.uint32(how.draw), np.uint32(zlib.crc32(path.encode()))
    return _distorted(w, how.numbers(), seed, form=how.form(), n_in=n_in)


def _round_leaf(path: str, leaf: nnx.Variable, how: How) -> tuple[nnx.Variable, Array]:
    """On a mesh every device rounds the whole matrix: sums then run in one order, and codes are the same everywhere."""
    w, n_in = leaf.get_value(), leaf.get_metadata().get("n_in", 0)
    at = None if isinstance(w, Tracer) else w.sharding
    if isinstance(at, NamedSharding) and at.mesh.size > 1:
        made, finite = _rounded(put(w, NamedSharding(at.mesh, PartitionSpec())), how, n_in, path)
        return leaf.replace(put(made, at)), finite
    made, finite = _rounded(w, how, n_in, path)
    return leaf.replace(made), finite


def linear_weights(lm: LM) -> Iterator[tuple[str, Linear]]:
    """(path, weight) of every matrix of the blocks, in a fixed order."""
    for path, leaf in nnx.to_flat_state(nnx.state(lm)):
        if isinstance(leaf, Linear):
            yield ".".join(map(str, path)), leaf


def weights(lm: LM) -> dict[str, nnx.Variable]:
    """What a scheme may take: the matrices of the blocks, embedding and head."""
    return _takable(nnx.state(lm))


def _takable(state: nnx.State) -> dict[str, nnx.Variable]:
    named = {".".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(state)}
    return {path: leaf for path, leaf in named.items() if isinstance(leaf, Linear) or path in OUTSIDE}


def assigned(weights: Iterable[str], scheme: Scheme) -> dict[str, How]:
    """Path of a weight -> what is done to it: the first rule that takes it decides. A rule that none falls to, and
    a control that is still to be matched, are refused."""
    if scheme.matched:
        raise UserError(f"scheme `{scheme}` is found by perplexity, on the tokens of an audit: run qsae audit with it")
    paths, found = list(weights), {}
    for rule in scheme.rules:
        fresh = [path for path in paths if rule.where.takes(path) and path not in found]
        check_used(scheme, rule.where, len(fresh), paths)
        found |= dict.fromkeys(fresh, rule.how)
    return {path: how for path, how in found.items() if how is not None and not isinstance(how, Matched)}


def fake_quantize(lm: LM, scheme: str | Scheme) -> LM:
    """A new LM with the scheme's distortion in its weights. Weights that are not finite are refused."""
    scheme = parse_scheme(scheme)
    graph, state = nnx.split(lm)
    leaves = _takable(state)
    chosen = _fitting(leaves, scheme)
    made = {path: _round_leaf(path, leaves[path], how) for path, how in chosen.items()}
    _check_finite({path: finite for path, (_, finite) in made.items()})
    flat = [(path, made.get(".".join(map(str, path)), (leaf,))[0]) for path, leaf in nnx.to_flat_state(state)]
    return nnx.merge(graph, nnx.from_flat_state(flat))


def _inputs(leaf: nnx.Variable) -> int:
    n_in = leaf.get_metadata().get("n_in", 0)
    return int(np.prod(leaf.shape[:n_in])) if n_in else leaf.shape[1]


def _fitting(leaves: dict[str, nnx.Variable], scheme: Scheme) -> dict[str, How]:
    """`assigned`, where every group fits into some matrix."""
    chosen, widest = assigned(leaves, scheme), {}
    for path, how in chosen.items():
        widest[_base(how)] = max(widest.get(_base(how), 0), _inputs(leaves[path]))
    for base, n in widest.items():
        if isinstance(base, Scaled) and base.groups.inputs > n:
            size = base.groups.inputs
            raise UserError(f"scheme `{scheme}`: groups of {size} are wider than every matrix ({n} inputs)")
    return chosen


def _check_finite(flags: dict[str, Array]) -> None:
    """Refuse infinities and NaN, which would spread over their group. Under a trace there is nothing to look at."""
    flags = {path: flag for path, flag in flags.items() if not isinstance(flag, Tracer)}
    if bad := [path for path, flag in here(flags).items() if not flag]:
        raise UserError(
            f"weight `{bad[0]}` holds infinities or NaN, or numbers too large, {len(bad)} do: mend the files"
        )


def departures(lm: LM, scheme: str | Scheme) -> list[str]:
    """Where the sizes of a model make a scheme do something else than its name says, in sentences. A scheme that the
    model has no weights for is refused, as `fake_quantize` would."""
    scheme = parse_scheme(scheme)
    if scheme.matched:
        scheme = scheme.with_how(scheme.matched.of)
    leaves, told = weights(lm), {}
    chosen = _fitting(leaves, scheme)
    for path, how in chosen.items():
        for what in _remarks(_base(how), (n := _inputs(leaves[path]), leaves[path].size // n)):
            told.setdefault(what, []).append(path)
    return [f"{scheme}: {what} ({len(paths)} matrices)" for what, paths in told.items()]


def _remarks(base: How, shape: tuple[int, int]) -> Iterator[str]:
    """What the size of a matrix `[inputs, outputs]` makes of a quantizer."""
    n, o = shape
    if isinstance(base, Ggml) and (kind := kept_as(base.name, n)) != base.name:
        yield f"rows of {n} are kept as {kind}, as llama.cpp does where {base} does not fit"
    if isinstance(base, Lookup) and n % base.block:
        yield f"blocks of {base.block} run on from a row of {n} to the next, as bitsandbytes has them"
    groups = base.groups if isinstance(base, Scaled) else Groups(base.size) if isinstance(base, Blocks) else CHANNEL
    rows, columns = groups.rest(shape)
    if columns:
        yield f"of {o} outputs the last block has {columns} of {groups.outputs}"
    if rows:
        yield f"in rows of {n} the last group has {rows} of {groups.inputs} weights"


@jax.jit
def _norms(w: Array, v: Array) -> tuple[Array, Array]:
    w, v = w.astype(jnp.float32), v.astype(jnp.float32)
    return jnp.sum((w - v) ** 2), jnp.sum(w**2)


def weight_errors(lm: LM, twin: LM) -> dict[str, float]:
    """Relative error `|W - W'| / |W|` (Frobenius) of each matrix of the blocks, and of embedding and head where they
    were touched; and of all of these together under `all`."""
    after = weights(twin)
    pairs = {path: (a.get_value(), after[path].get_value()) for path, a in weights(lm).items()}
    sums = here({path: _norms(a, b) for path, (a, b) in pairs.items() if path not in OUTSIDE or a is not b})
    errors = {path: float(e / w) ** 0.5 if w else 0.0 for path, (e, w) in sums.items()}
    total = sum(float(w) for _, w in sums.values())
    return errors | {"all": (sum(float(e) for e, _ in sums.values()) / total) ** 0.5 if total else 0.0}
