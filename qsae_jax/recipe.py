"""What decides the numbers of a study, as frozen dataclasses; and the demo's."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from qsae_jax.asked import CloserConfig, ExpectedConfig, PredictConfig, names
from qsae_jax.audit.protocols import Protocol, check_distinct
from qsae_jax.config import build, check_at_least, read_toml, with_settings
from qsae_jax.errors import UserError
from qsae_jax.lm.process import check_processing
from qsae_jax.lm.sources import SMOLLM2
from qsae_jax.lm.tap import Point
from qsae_jax.quant.scheme import parse_scheme, parse_schemes
from qsae_jax.sae.settings import SAEConfig


@dataclass(frozen=True)
class TokensConfig:
    """Where tokens come from. The first windows are held out for audit and comparison, training takes the others."""

    source: str = "stdlib-docs"
    seq: int = 256
    bos: str = "auto"
    skip_first: int = 1
    audit: int = 8192
    compare: int = 4096
    """Tokens of the comparison: the first of the audit's."""

    def __post_init__(self) -> None:
        check_at_least(self, "tokens.", seq=2, skip_first=0, audit=1, compare=1)


@dataclass(frozen=True)
class TrainConfig:
    """How much the dictionaries learn from."""

    tokens: int = 131_072
    batch: int = 512
    """Activations in a step."""
    seed: int = 0
    shuffle: int = 0
    """The seed of the order of tokens, the same for all dictionaries."""
    log: tuple[str, ...] = ()
    """Where metrics go besides the JSON lines: tensorboard, wandb."""

    def __post_init__(self) -> None:
        check_at_least(self, "train.", tokens=1, batch=1, seed=0, shuffle=0)

    def without_seed(self) -> "TrainConfig":
        return replace(self, seed=0)


