"""What a study asks beyond its audit and its comparison: tables of its TOML file."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from qsae_jax.config import check_at_least
from qsae_jax.errors import UserError
from qsae_jax.quant.scheme import parse_scheme, parse_schemes


def names(schemes: Sequence[str]) -> tuple[str, ...]:
    """Schemes by their full names."""
    return tuple(map(str, parse_schemes(",".join(schemes)))) if schemes else ()


@dataclass(frozen=True)
class CloserConfig:
    """Single features, looked at more closely under one scheme of the audit."""

    scheme: str = ""
    """Empty: the quantizer that leaves the fewest features."""
    features: int = 0
    """How many; 0 leaves this out."""
    tokens: int = 4096
    """The first of the audit's."""

    def __post_init__(self) -> None:
        check_at_least(self, "", features=0, tokens=1)
        if self.scheme and not self.features:
            raise UserError(
                f"`{self.scheme}` is to be looked at more closely: say at how many features, with `features`"
            )
        object.__setattr__(self, "scheme", self.scheme and str(parse_scheme(self.scheme)))


@dataclass(frozen=True)
class PredictConfig:
    """Who survives: predicted from what full precision alone knows of a feature."""

    schemes: tuple[str, ...] = ()
    """For which schemes of the audit; none leaves this out."""
    others: tuple[str, ...] = ()
    """Folders of other audits (another model, layer or dictionary) that the predictor is carried over to and from."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "schemes", names(self.schemes))
        for folder in self.others:
            if not (Path(folder) / "features.parquet").is_file():
                raise UserError(f"key `predict.others`: `{folder}` holds no features.parquet: name an audit's folder")


@dataclass(frozen=True)
class ExpectedConfig:
    """What somebody published, to be shown beside what is found."""

    source: str = ""
    rows: dict[str, dict[str, float]] = field(default_factory=dict)
    """Scheme -> a number of its row -> its value; `fp` for full precision."""
    within: dict[str, float] = field(default_factory=dict)
    """How far a number may be off: relative for `ppl`, else absolute."""

    def __post_init__(self) -> None:
        named = {str(parse_scheme(name)): row for name, row in self.rows.items()}
        object.__setattr__(self, "rows", named)
        if wrong := [name for name, row in named.items() if not row.get("ppl", 1) > 0]:
            raise UserError(f"key `expected.rows.{wrong[0]}.ppl` is not above 0: give the published perplexity")
