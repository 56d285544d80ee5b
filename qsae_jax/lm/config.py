"""LMConfig: the facts in which families differ, all of them data."""

from dataclasses import dataclass

from qsae_jax.lm.attend import Scores
from qsae_jax.lm.rope import Rope


@dataclass(frozen=True)
class LMConfig:
    """The shape of a model and its scalars. What every model has has no default that could hide a missing fact; a
    default says that a family lacks the thing."""

    family: str
    """The family whose tables load it and write it."""
    vocab: int
    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    d_ff: int
    norm_eps: float
    rope: Rope | None
    """None: positions are learned."""
    tied: bool
    context: int
    """The longest window the model was trained for, in tokens."""
    act: str
    score_scale: float
    """What a query is multiplied by before it meets the keys."""
    gated: bool = True
    """The mlp has a gate."""
    layer_norm: bool = False
    """LayerNorm, with a bias, in place of RMSNorm."""
    norm_offset: float = 0.0
    """What is added to the stored scale of an RMSNorm."""
    post_norms: bool = False
    """Attention and mlp are normed once more before they are added."""
    qk_norm: bool = False
    """Queries and keys are normed head by head before rotary."""
    parallel: bool = False
    """The mlp reads what attention reads, not what attention wrote."""
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    head_bias: bool = False
    embed_scale: float = 1.0
    """What an embedding is multiplied by."""
    score_cap: float = 0.0
    logit_cap: float = 0.0
    windows: tuple[int, ...] = ()
    """How many keys a query of each layer sees, 0 all of them; empty where no layer has a window."""
    local_rope: Rope | None = None
    """The turns of layers with a window, where they have their own."""
    processing: str = "none"
    """What was done to the weights after loading, and leaves the probabilities unchanged."""

    def window_of(self, layer: int) -> int:
        return self.windows[layer] if self.windows else 0

    def rope_of(self, layer: int) -> Rope | None:
        return self.local_rope if self.local_rope and self.window_of(layer) else self.rope

    def scores_of(self, layer: int) -> Scores:
        return Scores(self.score_scale, self.window_of(layer), self.score_cap)
