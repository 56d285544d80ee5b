"""The worst tokens: for chosen features, where the two runs differ most and where the feature is strongest.

A number such as r says how much of a feature is left; what it is, and which part of it is lost, is read from the text
around the tokens on which it fires (top activating examples: Bricken et al. 2023, "Towards Monosemanticity"). With z
the feature's value at full precision and z' that in the twin, tokens are ranked by

    peak    max(z, z')      where the feature is strongest, in either run
    gap     |z - z'|        where quantization changes it most

A window gives each ranking at most one token, its best, so that no two contexts are the same text. Of equal tokens the
earlier is taken. Both models run only up to the point, and only the contexts that are best so far are kept: memory
does not grow with the number of tokens.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Float32, Int, Int32

from qsae_jax.acts.tokens import Windows, check_windows, in_order, windows_per_forward
from qsae_jax.errors import Interrupted, UserError
from qsae_jax.hosts import here
from qsae_jax.lm.model import LM
from qsae_jax.lm.tap import Point, activations, check_point, width_at
from qsae_jax.lm.tokenizer import TextTokenizer
from qsae_jax.mesh import from_chunks, in_chunks, on_data
from qsae_jax.progress import Advance
from qsae_jax.sae.model import SAE, check_width

ROWS = 128
"""Rows whose codes of every latent, or logits of every word, are alive at a time."""
DIGITS = 5
"""Significant digits of a value in a result: contexts are read, not calculated with."""
Made = TypeVar("Made")


def contexts(
    lm: LM,
    twin: LM,
    sae: SAE,
    windows: Windows,
    point: str | Point,
    features: Sequence[int],
    *,
    mesh: Mesh,
    top: int = 3,
    around: int = 12,
    skip_first: int = 1,
    batch: int = 0,
    stopped: Callable[[], bool] = lambda: False,
    advance: Advance | None = None,
) -> list[dict[str, Any]]:
    """For each feature `{"feature", "peak": [...], "gap": [...]}`, at most `top` contexts each, the best first.

    A context is the `window` and the `position` of the token, and the ids and both runs' values (`fp`, `twin`) of the
    tokens from `start`, up to `around` on each side of it. Positions before `skip_first` are shown but not ranked."""
    point = checked(lm, sae, windows, point, features, skip_first)
    best: dict[str, Best[dict[str, Any]]] = {name: Best(top, len(features)) for name in ("peak", "gap")}
    passed = followed([lm, twin], sae, windows, point, features, batch, mesh, stopped, advance)
    for first, ids, (z, q) in passed:
        for name, score in (("peak", np.maximum(z, q)), ("gap", np.abs(z - q))):
            ranked = score[:, skip_first:]
            at = ranked.argmax(axis=1) + skip_first
            best[name].add(ranked.max(axis=1), partial(_context, first, ids, z, q, at, around))
    return [
        {"feature": int(feature)} | {name: [context for _, context in one.kept[i]] for name, one in best.items()}
        for i, feature in enumerate(features)
    ]


def with_text(found: Sequence[dict[str, Any]], tokenizer: TextTokenizer) -> list[dict[str, Any]]:
    """The same with `text` in every context: a string for each of its tokens, white space as it is."""
    names: dict[int, str] = {}

    def told(context: dict[str, Any]) -> dict[str, Any]:
        for i in context["ids"]:
            if i not in names:
                names[i] = _text(i, tokenizer)
        return context | {"text": [names[i] for i in context["ids"]]}

    return [one | {name: [told(context) for context in one[name]] for name in ("peak", "gap")} for one in found]


def _text(token: int, tokenizer: TextTokenizer) -> str:
    """What a token writes within a text: the second of two. The first loses its space with SentencePiece's decoders,
    and every word would look like the middle of one."""
    return tokenizer.decode([token, token])[len(tokenizer.decode([token])) :]


def checked(lm: LM, sae: SAE, windows: Windows, point: str | Point, features: Sequence[int], skip_first: int) -> Point:
    """The point, after making sure that model, dictionary, windows and features go together."""
    point = check_point(lm, point)
    check_width(sae, width_at(lm, point), str(point))
    check_windows(windows, skip_first, lm.config.context)
    for feature in features:
        if not 0 <= feature < sae.latents:
            raise UserError(f"feature {feature}: the dictionary has 0 to {sae.latents - 1}, choose one of these")
    return point


@dataclass
class Best(Generic[Made]):
    """The `top` windows with the largest scores, and what was made of each, for every feature."""

    top: int
    features: int
    kept: list[list[tuple[float, Made]]] = field(init=False)

    def __post_init__(self) -> None:
        self.kept = [[] for _ in range(self.features)]

    def add(self, scores: Float[np.ndarray, "b f"], make: Callable[[int, int], Made]) -> None:
        """A batch of windows. `make(window of the batch, feature's place)` is called for those that are kept only;
        a score of 0 is none."""
        order = np.argsort(-scores, axis=0, kind="stable")[: self.top]
        for i, kept in enumerate(self.kept):
            for w in order[:, i]:
                score = float(scores[w, i])
                if not score > (kept[-1][0] if len(kept) == self.top else 0):
                    break
                kept.append((score, make(int(w), i)))
                kept.sort(key=lambda one: -one[0])  # stable: of equals the earlier window comes first
                del kept[self.top :]


def _context(
    first: int,
    ids: Int32[np.ndarray, "b s"],
    z: Float[np.ndarray, "b s f"],
    q: Float[np.ndarray, "b s f"],
    at: Int[np.ndarray, "b f"],
    around: int,
    w: int,
    i: int,
) -> dict[str, Any]:
    position = int(at[w, i])
    start = max(position - around, 0)
    part = slice(start, position + around + 1)
    values = {name: [float(f"{v:.{DIGITS}g}") for v in run[w, part, i]] for name, run in (("fp", z), ("twin", q))}
    return {"window": first + w, "position": position, "ids": ids[w, part].tolist(), **values, "start": start}


def followed(
    lms: Sequence[LM],
    sae: SAE,
    windows: Windows,
    point: Point,
    features: Sequence[int],
    batch: int,
    mesh: Mesh,
    stopped: Callable[[], bool],
    advance: Advance | None,
) -> Iterator[tuple[int, Int32[np.ndarray, "b s"], list[Float32[np.ndarray, "b s f"]]]]:
    """One pass over the windows: for each batch the place of its first window, its tokens, and what the features are
    worth at each of them in every run."""
    size, first = windows_per_forward(batch, windows, mesh), 0
    wanted = np.broadcast_to(np.asarray(features, np.int32), (size, len(features)))
    for ids, weight in in_order(windows, size) if len(features) else ():
        tokens, real = on_data(ids, mesh), int(weight.sum())
        seen = [values(sae, waited(activations(lm, (point,), tokens), stopped)[0], wanted) for lm in lms]
        yield first, ids[:real], [z[:real] for z in here(seen)]
        first += real
        if advance:
            advance(real * windows.seq)


def waited(found: Made, stopped: Callable[[], bool]) -> Made:
    """What a forward pass gives, when it is there. An interpreter that leaves while the device still works crashes."""
    found = jax.block_until_ready(found)
    if stopped():
        raise Interrupted("stopped; what is finished is kept, the same command goes on")
    return found


@jax.jit
def values(sae: SAE, x: Float[Array, "b s ..."], features: Int[Array, "b f"]) -> Float32[Array, "b s f"]:
    """What some features, each window's own, are worth at every position. Codes of all latents exist for ROWS rows at
    a time only."""
    b, s = x.shape[:2]
    rows = (x.reshape(b * s, -1), jnp.repeat(features, s, axis=0))
    found = jax.lax.map(lambda now: jnp.take_along_axis(sae.encode(now[0]), now[1], axis=-1), chunked(rows))
    return from_chunks(found)[: b * s].reshape(b, s, -1)


def chunked(rows: Any) -> Any:
    """Every array of rows `[n, ...]` in chunks of ROWS, the last filled up with the first row; `from_chunks` undoes
    it and `[:n]` takes the filling off."""

    def one(x: Array) -> Array:
        chunk = min(ROWS, len(x))
        return in_chunks(jnp.concatenate([x, jnp.repeat(x[:1], -len(x) % chunk, axis=0)]), chunk)

    return jax.tree.map(one, rows)
