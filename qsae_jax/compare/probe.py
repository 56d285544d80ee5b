"""Sparse probes: do a dictionary's few best latents tell a class of tokens that the corpus itself labels?

A class is read from the text of each token alone (a digit in it, a line break), so that its labels are free and exact.
For each class the k latents z with the largest standardised difference of means are taken

    score(z) = |mean+(z) - mean-(z)| / sqrt(pooled variance + FLOOR mean(z^2))
    pooled variance = (sum over + of (z - mean+)^2 + sum over - of (z - mean-)^2) / (n - 2)

and an L2 logistic regression (C = 1, classes balanced) on their standardised values is judged on other windows by its
balanced accuracy, chance being a half (k-sparse probing: Gurnee et al. 2023, arXiv 2305.01610; on dictionaries:
SAEBench's sparse probing, Karvonen et al. 2025, arXiv 2503.09532, which ranks by the difference alone, so that latents
of larger scale come first). FLOOR keeps the score of a latent that is constant within a class and out of it finite.

Of the groups of windows those with an even number fit, scores and regression, and those with an odd one judge. Both
passes run the model up to the point only. Codes of all latents exist for ROWS rows at a time; of the chosen ones, k
for each class, the values at all counted tokens are held in memory: 4 bytes x tokens x classes x k a dictionary.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Float32, Int
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from qsae_jax.acts.tokens import Windows, counted_rows, in_order, windows_per_forward
from qsae_jax.errors import Interrupted
from qsae_jax.hosts import here
from qsae_jax.lm.model import LM
from qsae_jax.lm.tap import Point, activations
from qsae_jax.lm.tokenizer import TextTokenizer
from qsae_jax.mesh import from_chunks, in_chunks, on_data
from qsae_jax.products import einsum
from qsae_jax.progress import Advance
from qsae_jax.sae.model import SAE
from qsae_jax.stats import Grouped, Sums, Totals, group_of

ROWS = 128
"""Rows whose codes of every latent are alive at a time."""
MIN = 20
"""A class is used where each part has at least so many tokens of it, and as many others."""
FLOOR = 1e-6
"""Share of a latent's second moment that is added to its variance: what float32 sums cannot tell from none."""

CLASSES: dict[str, Callable[[str], bool]] = {
    "digit": lambda text: any(c.isdigit() for c in text),
    "capital": lambda text: next((c for c in text if c.isalpha()), "").isupper(),
    "word": lambda text: text[:1] == " " and text[1:2].isalpha(),
    "punctuation": lambda text: bool(text.strip(" \t\r\n\ufffd")) and not any(c.isalnum() for c in text),
    "newline": lambda text: "\n" in text,
    "name": lambda text: bool(re.search(r"_|[^\W\d_]\.[^\W\d_]|[a-z][A-Z]", text)),
}
"""Of a token's text: a digit in it; its first letter a capital; a word's start; signs and nothing else (a part of a
character, which decodes to U+FFFD, is none); a line break in it; a piece of a name in code, by an underscore, a dot
between letters or a capital after a small letter."""
Passed = Iterator[tuple[slice, Array]]
"""For each batch the places of its windows, and the counted activations of as many windows as a batch has, as rows:
those that come after the places are padding."""


def labels(windows: Windows, tokenizer: TextTokenizer) -> Bool[np.ndarray, "n s c"]:
    """Which of CLASSES, in their order, each token is of, by what it writes within a text."""
    ids = np.asarray(windows.ids)
    table = np.zeros((int(ids.max()) + 1, len(CLASSES)), bool)
    for token in np.unique(ids).tolist():
        # The second of two: the first loses its space with SentencePiece's decoders.
        text = tokenizer.decode([token, token])[len(tokenizer.decode([token])) :]
        table[token] = [says(text) for says in CLASSES.values()]
    return table[ids]


