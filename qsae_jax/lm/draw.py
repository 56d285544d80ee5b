"""A model drawn in words: its facts, its weights in the order of the data, and its points."""

from collections.abc import Iterator

import numpy as np
from flax import nnx

from qsae_jax.lm.config import LMConfig
from qsae_jax.lm.load import abstract_lm
from qsae_jax.lm.model import LM, count_parameters
from qsae_jax.lm.rope import Rope
from qsae_jax.lm.tap import points, shapes_at

ORDER = (
    *("embed", "positions", "blocks", "0", "attn_norm", "attn", "q", "q_bias", "q_norm", "k", "k_bias", "k_norm"),
    *("v", "v_bias", "o", "o_bias", "attn_post", "mlp_norm", "mlp", "gate", "gate_bias", "up", "up_bias", "down"),
    *("down_bias", "mlp_post", "final_norm", "head", "head_bias", "scale", "bias"),
)
"""The parts of a path in the order of the data."""


def drawing(name: str, config: LMConfig, bos: bool | None) -> str:
    """Several lines; `bos` says whether windows begin with BOS by default, None where there is no tokenizer."""
    lm = abstract_lm(config)
    return "\n".join([*_facts(name, lm, bos), "", *_weights(lm), "", *_points(lm)])


def _facts(name: str, lm: LM, bos: bool | None) -> Iterator[str]:
    c = lm.config
    yield f"{name}: {c.family}, {count_parameters(lm):,} parameters, {c.n_layers} blocks of width {c.d_model}"
    norm, mlp = "LayerNorm" if c.layer_norm else "RMSNorm", "gated" if c.gated else "plain"
    beside = " in parallel" if c.parallel else ""
    yield (
        f"{c.n_heads} heads of {c.head_dim} on {c.n_kv_heads} key-value heads, {mlp} mlp of {c.d_ff} ({c.act})"
        f"{beside}, {norm}{' before and after' if c.post_norms else ''}, eps {c.norm_eps:.3g}"
    )
    turns = f"rotary of {c.rope.dims}, base {c.rope.theta:g}{_slowed(c.rope)}" if c.rope else "learned"
    local = f", {c.local_rope.theta:g} in windows" if c.local_rope else ""
    yield f"positions {turns}{local}, context {c.context:,}; head {'tied' if c.tied else 'of its own'}"
    scaled = f", embeddings times {c.embed_scale:.4g}" if c.embed_scale != 1 else ""
    yield f"scores times {c.score_scale:.4g}{', queries and keys normed' if c.qk_norm else ''}{scaled}"
    if c.windows:
        sliding = [layer for layer, window in enumerate(c.windows) if window]
        yield f"a window of {max(c.windows)} in {len(sliding)} of {c.n_layers} blocks: {_ranges(sliding)}"
    if c.score_cap or c.logit_cap:
        yield f"caps: {c.score_cap or 'none'} on scores, {c.logit_cap or 'none'} on logits"
    if bos is not None:
        yield f"BOS before each window: {'yes' if bos else 'no'}"


def _slowed(rope: Rope) -> str:
    slow = rope.slowed
    if slow is None:
        return ""
    return f" slowed by {slow.factor:g}" + (f" beyond {slow.original:,}" if slow.original else "")


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] as `0-2, 5`."""
    parts: list[list[int]] = []
    for n in numbers:
        if parts and n == parts[-1][-1] + 1:
            parts[-1].append(n)
        else:
            parts.append([n])
    return ", ".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else str(part[0]) for part in parts)


def _weights(lm: LM) -> Iterator[str]:
    """Those of the ends, and once those of a block, which are the same in all."""
    yield f"{'weight':<34}{'shape':>18}{'parameters':>16}"
    flat = [(list(map(str, path)), leaf.shape) for path, leaf in nnx.to_flat_state(nnx.state(lm))]
    kept = [(path, shape) for path, shape in flat if path[0] != "blocks" or path[1] == "0"]
    kept.sort(key=lambda one: [ORDER.index(part) for part in one[0]])
    for path, shape in kept:
        name = ".".join(path).replace("blocks.0.", f"blocks.{{0..{lm.config.n_layers - 1}}}.")
        yield f"{name:<34}{' x '.join(map(str, shape)):>18}{int(np.prod(shape)):>16,}"


def _points(lm: LM) -> Iterator[str]:
    yield f"{'point':<34}{'shape of a token':>18}"
    for point, shape in zip(points(lm), shapes_at(lm, points(lm)), strict=True):
        if point.layer in (None, 0):
            name = str(point).replace("blocks.0.", f"blocks.{{0..{lm.config.n_layers - 1}}}.")
            yield f"{name:<34}{' x '.join(map(str, shape)):>18}"
