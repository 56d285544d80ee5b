"""Controls matched by perplexity: how much pruning, or noise, costs as much perplexity as a quantizer does.

The strength (a fraction of the weights, a factor of the noise) is found by bisection on the tokens of the audit. What
is left of the difference is reported with the result: a match is never exact (arXiv 2606.03002 matches int6's 14.7 %
with a pruning of 13.5 %)."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from jax.sharding import Mesh

from qsae_jax.acts.tokens import Windows, in_order, windows_per_forward
from qsae_jax.audit.kept import Kept
from qsae_jax.audit.perplexity import Losses
from qsae_jax.errors import Interrupted, UserError
from qsae_jax.lm.model import LM
from qsae_jax.lm.tap import FINAL, activations
from qsae_jax.mesh import on_data, return_freed
from qsae_jax.progress import progress, stop_signal
from qsae_jax.quant.fake import fake_quantize
from qsae_jax.quant.scheme import Scheme

CLOSE, SHARE, TRIES = 1e-3, 0.02, 12
"""A match is good enough when log perplexity is within CLOSE of the target and within SHARE of the change that is
wanted, so that also a small change is met; and how many strengths are tried for it."""
MOST = {"prune": 0.99, "noise": 64.0}


@dataclass
class Matching:
    """Finds the strengths of matched controls for one model on one set of windows."""

    lm: LM
    windows: Windows
    batch: int
    mesh: Mesh
    kept: Kept = field(default_factory=lambda: Kept(None))

    def __post_init__(self) -> None:
        # JSON has no infinity: what was none is no number here either.
        before = self.kept.begun["matches"]
        self.found: dict[str, float] = {name: math.nan if value is None else value for name, value in before.items()}
        """Perplexities by scheme."""

    def resolve(self, schemes: dict[str, Scheme]) -> tuple[dict[str, Scheme], dict[str, dict[str, Any]]]:
        """Schemes that can be applied, under the names that were asked for, and what was found of each match."""
        wanted = {name: scheme for name, scheme in schemes.items() if scheme.matched}
        facts = {}
        with progress("match", len(wanted) * (TRIES + 1)) as advance, stop_signal() as stopped:
            for name, scheme in wanted.items():
                wanted[name], facts[name] = self._match(scheme, advance, stopped)
        return schemes | wanted, facts

    def _match(
        self, scheme: Scheme, advance: Callable[..., None], stopped: Callable[[], bool]
    ) -> tuple[Scheme, dict[str, Any]]:
        matched = scheme.matched
        assert matched
        full, target = (self._perplexity(s, stopped) for s in (Scheme(), scheme.with_how(matched.of)))
        if not math.isfinite(target):
            raise UserError(f"scheme `{scheme}`: the perplexity of {matched.of} is {target}: there is nothing to match")
        if target <= full:
            facts = {"scheme": "fp", "ppl": full, "wanted_ppl": target, "error": full / target - 1, "tried": 0}
            return scheme.with_how(None), facts | {"share": None, "tokens": len(self.windows) * self.windows.seq}
        tried: dict[float, float] = {}

        def at(strength: float) -> float:
            found = self._perplexity(scheme.with_how(matched.at(strength)), stopped)
            tried[strength] = math.inf if math.isnan(found) else found
            advance(1, ppl=tried[strength], wanted=target)
            return tried[strength]

        bisect(at, target, full, 0.25 if matched.by == "prune" else 1.0, MOST[matched.by])
        best = min(tried, key=lambda strength: abs(math.log(tried[strength] / target)))
        advance(TRIES + 1 - len(tried))
        chosen = scheme.with_how(matched.at(best))
        facts = {"scheme": str(chosen), "ppl": tried[best], "wanted_ppl": target, "error": tried[best] / target - 1}
        facts |= {"share": math.log(tried[best] / full) / math.log(target / full), "tried": len(tried)}
        return chosen, facts | {"tokens": len(self.windows) * self.windows.seq}

    def _perplexity(self, scheme: Scheme, stopped: Callable[[], bool]) -> float:
        name = str(scheme)
        if name not in self.found:
            twin, losses = fake_quantize(self.lm, scheme), Losses(["fp"], len(self.windows))
            for ids, weight in in_order(self.windows, windows_per_forward(self.batch, self.windows, self.mesh)):
                tokens = on_data(ids, self.mesh)
                (final,) = activations(twin, (FINAL,), tokens)
                losses.add([twin], [final], tokens, weight)
                if stopped():
                    raise Interrupted("audit stopped; the same command goes on")
            self.found[name] = losses.perplexity("fp")
            self.kept.note(matches=self.found)
            del twin
            return_freed()
        return self.found[name]


def bisect(at: Callable[[float], float], target: float, full: float, first: float, most: float) -> None:
    """Try strengths until `at` is close enough to the target. They are doubled from the first until it is passed, and
    the interval is then bisected where the line through its ends (of log perplexity) meets the target, no nearer to
    an end than a tenth of it. `full` is what strength 0 gives, less than the target. A strength has six digits, as it
    is printed."""
    change = math.log(target / full)
    low, high, strength, before = (0.0, -change), None, first, 0.0
    for _ in range(TRIES):
        off = math.log(at(strength) / target)
        if abs(off) < min(CLOSE, SHARE * change) or (high is None and strength == most and off < 0):
            return
        low, high = ((strength, off), high) if off < 0 else (low, (strength, off))
        if high is None:
            strength = min(2 * strength, most)
            continue
        line = off * before <= 0  # Twice on one side: the curve bends, and halving is surer.
        share = min(max(-low[1] / (high[1] - low[1]), 0.1), 0.9) if line else 0.5
        before = off
        strength = float(f"{low[0] + share * (high[0] - low[0]):.6g}")
        if strength in (low[0], high[0]):
            return


def sentences(facts: dict[str, dict[str, Any]]) -> Sequence[str]:
    """What a reader must know of each match."""
    return [
        f"{name}: its scheme costs no perplexity on these tokens, so the row is that of full precision."
        if one["scheme"] == "fp"
        else f"{name} is {one['scheme']}, found by bisection: perplexity {one['ppl']:.5g} where "
        f"{one['wanted_ppl']:.5g} is wanted ({100 * one['error']:+.2f} %)."
        for name, one in facts.items()
    ]
