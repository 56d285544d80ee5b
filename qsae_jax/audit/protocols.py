"""Perplexity by protocol: how windows are cut, where BOS stands, and which tokens are scored change it by more than
most quantizers do (arXiv 2606.03002 reads 458 for Gemma-2-2B in blocks without BOS, and 46 in sliding windows).

chunked   windows one after the other: every token that has one before it in its window is scored
sliding   windows of `window` tokens, each `stride` further on: of each but the first only the new tokens are scored,
          so that each has at least window - stride tokens before it (as in the guides of transformers)
bos       `each`: every window begins with BOS, which is never scored; `first`: only the first window of the text;
          `never`. BOS takes a place in its window.

Only whole windows count: up to a stride of tokens at the end of the text is left out.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int32

from qsae_jax.acts.tokens import Windows, in_order, windows_per_forward
from qsae_jax.audit.perplexity import Losses
from qsae_jax.audit.run import at_once, in_groups
from qsae_jax.errors import Interrupted, UserError
from qsae_jax.lm.model import LM
from qsae_jax.lm.tap import FINAL, activations
from qsae_jax.mesh import on_data, return_freed
from qsae_jax.progress import progress, stop_signal
from qsae_jax.quant.fake import fake_quantize
from qsae_jax.quant.scheme import Scheme

BOS = ("each", "first", "never")


@dataclass(frozen=True)
class Protocol:
    """One way to take a perplexity."""

    name: str
    window: int = 512
    stride: int = 0
    """Tokens between two windows' beginnings; 0: windows follow one another."""
    bos: str = "each"
    tokens: int = 8192
    """Tokens of the text that are read, from its beginning."""

    def __post_init__(self) -> None:
        room = self.window - (self.bos == "each")
        for wrong, what in (
            (self.bos not in BOS, f"bos is `{self.bos}`: choose one of {', '.join(BOS)}"),
            (self.window < 2, f"window is {self.window}: give at least 2"),
            (not 0 <= self.stride <= room, f"stride is {self.stride}: give 1 to {room}, or 0 for no overlap"),
            (self.tokens < room, f"tokens is {self.tokens}: one window takes {room}"),
        ):
            if wrong:
                raise UserError(f"key `perplexity` `{self.name}`: {what}")

    @property
    def described(self) -> str:
        cut = f"sliding by {self.stride}" if self.stride else "one after the other"
        bos = {"each": "BOS in each", "first": "one BOS before the text", "never": "no BOS"}[self.bos]
        return f"windows of {self.window} {cut}, {bos}"


def cut(
    protocol: Protocol, stream: Int32[np.ndarray, "n"], bos: int | None, source: str
) -> tuple[Windows, Float[np.ndarray, "w p"]]:
    """The windows of a text's tokens, and which of their predicted tokens are scored."""
    if protocol.bos != "never" and bos is None:
        raise UserError(f"key `perplexity` `{protocol.name}`: the tokenizer has no BOS: set bos = 'never'")
    first = np.full(int(protocol.bos != "never"), bos or 0, np.int32)
    each, stream = protocol.bos == "each", stream[: protocol.tokens]
    stream = np.concatenate([first, stream]) if protocol.bos == "first" else stream
    room = protocol.window - each
    stride = protocol.stride or room
    if len(stream) < room:
        raise UserError(
            f"key `perplexity` `{protocol.name}`: the text has {len(stream)} tokens, one window takes {room}"
        )
    ids = np.lib.stride_tricks.sliding_window_view(stream, room)[::stride]
    scored = np.ones((len(ids), protocol.window - 1), np.float32)
    if protocol.stride:
        scored[1:, : max(protocol.window - 1 - stride, 0)] = 0
    if each:
        ids = np.concatenate([np.broadcast_to(first, (len(ids), 1)), ids], axis=1)
    return Windows(np.ascontiguousarray(ids), source, each), scored


def perplexities(
    lm: LM,
    cuts: Mapping[Protocol, tuple[Windows, Float[np.ndarray, "w p"]]],
    schemes: Mapping[str, Scheme],
    mesh: Mesh,
    batch: int = 0,
) -> list[dict[str, Any]]:
    """Every protocol with full precision and every scheme: perplexity, KL, agreement, and their intervals."""
    rows: dict[tuple[Protocol, str], dict[str, Any]] = {}
    groups = in_groups(schemes, at_once(lm))
    total = sum(windows.ids.size for windows, _ in cuts.values())
    with progress("perplexity", len(groups) * total) as advance, stop_signal() as stopped:
        for group in groups:
            twins = {"fp": lm} | {name: fake_quantize(lm, scheme) for name, scheme in group.items()}
            for protocol, (windows, scored) in cuts.items():
                losses = _one(twins, windows, scored, mesh, batch, advance, stopped)
                for name in twins:
                    ends = {key: [one.low, one.high] for key, one in losses.intervals(name).items()}
                    row = {"protocol": protocol.name, "scheme": name} | losses.row(name) | {"intervals": ends}
                    rows[protocol, name] = row | {"scored": int(scored.sum())}
            del twins
            return_freed()
    return [rows[protocol, name] for protocol in cuts for name in ("fp", *schemes)]


def _one(
    twins: Mapping[str, LM],
    windows: Windows,
    scored: Float[np.ndarray, "w p"],
    mesh: Mesh,
    batch: int,
    advance: Callable[..., None],
    stopped: Callable[[], bool],
) -> Losses:
    losses, first = Losses(list(twins), len(windows)), 0
    for ids, weight in in_order(windows, windows_per_forward(batch, windows, mesh)):
        tokens = on_data(ids, mesh)
        finals = []
        for twin in twins.values():
            finals.append(jax.block_until_ready(activations(twin, (FINAL,), tokens)[0]))
            if stopped():
                raise Interrupted("perplexity stopped; nothing is written, the same command begins it again")
        real = int(weight.sum())
        some = np.zeros((len(weight), scored.shape[1]), np.float32)
        some[:real] = scored[first : first + real]
        losses.add(list(twins.values()), finals, tokens, weight, first, some)
        first += real
        advance(real * windows.seq, ppl=losses.perplexity("fp"))
    return losses


def check_distinct(protocols: Sequence[Protocol]) -> None:
    """Refuse two protocols of one name."""
    names = [protocol.name for protocol in protocols]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"key `perplexity` names `{twice}` twice: give each protocol a name of its own")
