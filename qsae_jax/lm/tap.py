"""Where to listen in a model, and how: points, capture, patch.

A model calls `x = tap(point, x)` at each of its points. Capturing, replacing, ablating and steering are closures
over that one argument. Under `jit`, returning only an activation makes XLA drop the later layers, and replacing an
activation makes it drop the earlier ones.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from qsae_jax.errors import UserError, nearest
from qsae_jax.lm.layers import GatedMLP, Linear
from qsae_jax.lm.model import LM, Block

SITES = (
    *("resid_pre", "attn.q", "attn.k", "attn.v", "attn.z", "attn_out", "resid_mid"),
    *("mlp.pre", "mlp.post", "mlp_out", "resid_post"),
)
ENDS = ("embed", "final")


@dataclass(frozen=True, order=True)
class Point:
    """A place in a model: a site of one block, or one of the two ends (`layer` is None).

    `attn.q|k|v` are before norms and rotary, `attn.z` the heads before the output matrix, `attn_out` and `mlp_out`
    what is added to the stream (after Gemma's second norm), `mlp.pre` the gate (`up` where there is none) before its
    activation function, `embed` the scaled embedding before learned positions, `final` the residual stream after the
    last norm. A model whose attention and mlp run in parallel has no `resid_mid`. Other points are as TransformerLens
    has them, without the `hook_`.
    """

    layer: int | None
    site: str

    def __str__(self) -> str:
        return self.site if self.layer is None else f"blocks.{self.layer}.{self.site}"

    @classmethod
    def parse(cls, text: "str | Point") -> "Point":
        """`blocks.8.resid_post`, or TransformerLens's `blocks.8.hook_resid_post`, `blocks.8.attn.hook_z`."""
        if isinstance(text, Point):
            return text
        name = text.replace("hook_", "")
        if name in ENDS:
            return cls(None, name)
        found = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
        if found and found[2] in SITES:
            return cls(int(found[1]), found[2])
        near = nearest(found[2] if found else name, SITES + ENDS)
        raise UserError(f"unknown point `{text}`: write blocks.LAYER.SITE, embed or final{near}")


def check_point(lm: LM, text: str | Point) -> Point:
    """The point, after making sure that this model has it."""
    point = Point.parse(text)
    if lm.config.parallel and point.site == "resid_mid":
        raise UserError(f"point `{point}`: attention and mlp run in parallel here, choose resid_pre or resid_post")
    if point.layer is not None and point.layer >= lm.config.n_layers:
        raise UserError(f"point `{point}`: the model has blocks 0 to {lm.config.n_layers - 1}, choose one of these")
    return point


def points(lm: LM) -> list[Point]:
    """Every point of a model, in the order of the data."""
    sites = [site for site in SITES if not (lm.config.parallel and site == "resid_mid")]
    inner = [Point(layer, site) for layer in range(lm.config.n_layers) for site in sites]
    return [Point(None, "embed"), *inner, Point(None, "final")]


FINAL = Point(None, "final")


@partial(jax.jit, static_argnums=1)
def activations(lm: LM, wanted: tuple[Point, ...], tokens: Int[Array, "b s"]) -> tuple[Array, ...]:
    """The activations at several points `[b, s, ...]`; layers after the last of them are not computed."""
    kept: dict[str, Array] = {}

    def tap(name: str, x: Array) -> Array:
        kept[name] = x
        return x

    lm.hidden(tokens, tap)
    return tuple(kept[str(point)] for point in wanted)


def capture(lm: LM, where: str | Point | Iterable[str | Point]) -> Callable[[Int[Array, "b s"]], Array | dict]:
    """A function from tokens `[b, s]` to the activations at one point `[b, s, ...]`, or to a dict for several,
    with the names that were given."""
    if isinstance(where, str | Point):
        one = check_point(lm, where)
        return lambda tokens: activations(lm, (one,), tokens)[0]
    names = tuple(where)
    many = tuple(check_point(lm, point) for point in names)
    return lambda tokens: dict(zip(names, activations(lm, many, tokens), strict=True))


def shapes_at(lm: LM, where: Sequence[Point]) -> list[tuple[int, ...]]:
    """The shape that a token has at each point: `(d,)`, or `(heads, width)`."""
    tokens = jax.ShapeDtypeStruct((1, 2), jax.numpy.int32)
    made = jax.eval_shape(lambda lm, tokens: activations(lm, tuple(where), tokens), lm, tokens)
    return [x.shape[2:] for x in made]


def width_at(lm: LM, point: Point) -> int:
    """How many numbers a token has at a point (heads and their widths counted together)."""
    return int(np.prod(shapes_at(lm, [point])[0]))


def weights_before(lm: LM, point: Point) -> int:
    """How many weights of linear maps the activations at a point are computed by: each is one multiplication and one
    addition for a token. The embedding is looked up."""
    if point.site == "embed":
        return 0
    parts: list[Any] = list(lm.blocks if point.layer is None else lm.blocks[: point.layer])
    if point.layer is not None:
        parts += _parts_before(lm.blocks[point.layer], point.site, lm.config.parallel)
    leaves = jax.tree.leaves(parts, is_leaf=lambda x: isinstance(x, nnx.Variable))
    return sum(leaf.get_value().size for leaf in leaves if isinstance(leaf, Linear))


def _parts_before(block: Block, site: str, parallel: bool) -> list[Any]:
    """What runs in a block before a site. In a parallel block the mlp does not wait for attention."""
    attn, mlp = block.attn, block.mlp
    first = mlp.gate if isinstance(mlp, GatedMLP) else mlp.up
    ready = [] if parallel else [attn]
    if site.startswith("attn.") and site != "attn.z":
        return [getattr(attn, site[-1])]
    before = {"resid_pre": [], "attn.z": [attn.q, attn.k, attn.v], "attn_out": [attn], "resid_mid": [attn]}
    before |= {"mlp.pre": [*ready, first], "mlp.post": [*ready, first, *([] if first is mlp.up else [mlp.up])]}
    return (before | {"mlp_out": [*ready, mlp], "resid_post": [attn, mlp]})[site]


@partial(jax.jit, static_argnums=1)
def resume(lm: LM, point: Point, tokens: Int[Array, "b s"], x: Float[Array, "b s ..."]) -> Float[Array, "b s d"]:
    """The activations at `final` when those at `point` are x: only the layers after the point are computed."""
    return lm.hidden(tokens, lambda name, y: x.reshape(y.shape).astype(y.dtype) if name == str(point) else y)


def patch(
    lm: LM, edits: Mapping[str | Point, Callable[[Array], Array]]
) -> Callable[[Int[Array, "b s"]], Float[Array, "b s vocab"]]:
    """A function from tokens to logits in which each named activation `x` is replaced by `edits[point](x)`, of the
    same shape and cast to the same dtype."""
    at = {str(check_point(lm, point)): edit for point, edit in edits.items()}
    if len(at) < len(edits):
        raise UserError("patch: two names of one point among the edits: give one function for it")
    return lambda tokens: lm(tokens, lambda name, x: _replaced(name, x, at[name](x)) if name in at else x)


def _replaced(name: str, x: Array, y: Array) -> Array:
    """What an edit gives in place of x. Integers left as such would make the whole stream after them integer."""
    if (shape := getattr(y, "shape", None)) != x.shape:
        raise UserError(f"patch: the function at `{name}` gives shape {shape} in place of {x.shape}: keep the shape")
    return jax.numpy.asarray(y, x.dtype)
