"""Loss and KL of every predicted token, computed in chunks of rows: the `[tokens, vocab]` logits never exist whole.

128 rows of logits stay in a CPU's cache and are enough for a full-speed product (2 cores: 644 ms for 2,048 tokens
of a 49,152-word vocabulary, which is the product alone; 1,219 ms when the logits are written out).
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from qsae_jax.lm.model import LM
from qsae_jax.mesh import from_chunks, in_chunks

CHUNK = 128


@jax.jit
def token_losses(
    lms: Sequence[LM], finals: Sequence[Float[Array, "b s d"]], tokens: Int[Array, "b s"]
) -> tuple[list[Float32[Array, "b p"]], list[Float32[Array, "b p"]]]:
    """For each model, from its activations at `final`: the loss of every predicted token (nats, p = s - 1), and
    KL(first, model) of the next-token distributions at the same positions. The first model is the reference."""
    b, s, _ = finals[0].shape
    n = b * (s - 1)
    chunk = min(CHUNK, n)

    def rows(x: Array) -> Array:
        x = x.reshape(n, *x.shape[2:])
        return in_chunks(jnp.concatenate([x, jnp.repeat(x[:1], -n % chunk, axis=0)]), chunk)

    def one(group: tuple[tuple[Array, ...], Array]) -> tuple[list[Array], list[Array]]:
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
        return [t - c for t, c in zip(totals, chosen, strict=True)], kl

    hidden = tuple(rows(x[:, :-1]) for x in finals)
    nll, kl = jax.lax.map(one, (hidden, rows(tokens[:, 1:])))
    back = [[from_chunks(x)[:n].reshape(b, s - 1) for x in many] for many in (nll, kl)]
    return back[0], back[1]
