"""A dictionary and how it learns: what `[sae]` holds in a study, and `--set sae.KEY=VALUE`."""

from dataclasses import dataclass

from qsae_jax.config import check_at_least
from qsae_jax.errors import UserError, nearest

SPARSITIES = ("topk", "batchtopk", "matryoshka", "jumprelu", "gated", "relu", "p_anneal")
SELECTING = ("topk", "batchtopk", "matryoshka")
"""Those that choose codes by rank, and so have no penalty and need AuxK."""
PENALTIES = ("step", "tanh", "quadratic", "target")
SCALES = ("unit", "sqrt_d", "none")


@dataclass(frozen=True)
class SAEConfig:
    """A dictionary and how it learns. Shares are of the steps of the training."""

    sparsity: str = "topk"
    """topk, batchtopk, matryoshka (over batchtopk), jumprelu, gated, relu or p_anneal."""
    expansion: float = 8
    """Latents per dimension of the activations; below 1 there are fewer of them than dimensions."""
    k: float = 32
    """Latents that fire on a token; on average (batchtopk, matryoshka)."""
    k_first: float = 0
    """Latents that fire at the start, falling to k over `sparsity_warmup` (topk, batchtopk, matryoshka); 0 is k."""
    groups: tuple[float, ...] = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 17 / 32)
    """Shares of the latents that each level adds to the one before (matryoshka)."""
    l1: float = 0.05
    """Coefficient of the penalty (relu, gated, p_anneal)."""
    p_end: float = 0.2
    """The power that the penalty's exponent falls to from 1 (p_anneal)."""
    p_from: float = 0.3
    """Share of the steps after which it begins to fall (p_anneal)."""
    p_steps: int = 10
    """In how many steps it falls (p_anneal)."""
    l0: float = 1.0
    """Coefficient of the penalty (jumprelu)."""
    penalty: str = "target"
    """step, tanh, quadratic or target (jumprelu): loss.py has their formulas."""
    target_l0: float = 32
    """What quadratic and target drive the mean number of codes to (jumprelu)."""
    tanh_scale: float = 4.0
    """How steep tanh is (jumprelu)."""
    pre_act: float = 0.0
    """Coefficient of the loss that lifts dead latents' pre-activations; 3e-6 is Anthropic's (jumprelu)."""
    threshold: float = 0.01
    """Thresholds at the start, in the scale of normalised activations (jumprelu)."""
    bandwidth: float = 0.05
    """Width of the straight-through kernel, in the same scale (jumprelu)."""
    threshold_lr: float = 0.0
    """Learning rate of the thresholds; 0 is `lr` (jumprelu)."""
    per_latent: bool = False
    """One threshold for each latent on leaving, not one for all (batchtopk, matryoshka)."""
    lr: float = 2e-3
    """Peak learning rate of Adam."""
    beta1: float = 0.9
    beta2: float = 0.999
    warmup: float = 0.05
    """Share of the steps in which the learning rate rises from 0."""
    decay: float = 0.3
    """Share of the steps, at the end, in which it falls to 0."""
    schedule: str = "linear"
    """How it falls: linear or cosine."""
    sparsity_warmup: float = 0.05
    """Share of the steps in which the penalty rises from 0, or k falls from `k_first`."""
    clip: float = 0.0
    """Largest norm of all gradients together; 0 clips nothing."""
    normalize: str = "unit"
    """The scale of activations: unit (mean square norm 1), sqrt_d (mean norm the root of d, as SAELens) or none."""
    max_norm: float = 0.0
    """Activations longer than so many times the median are left out; 0 keeps all."""
    unit_decoder: str = "auto"
    """Decoder rows of length 1, with gradients projected along the sphere: yes, no, or auto (as each was published: no
    for relu and jumprelu's tanh, whose penalties weigh codes by the rows' lengths)."""
    centre: str = "geometric_median"
    """Where b_dec begins: geometric_median, mean or zero."""
    aux: float = 1 / 32
    """Coefficient of AuxK (topk, batchtopk, matryoshka)."""
    k_aux: int = 0
    """Dead latents that AuxK uses for a token; 0 is half the width of the activations."""
    dead_after: int = 32_768
    """A latent is dead when it has not fired for so many tokens."""
    resample: int = 0
    """Dead latents begin anew every so many tokens; 0 never."""
    ema: float = 0.0
    """Decay of the average of weights that is kept as the result; 0 keeps the last weights. Thresholds of BatchTopK are
    still those of the last weights."""
    accumulate: int = 1
    """Parts of a batch that go through one after the other, their gradients added up before a step: for batches whose
    codes do not fit in memory at once."""
    skip: bool = False
    """A linear map past the codes (transcoders)."""
    bf16: bool = False
    """Operands of the large products in bfloat16, sums in float32: for GPUs and TPUs."""

    def __post_init__(self) -> None:
        _check_word(self.sparsity, "sae.sparsity", SPARSITIES)
        _check_word(self.penalty, "sae.penalty", PENALTIES)
        _check_word(self.normalize, "sae.normalize", SCALES)
        _check_word(self.schedule, "sae.schedule", ("linear", "cosine"))
        _check_word(self.unit_decoder, "sae.unit_decoder", ("auto", "yes", "no"))
        _check_word(self.centre, "sae.centre", ("geometric_median", "mean", "zero"))
        check_at_least(self, "sae.", expansion=0, k=1, k_first=0, l1=0, l0=0, p_steps=1, target_l0=0.1, tanh_scale=0,
                       pre_act=0, threshold=0, threshold_lr=0, lr=0, beta1=0, beta2=0, warmup=0, decay=0, p_from=0,
                       sparsity_warmup=0, clip=0, max_norm=0, aux=0, k_aux=0, dead_after=1, resample=0,
                       ema=0, accumulate=1)  # fmt: skip
        for name in ("p_end", "bandwidth", "expansion"):
            if getattr(self, name) <= 0:
                raise UserError(f"key `sae.{name}` is {getattr(self, name)}: give a number above 0")
        for name in ("beta1", "beta2", "ema", "p_from"):
            if getattr(self, name) >= 1:
                raise UserError(f"key `sae.{name}` is {getattr(self, name)}: give a number below 1")
        if self.k_first and self.k_first < self.k:
            raise UserError(f"key `sae.k_first` is {self.k_first:g}: it falls to sae.k, {self.k:g}: give more")
        if self.warmup + self.decay > 1:
            raise UserError(f"sae.warmup {self.warmup} and sae.decay {self.decay} are shares of the steps: at most 1")
        if self.sparsity == "topk" and (self.k != int(self.k) or self.k_first != int(self.k_first)):
            raise UserError(f"sae.k {self.k:g} (first {self.k_first:g}): topk takes whole numbers")
        if not self.groups or min(self.groups) <= 0 or abs(sum(self.groups) - 1) > 1e-6:
            raise UserError(f"key `sae.groups` is {list(self.groups)}: give shares that are above 0 and sum to 1")

    @property
    def selects(self) -> bool:
        return self.sparsity in SELECTING

    @property
    def unit(self) -> bool:
        """Whether decoder rows are kept at length 1."""
        free = self.sparsity == "relu" or (self.sparsity == "jumprelu" and self.penalty == "tanh")
        return self.unit_decoder == "yes" or (self.unit_decoder == "auto" and not free)

    @property
    def k_most(self) -> float:
        return max(self.k, self.k_first)


USED_BY = {
    "k": SELECTING, "k_first": SELECTING, "groups": ("matryoshka",), "l1": ("relu", "gated", "p_anneal"),
    **dict.fromkeys(("p_end", "p_from", "p_steps"), ("p_anneal",)), "per_latent": ("batchtopk", "matryoshka"),
    **dict.fromkeys(("l0", "penalty", "target_l0", "tanh_scale", "pre_act", "threshold", "bandwidth"), ("jumprelu",)),
    "threshold_lr": ("jumprelu",), "aux": SELECTING, "k_aux": SELECTING,
}  # fmt: skip
"""Which kinds a setting is for, where not for all."""


def _check_word(word: str, key: str, possible: tuple[str, ...]) -> None:
    if word not in possible:
        raise UserError(f"{key} `{word}` is unknown{nearest(word, possible)}; possible: {', '.join(possible)}")
