"""What became of each feature from one dictionary to another: kept, lost or split; new, merged or carried over.

Latents i of `one` and j of `other` that fire are *partners* where their decoder rows have cosine >= 0.7. The *parts*
of i are those of its partners whose nearest latent of `one` it is; the *sources* of j are those of its partners whose
nearest latent of `other` it is (of ties, the first is the nearest).

    of one      lost      no partner
                split     at least two parts: a finer dictionary has several latents for it
                kept      the rest
    of other    new       no partner
                merged    at least two sources: a coarser dictionary has one latent for several
                carried   the rest

Each three are exclusive and are all the latents that fire, so that their shares add up to 1. The sources of a merged
latent are themselves `kept` (or split), as the parts of a split one are `carried` (or merged): the two sides count
different latents. Every latent is a part of at most one, and a source of at most one.

Splitting in this sense, by nearness of directions, is that of Bricken et al. 2023 ("Towards Monosemanticity", feature
splitting, which they see when a dictionary grows); a latent without a partner is the opposite of what Paulo & Belrose
(arXiv 2501.16615) call shared. Two seeds of one dictionary already lose, split and merge features: these shares mean
nothing without the same shares for two seeds. Features also split and merge in ways that no two directions at this
cosine show: a part may lie farther from the whole than 0.7.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int

from qsae_jax.compare.match import SAME, Nearest, cosine_blocks, nearest, unit
from qsae_jax.hosts import here
from qsae_jax.sae.model import SAE


@dataclass(frozen=True)
class Fates:
    """Latents by what became of them, in ascending order and by their numbers in their own dictionary."""

    lost: Int[np.ndarray, "lost"]
    split: Int[np.ndarray, "split"]
    kept: Int[np.ndarray, "kept"]
    new: Int[np.ndarray, "new"]
    merged: Int[np.ndarray, "merged"]
    carried: Int[np.ndarray, "carried"]
    parts: tuple[Int[np.ndarray, "_"], ...]
    """For each of `split`, its parts: latents of `other`."""
    sources: tuple[Int[np.ndarray, "_"], ...]
    """For each of `merged`, its sources: latents of `one`."""

    def shares(self) -> dict[str, float]:
        """Of the latents that fire, of `one` (lost, split, kept) or of `other` (new, merged, carried). NaN where none
        fires."""
        found: dict[str, float] = {}
        for names in (("lost", "split", "kept"), ("new", "merged", "carried")):
            counts = [len(getattr(self, name)) for name in names]
            found |= {name: n / sum(counts) if sum(counts) else np.nan for name, n in zip(names, counts, strict=True)}
        return found


def fates(one: SAE, other: SAE, alive_one: Bool[np.ndarray, "m"], alive_other: Bool[np.ndarray, "n"]) -> Fates:
    """What became of the latents of `one` that fire, in `other`. Memory grows with the latents, not with their pairs:
    the nearest of each, both ways, is all that the definitions need."""
    mine, theirs = np.flatnonzero(alive_one), np.flatnonzero(alive_other)
    near = _nearest(*(unit(np.asarray(here(s.W_dec[...]))[at]) for s, at in ((one, mine), (other, theirs))))
    lost, split, kept, parts = _sorted_out(near.best, near.back, near.best_back)
    new, merged, carried, sources = _sorted_out(near.best_back, near.there, near.best)
    return Fates(
        *(mine[at] for at in (lost, split, kept)),
        *(theirs[at] for at in (new, merged, carried)),
        parts=tuple(theirs[at] for at in parts),
        sources=tuple(mine[at] for at in sources),
    )


def _nearest(one: np.ndarray, other: np.ndarray) -> Nearest:
    if len(one) and len(other):
        return nearest(cosine_blocks(one, other))
    # Nothing is near a dictionary of which nothing fires.
    none, far = (np.zeros(len(rows), int) for rows in (one, other)), (np.full(len(x), -1.0) for x in (one, other))
    there, back = none
    best, best_back = far
    return Nearest(there, best, back, best_back)


def _sorted_out(
    best: np.ndarray, chosen: np.ndarray, cosine: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[np.ndarray]]:
    """(alone, several, rest, the several's partners) of one side's latents: `best` is their largest cosine; `chosen`
    and `cosine` say of each latent of the other side which of them is the nearest, and how near."""
    partners = np.flatnonzero(cosine >= SAME)
    partners = partners[np.argsort(chosen[partners], kind="stable")]
    counts = np.bincount(chosen[partners], minlength=len(best))
    ends = np.cumsum(counts)
    several = counts >= 2
    alone = best < SAME
    of_each = [partners[ends[i] - counts[i] : ends[i]] for i in np.flatnonzero(several)]
    return np.flatnonzero(alone), np.flatnonzero(several), np.flatnonzero(~alone & ~several), of_each