@dataclass(frozen=True)
class TrainTwiceConfig(TrainConfig):
    """And once more from another seed."""

    reseed: int = 1
    """The seed of the dictionary that is the floor for every difference."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, "train.", reseed=0)
        if self.seed == self.reseed:
            raise UserError(f"key `train.reseed` is {self.reseed}, as train.seed: a floor needs another seed")


@dataclass(frozen=True)
class ArmsConfig:
    """Arms beyond transferred, retrained and reseeded."""

    adapt: int = 0
    """Tokens from which the dictionary is adapted in closed form; 0 leaves these out."""
    rank: int = 16  # of the low-rank map
    finetune: int = 0
    """Tokens that it is fine-tuned on; 0 leaves this out."""
    finetune_lr: float = 0.0
    """Peak learning rate of that; 0 is `sae.lr`."""
    budgets: tuple[int, ...] = ()
    """Fewer tokens, for each of which one more dictionary is retrained, and fine-tuned: the budget curves."""
    again: bool = False
    """Retrain from `train.reseed` too: intervals then reach over both seeds."""
    nonsense: bool = False
    """A random dictionary and one of shuffled activations: what nonsense reaches."""
    probes: bool = False
    """Sparse probes on classes of tokens that their text tells."""
    contexts: int = 0
    """Latents of each fate, at most, that are shown in text."""
    crosscoder: str = ""
    """The scheme for which a crosscoder over both models is trained too."""

    def __post_init__(self) -> None:
        check_at_least(self, "arms.", adapt=0, rank=1, finetune=0, finetune_lr=0, contexts=0)
        object.__setattr__(self, "budgets", tuple(sorted(set(self.budgets))))
        object.__setattr__(self, "crosscoder", self.crosscoder and str(parse_scheme(self.crosscoder)))
        if self.budgets and self.budgets[0] < 1:
            raise UserError(f"key `arms.budgets` holds {self.budgets[0]}: give numbers of tokens")


@dataclass(frozen=True)
class Study:
    """Everything that decides the numbers of a run."""

    model: str
    point: str
    schemes: tuple[str, ...]
    """Schemes of the audit."""
    compare: str = ""
    """The schemes, comma-separated, whose models dictionaries are retrained on; without one nothing is compared."""
    dictionary: str = ""
    """A dictionary that is there already, in place of training one: what `qsae sae info` takes."""
    tokens: TokensConfig = field(default_factory=TokensConfig)
    sae: SAEConfig = field(default_factory=SAEConfig)
    train: TrainTwiceConfig = field(default_factory=TrainTwiceConfig)
    arms: ArmsConfig = field(default_factory=ArmsConfig)
    at: dict[str, str] = field(default_factory=dict)
    """Dictionaries at other points, judged in the same passes: point -> what `qsae sae info` takes."""
    errors_at: tuple[str, ...] = ()
    """Points where only the error of the activations is measured; braces are several."""
    match: int = 0
    """Tokens on which the strengths of matched controls are found; 0: all of the audit's."""
    perplexity: tuple[Protocol, ...] = ()
    """Protocols of perplexity beside the audit's own."""
    predict: PredictConfig = field(default_factory=PredictConfig)
    contexts: CloserConfig = field(default_factory=CloserConfig)
    """The texts of the most damaged features."""
    act: CloserConfig = field(default_factory=CloserConfig)
    """Whether features still act: ablated and steered in both models."""
    expected: ExpectedConfig = field(default_factory=ExpectedConfig)
    processing: str = "none"
    """What is done to the weights after loading: `none`, or `transformer_lens`, as many published SAEs read them."""
    dtype: str = "float32"
    """Of weights and activations: `float32`, or `bfloat16`, to which quantized weights are rounded too."""
    batch: int = 0
    """Windows in a forward pass; 0 chooses by the device."""
    mesh: str = "1x1"
    """Devices over data x over model, or `auto`."""
    fsdp: bool = False
    """Whether the model's weights are cut over data too, for one that does not fit otherwise."""

    def __post_init__(self) -> None:
        check_processing(self.processing)
        if self.dtype not in ("float32", "bfloat16"):
            raise UserError(f"key `dtype` is `{self.dtype}`: choose float32 or bfloat16")
        if self.compare and self.tokens.compare > self.tokens.audit:
            raise UserError(
                f"key `tokens.compare` is {self.tokens.compare}: give at most tokens.audit, {self.tokens.audit}"
            )
        check_distinct(self.perplexity)
        check_at_least(self, "", match=0)
        if self.perplexity and self.tokens.source.startswith("npy:"):
            raise UserError(
                "key `perplexity` cuts the text anew, and npy: gives windows as they are: give a text source"
            )
        audited = names(self.schemes)
        for key, some in (("predict.schemes", self.predict.schemes), ("contexts.scheme", [self.contexts.scheme]),
                           ("act.scheme", [self.act.scheme])):  # fmt: skip
            if lacking := [name for name in some if name and name not in audited]:
                raise UserError(f"key `{key}`: `{lacking[0]}` is not in the audit: add it to `schemes`")
        self._check_points()
        self._check_arms()
        if self.sae.skip:
            raise UserError("key `sae.skip` is for transcoders, which `qsae train --target` makes: leave it out")
        if self.dictionary and self.compare:
            raise UserError("key `compare` retrains, key `dictionary` takes what is there: leave one of them out")

    @property
    def compared(self) -> tuple[str, ...]:
        return tuple(map(str, parse_schemes(self.compare))) if self.compare else ()

    def _check_arms(self) -> None:
        if any(parse_scheme(name).full for name in self.compared):
            raise UserError("key `compare` is `fp`: name the scheme to compare full precision with, for example int4")
        if self.arms != ArmsConfig() and not self.compare:
            raise UserError("table `arms` needs key `compare`: name the scheme whose model it is about")
        if self.arms.crosscoder and self.arms.crosscoder not in self.compared:
            raise UserError(f"key `arms.crosscoder`: `{self.arms.crosscoder}` is not in `compare`: add it there")
        if self.arms.budgets and self.arms.budgets[-1] >= self.train.tokens:
            raise UserError(f"key `arms.budgets` goes up to {self.arms.budgets[-1]}: stay below train.tokens")
        small = {"arms.budgets": min(self.arms.budgets, default=0), "arms.finetune": self.arms.finetune}
        for key, tokens in small.items():
            if 0 < tokens < self.train.batch:
                raise UserError(f"key `{key}`: {tokens} tokens are less than a step of {self.train.batch}, train.batch")
        if self.arms.probes and self.tokens.source.startswith("npy:"):
            raise UserError("key `arms.probes` reads the tokens' text, which npy: has none of: give a text source")

    def _check_points(self) -> None:
        at = {str(Point.parse(point)): name for point, name in self.at.items()}
        if len(at) < len(self.at) or str(Point.parse(self.point)) in at:
            raise UserError("key `at` names a point twice, or the study's own: its dictionary is named by `dictionary`")
        if at and not self.dictionary:
            raise UserError("key `at` names dictionaries at other points: name one for `point` too, with `dictionary`")
        object.__setattr__(self, "at", at)


# Sized for 8 minutes on two slow cores: a matrix product at 110 GFLOP/s, of which most of the time is made.
DEMO = Study(
    model=SMOLLM2,
    point="blocks.8.resid_post",
    schemes=("int8", "int7", "int6", "int5", "int4", "noise@int4"),
    compare="int4",
    sae=SAEConfig(sparsity="topk", k=32, expansion=8, lr=1.5e-3),
    tokens=TokensConfig(audit=4096, compare=2048),
    train=TrainTwiceConfig(tokens=73_728),
    arms=ArmsConfig(adapt=4096),
)


def read_study(path: Path, settings: Sequence[str] = ()) -> Study:
    """A study from a TOML file, with `key=value` settings laid over it."""
    return build(Study, with_settings(read_toml(path), settings))
