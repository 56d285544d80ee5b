"""Loss, KL and agreement of every predicted token, in chunks of rows: the `[tokens, vocab]` logits never exist whole.

128 rows of logits stay in a CPU's cache and are enough for a full-speed product (2 cores: 644 ms for 2,048 tokens
of a 49,152-word vocabulary, which is the product alone; 1,219 ms when the logits are written out).
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from qsae_jax.lm.model import LM
from qsae_jax.mesh import from_chunks, in_chunks

CHUNK = 128


class TokenLosses(NamedTuple):
    """For each model, `[b, p]` of the p = s - 1 predicted tokens of each window. The first model is the reference."""

    nll: list[Float32[Array, "b p"]]
    """Loss, nats."""
    kl: list[Float32[Array, "b p"]]
    """KL(first, model) of the next-token distributions."""
    agree: list[Float32[Array, "b p"]]
    """1 where the model's most likely token is the first model's, else 0."""


@jax.jit
def token_losses(lms: Sequence[LM], finals: Sequence[Float[Array, "b s d"]], tokens: Int[Array, "b s"]) -> TokenLosses:
    """What each model makes of the tokens, from its activations at `final`."""
    b, s, _ = finals[0].shape
    n = b * (s - 1)
    chunk = min(CHUNK, n)

    def rows(x: Array) -> Array:
        x = x.reshape(n, *x.shape[2:])
        return in_chunks(jnp.concatenate([x, jnp.repeat(x[:1], -n % chunk, axis=0)]), chunk)

    def one(group: tuple[tuple[Array, ...], Array]) -> TokenLosses:
        hidden, targets = group
        logits = [lm.unembed(h) for lm, h in zip(lms, hidden, strict=True)]
        totals = [jax.nn.logsumexp(x, axis=-1) for x in logits]
        chosen = [jnp.take_along_axis(x, targets[:, None], axis=-1)[:, 0] for x in logits]
        p = jnp.exp(logits[0] - totals[0][:, None])
        # sum p (log p - log q), the two normalisers taken out of the sum, where they would cancel in each term.
        kl = [
            jnp.sum(p * (logits[0] - x), axis=-1) + t - totals[0] for x, t in zip(logits[1:], totals[1:], strict=True)
        ]
        kl = [jnp.zeros_like(totals[0]), *kl]
        best = [jnp.argmax(x, axis=-1) for x in logits]
        agree = [(b == best[0]).astype(jnp.float32) for b in best]
        return TokenLosses([t - c for t, c in zip(totals, chosen, strict=True)], kl, agree)

    hidden = tuple(rows(x[:, :-1]) for x in finals)
    found = jax.lax.map(one, (hidden, rows(tokens[:, 1:])))
    return jax.tree.map(lambda x: from_chunks(x)[:n].reshape(b, s - 1), found)
