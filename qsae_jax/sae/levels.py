"""From codes to what each level of a dictionary adds to the reconstruction: by lists of codes, on one device or on
every device of a mesh, and by dense products, the form that both are equal to.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float

from qsae_jax.mesh import AXES
from qsae_jax.products import Product
from qsae_jax.sae import loss
from qsae_jax.sae.model import SAE
from qsae_jax.sae.select import nth_largest
from qsae_jax.sae.settings import SAEConfig
from qsae_jax.sae.sharded import BatchPart, divides, part
from qsae_jax.sae.sparse import Codes, decode_chosen, encode_chosen
from qsae_jax.sae.sparsity import BatchTopK, TopK


def edges(config: SAEConfig, m: int) -> list[int]:
    """Where the levels of a dictionary end; of one that is no Matryoshka there is one."""
    if config.sparsity != "matryoshka":
        return [m]
    ends, total = [], 0.0
    for share in config.groups[:-1]:
        total += share
        ends.append(round(total * m))
    return [*ends, m]


class Levels(NamedTuple):
    """What the latents of each level add to the reconstruction `[b, levels, d]`, and who fired."""

    added: Float[Array, "b g d"]
    fired: Float[Array, "m"]
    least: Float[Array, "m"]


MakesLevels = Callable[[SAEConfig, SAE, Array, Array, Product], Levels]
"""`(config, sae, x, rise, product)`; `rise` goes from 0 to 1 while sparsity warms up."""


def levels_for(mesh: Mesh) -> MakesLevels:
    """The fast way on a mesh."""
    return partial(levels_on_mesh, mesh) if mesh.size > 1 else levels_of_list


def _thinned(codes: Array, config: SAEConfig, rise: Array, rows: int, over: tuple[str, ...] = ()) -> Array:
    """The codes that are left while k falls from its first value: `codes` are rows (topk) or one list (batchtopk), of
    which devices of the mesh axes `over` hold parts."""
    if not config.k_first:
        return codes
    k = config.k_first + (config.k - config.k_first) * rise
    each = config.sparsity == "topk"
    n = jnp.floor(k if each else k * rows).astype(jnp.int32)
    cut = nth_largest(jax.lax.stop_gradient(codes), n, axis=-1 if each else None, over=over)
    return jnp.where(codes >= cut, codes, 0)


def _of_codes(codes: Codes, W_dec: Float[Array, "m d"], ends: Float[Array, "g"], b: int) -> Levels:
    """What a list of codes of b rows adds, by gathered rows; `ends` are those of the levels among these m latents."""
    m = len(W_dec)
    to = codes.row * len(ends) + jnp.searchsorted(ends, codes.latent, side="right").astype(jnp.int32)
    added = decode_chosen(codes, W_dec, b * len(ends), to).reshape(b, len(ends), -1)
    value = jax.lax.stop_gradient(codes.value)
    fired = jnp.zeros(m).at[codes.latent].add((value > 0).astype(value.dtype))
    some = jnp.where(value > 0, value, jnp.inf)
    return Levels(added, fired, jnp.full(m, jnp.inf).at[codes.latent].min(some))


def levels_of_list(config: SAEConfig, sae: SAE, x: Array, rise: Array, product: Product) -> Levels:
    """On one device."""
    sparsity = sae.sparsity
    assert isinstance(sparsity, TopK | BatchTopK)
    read, bias = loss.reading(sae, x)
    codes, b = encode_chosen(read, sae.encoder[...], bias, sparsity, product), len(x)
    value = codes.value.reshape(b, -1) if isinstance(sparsity, TopK) else codes.value
    codes = codes._replace(value=_thinned(value, config, rise, b).reshape(-1))
    return _of_codes(codes, sae.W_dec[...], jnp.asarray(edges(config, sae.latents)), b)


def levels_by_products(config: SAEConfig, sae: SAE, x: Array, rise: Array, product: Product) -> Levels:
    """By dense products, which a compiler cuts for any mesh."""
    codes = sae.sparsity(loss.pre_activations(sae, x, product))
    codes = _thinned(codes, config, rise, len(x))
    ends = edges(config, sae.latents)
    parts = zip([0, *ends[:-1]], ends, strict=True)
    added = jnp.stack([product(codes[:, i:j], sae.W_dec[...][i:j]) for i, j in parts], axis=1)
    still = jax.lax.stop_gradient(codes)
    least = jnp.min(jnp.where(still > 0, still, jnp.inf), axis=0)
    return Levels(added, jnp.sum(still > 0, axis=0).astype(x.dtype), least)


def levels_on_mesh(mesh: Mesh, config: SAEConfig, sae: SAE, x: Array, rise: Array, product: Product) -> Levels:
    """On a mesh: every device makes the list of its own rows and latents, and what they add is summed over `model`.
    Where a device has no room for its share of a batch's codes, or rows and latents do not divide, by products."""
    sparsity = sae.sparsity
    assert isinstance(sparsity, TopK | BatchTopK)
    if not divides(len(x), sae.latents, mesh):
        return levels_by_products(config, sae, x, rise, product)
    each = isinstance(sparsity, TopK)
    own = part(sparsity.k, each, len(x), sae.latents, mesh)
    b, m, ends = len(x) // mesh.shape["data"], sae.latents // mesh.shape["model"], edges(config, sae.latents)

    def local(read: Array, rows: Array, bias: Array, W_dec: Array, rise: Array) -> tuple[Array, ...]:
        codes = encode_chosen(read, rows, bias, own, product)
        full = own.full(codes.value) if isinstance(own, BatchPart) else jnp.zeros((), bool)
        value = codes.value.reshape(b, -1) if each else codes.value
        value = _thinned(value, config, rise, len(x), ("model",) if each else AXES).reshape(-1)
        here = jnp.asarray(ends) - jax.lax.axis_index("model") * m
        added, fired, least = _of_codes(codes._replace(value=value), W_dec, here, b)
        fired, least = jax.lax.psum(fired, "data"), jax.lax.pmin(least, "data")
        return jax.lax.psum(added, "model"), fired, least, full

    data, model, all_have = PartitionSpec("data"), PartitionSpec("model"), PartitionSpec()
    cut = jax.shard_map(local, mesh=mesh, in_specs=(data, model, model, model, all_have),
                        out_specs=(data, model, model, all_have), check_vma=False)  # fmt: skip
    read, bias = loss.reading(sae, x)
    *found, full = cut(read, sae.encoder[...], bias, sae.W_dec[...], rise)
    if not isinstance(own, BatchPart) or own.room == own.n:
        return Levels(*found)
    dense = jax.checkpoint(partial(levels_by_products, config, product=product))
    return jax.lax.cond(full, lambda: dense(sae, x, rise), lambda: Levels(*found))