def probe(
    lm: LM,
    dictionaries: Mapping[str, SAE],
    windows: Windows,
    labels: Bool[np.ndarray, "n s c"],
    point: Point,
    mesh: Mesh,
    *,
    k: int = 5,
    skip_first: int = 1,
    batch: int = 0,
    advance: Advance | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> dict[str, Grouped]:
    """For each dictionary and judging group the tokens of each class and the others (`pos`, `neg` `[groups, c]`), and
    those of them that the probe tells (`hit_pos`, `hit_neg`). A class too rare to use has zeros; without any that is
    not, there are no dictionaries in the result.

    `advance` is told of the tokens of the fitting windows, then of all."""
    group, size = group_of(np.arange(len(windows)), len(windows)), windows_per_forward(batch, windows, mesh)
    fitting, marks = group % 2 == 0, labels[:, skip_first:]
    counts = [side[part].sum(axis=(0, 1)) for side in (marks, ~marks) for part in (fitting, ~fitting)]
    used = np.min(counts, axis=0) >= MIN
    if not used.any():
        return {}

    def counted(ids: np.ndarray) -> Array:
        (x,) = jax.block_until_ready(activations(lm, (point,), on_data(ids, mesh)))
        _heard(stopped)
        return counted_rows(x, skip_first)

    part = Windows(np.asarray(windows.ids)[fitting], windows.source, windows.bos)
    best = _best(dictionaries, _passed(counted, part, size, advance), marks[fitting][..., used], k, size)
    z = {name: np.empty((*marks.shape[:2], latents.size), np.float32) for name, latents in best.items()}
    for at, rows in _passed(counted, windows, size, advance):
        for name, sae in dictionaries.items():
            found = here(gathered(sae, rows, best[name].reshape(-1)))
            z[name][at] = found.reshape(size, marks.shape[1], -1)[: at.stop - at.start]
    judged = {}
    for name in dictionaries:
        _heard(stopped)
        judged[name] = _judged(z.pop(name), marks, used, group)
    return judged


def accuracy(s: Sums) -> float:
    """Balanced accuracy, the mean over the classes that have tokens, and others; NaN without any. A resample may have
    lost all tokens of a class, which is then left out."""
    some = (s["pos"] > 0) & (s["neg"] > 0)
    each = [s[f"hit_{side}"][some] / s[side][some] for side in ("pos", "neg")]
    return float(np.mean(each)) if some.any() else float("nan")


def _heard(stopped: Callable[[], bool]) -> None:
    if stopped():
        raise Interrupted("comparison stopped; nothing is written, the same command begins it again")


def _passed(counted: Callable[[np.ndarray], Array], windows: Windows, size: int, advance: Advance | None) -> Passed:
    first = 0
    for ids, weight in in_order(windows, size):
        real = int(weight.sum())
        yield slice(first, first + real), counted(ids)
        first += real
        if advance:
            advance(real * windows.seq)


def _best(
    dictionaries: Mapping[str, SAE], passed: Passed, marks: Bool[np.ndarray, "n p c"], k: int, size: int
) -> dict[str, Int[np.ndarray, "c k"]]:
    """Each dictionary's best latents for every class, the best first; of equals the first."""
    totals = {name: Totals() for name in dictionaries}
    weights = np.concatenate([np.ones_like(marks[..., :1]), marks], axis=-1)
    for at, rows in passed:
        now = np.zeros((size, *weights.shape[1:]), np.float32)
        now[: at.stop - at.start] = weights[at]
        for name, sae in dictionaries.items():
            totals[name].add(**here(moments(sae, rows, now.reshape(-1, now.shape[-1]))))
    n = weights.sum(axis=(0, 1)).astype(np.float64)
    return {name: np.argsort(-scores(t["z"], t["zz"], n), kind="stable")[:, :k] for name, t in totals.items()}


@jax.jit
def moments(sae: SAE, rows: Float[Array, "n d"], weights: Float32[Array, "n w"]) -> dict[str, Array]:
    """Sums of the codes with each weighting, `z [w, m]`, and of their squares with the first, `zz [m]`."""

    def add(sums: dict[str, Array], now: tuple[Array, Array]) -> tuple[dict[str, Array], None]:
        codes, w = sae.encode(now[0]), now[1]
        more = {"z": einsum("nw,nm->wm", w, codes), "zz": einsum("n,nm->m", w[:, 0], codes**2)}
        return {name: sums[name] + more[name] for name in sums}, None

    none = {"z": jnp.zeros((weights.shape[1], sae.latents)), "zz": jnp.zeros(sae.latents)}
    return jax.lax.scan(add, none, (_chunked(rows), _chunked(weights)))[0]


@jax.jit
def gathered(sae: SAE, rows: Float[Array, "n d"], latents: Int[Array, "f"]) -> Float32[Array, "n f"]:
    """What some latents are worth in every row."""
    found = jax.lax.map(lambda now: sae.encode(now)[:, latents], _chunked(rows))
    return from_chunks(found)[: len(rows)]


def _chunked(rows: Array) -> Array:
    """Rows in chunks of at most ROWS, the last filled up with zeros, which weigh nothing."""
    chunk = min(ROWS, len(rows))
    return in_chunks(jnp.pad(rows, ((0, -len(rows) % chunk), (0, 0))), chunk)


def scores(
    z: Float[np.ndarray, "w m"], zz: Float[np.ndarray, "m"], n: Float[np.ndarray, "w"]
) -> Float[np.ndarray, "c m"]:
    """The standardised difference of each latent's means in and out of each class, from sums over all tokens, the
    first, and over those of the classes; n are the tokens of each."""
    inside, outside = n[1:, None], n[0] - n[1:, None]
    up, down = z[1:] / inside, (z[0] - z[1:]) / outside
    within = np.maximum(zz - inside * up**2 - outside * down**2, 0) / (n[0] - 2) + FLOOR * zz / n[0]
    return np.abs(up - down) / np.sqrt(np.where(within > 0, within, 1))


def _judged(
    z: Float32[np.ndarray, "n p f"],
    marks: Bool[np.ndarray, "n p c"],
    used: Bool[np.ndarray, "c"],
    group: Int[np.ndarray, "n"],
) -> Grouped:
    """What the probes of the used classes, whose latents lie one class after the other in z, tell in odd groups."""
    fitting = group % 2 == 0
    pos, neg, told = marks[~fitting] & used, ~marks[~fitting] & used, np.zeros_like(marks[~fitting])
    for i, values in zip(np.flatnonzero(used), np.split(z, used.sum(), axis=-1), strict=True):
        fit, judge = (values[part].reshape(-1, values.shape[-1]).astype(np.float64) for part in (fitting, ~fitting))
        model: Any = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=1000))
        with threadpool_limits(1):  # a few columns are done sooner than threads meet
            model.fit(fit, marks[fitting][..., i].reshape(-1))
            told[..., i] = model.predict(judge).reshape(told.shape[:2])
    sums = {"hit_pos": told & pos, "pos": pos, "hit_neg": ~told & neg, "neg": neg}
    judged = Grouped((int(group[-1]) + 1) // 2)
    judged.add(group[~fitting] // 2, **{key: value.sum(axis=1) for key, value in sums.items()})
    return judged
