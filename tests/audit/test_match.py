"""Controls matched by perplexity: the search itself, and on a tiny model."""

import math

import jax
import numpy as np
import pytest

from qsae_jax import audit, fake_quantize
from qsae_jax.audit.match import CLOSE, TRIES, Matching, bisect, sentences
from qsae_jax.audit.run import in_groups
from qsae_jax.errors import UserError
from qsae_jax.mesh import make_mesh
from qsae_jax.quant.scheme import parse_scheme

POINT = "blocks.1.resid_post"


def found(f, target, first=0.25, most=0.99):
    tried = {}

    def at(strength):
        tried[strength] = f(strength)
        return tried[strength]

    bisect(at, target, f(0), first, most)
    best = min(tried, key=lambda s: abs(math.log(tried[s] / target)))
    return best, tried


@pytest.mark.parametrize("target", [26, 48, 500])
@pytest.mark.parametrize("shape", [0.7, 1.0, 2.5, 6.0])
def test_a_smooth_damage_is_met(target, shape):
    """Whatever the curve bends like, within a thousandth. Control: the start is not that close."""

    def damage(s):
        return 24 * math.exp(20 * s**shape)

    best, tried = found(damage, target)
    assert abs(damage(best) / target - 1) < CLOSE and len(tried) <= TRIES
    assert best == float(f"{best:.6g}")
    assert abs(damage(0.25) / target - 1) > CLOSE


def test_what_cannot_be_met_comes_as_near_as_it_can():
    """A target beyond the strongest control, and across a jump."""
    best, tried = found(lambda s: 24 + s, 1000)
    assert best == 0.99 and len(tried) == 3  # 0.25, 0.5, 0.99
    _, tried = found(lambda s: 24 if s < 0.4 else 96, 50)
    assert min(abs(s - 0.4) for s in tried) < 0.01


def perplexity(lm, windows):
    logits = np.asarray(lm(windows.ids), np.float64)[:, :-1]
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return np.exp(-np.take_along_axis(logp, windows.ids[:, 1:, None], -1).mean())


@pytest.mark.parametrize("name", ["prune~int2", "noise~int2", "prune~int2[0-1]"])
def test_the_match_is_real(name, tiny_lm, tiny_windows):
    """The perplexities that are told are those of the models themselves, counted slowly (1e-5); the control keeps to
    the scheme's weights. Control: the model at another strength is off."""
    windows = tiny_windows(5)
    matching = Matching(tiny_lm, windows, 2, make_mesh(1, 1))
    schemes, facts = matching.resolve({name: parse_scheme(name), "int8": parse_scheme("int8")})
    one, where = facts[name], schemes[name].rules[0].where
    assert str(schemes["int8"]) == "int8" and set(facts) == {name} and str(schemes[name]) == one["scheme"]
    assert where == parse_scheme(name).rules[0].where
    target = perplexity(fake_quantize(tiny_lm, "int2" + str(where)), windows)
    assert one["wanted_ppl"] == pytest.approx(target, rel=1e-5)
    assert one["ppl"] == pytest.approx(perplexity(fake_quantize(tiny_lm, one["scheme"]), windows), rel=1e-5)
    assert one["error"] == pytest.approx(one["ppl"] / one["wanted_ppl"] - 1)
    assert one["tokens"] == 80 and one["tried"] <= TRIES


@pytest.mark.slow
def test_an_audit_with_matched_controls(tiny_lm, tiny_sae, tiny_windows):
    """The row keeps the name that was asked for and tells the control that was found; it is the audit of that control
    (1e-6). Notes say how near it came, and what sizes made of a scheme."""
    windows, sae = tiny_windows(5), tiny_sae()
    facts = audit(tiny_lm, sae, windows, ["int2", "noise~int2", "mxfp4"], POINT, batch=5).facts
    rows = {row["scheme"]: row for row in facts["rows"]}
    assert list(rows) == ["int2", "noise~int2", "mxfp4"]
    match = rows["noise~int2"]["matched"]
    assert "matched" not in rows["int2"] and [row["control"] for row in facts["rows"]] == [False, True, False]
    (direct,) = audit(tiny_lm, sae, windows, [match["scheme"]], POINT, batch=5).facts["rows"]
    for key in ("ppl", "kl", "survived", "mean_r", "weight_rel_error"):
        assert rows["noise~int2"][key] == pytest.approx(direct[key], rel=1e-6)
    assert any(note.startswith(f"noise~int2 is {match['scheme']}, found by bisection") for note in facts["notes"])
    assert any(note.startswith("mxfp4: in rows of 16 the last group has 16 of 32") for note in facts["notes"])


@pytest.mark.slow
def test_groups_of_twins_change_nothing(tiny_lm, tiny_sae, tiny_windows, flat, monkeypatch):
    """One twin at a time or all at once: equal rows, features and reference. Control: another scheme's row differs."""
    from qsae_jax.audit import run

    names, windows, sae = ["int8", "int4", "int3", "int2", "nf4"], tiny_windows(5), tiny_sae()
    results = []
    for size in (1, 2, 8):
        monkeypatch.setattr(run, "at_once", lambda lm, size=size: size)
        results.append(audit(tiny_lm, sae, windows, names, POINT, batch=5))
    rows = [{row["scheme"]: row for row in result.facts["rows"]} for result in results]
    assert all(list(one) == names for one in rows)
    for other, mine in zip(results[1:], rows[1:], strict=True):
        assert flat(other.facts["reference"]) == pytest.approx(flat(results[0].facts["reference"]))
        for name in names:
            numbers = flat(mine[name])
            assert numbers == pytest.approx(flat(rows[0][name]), rel=1e-5, abs=1e-6, nan_ok=True)
        for key, column in results[0].features.items():
            if column.dtype.kind == "f":
                np.testing.assert_allclose(column, other.features[key], atol=1e-5)
            else:
                np.testing.assert_array_equal(column, other.features[key])
    assert results[0].facts["rows"][0]["ppl"] != results[0].facts["rows"][1]["ppl"]


def test_as_many_twins_as_fit(tiny_lm, monkeypatch):
    from qsae_jax.audit import run

    schemes = {f"int{bits}": parse_scheme(f"int{bits}") for bits in range(2, 9)}
    assert [len(group) for group in in_groups(schemes, 3)] == [3, 2, 2]
    assert {name for group in in_groups(schemes, 3) for name in group} == set(schemes)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(tiny_lm))
    for free, fit in ((0, 1), (7 * size, 3), (10**12, run.MOST)):
        monkeypatch.setattr(run, "free_bytes", lambda free=free: free)
        assert run.at_once(tiny_lm) == fit


def test_a_scheme_that_does_not_fit_is_refused_before_any_work(tiny_lm, tiny_sae, tiny_windows, monkeypatch):
    """Even as the last of the list, and inside a matched control."""
    from qsae_jax.audit import run

    monkeypatch.setattr(run, "fake_quantize", lambda *_: pytest.fail("work was begun"))
    for name in ("int4[9]", "int4-g64", "prune~int4-g64"):
        with pytest.raises(UserError):
            audit(tiny_lm, tiny_sae(), tiny_windows(2), ["int8", name], POINT)


def test_a_small_change_is_met_in_proportion():
    """Where a scheme costs a twentieth of a percent, so does its control, within two hundredths of that."""
    best, _ = found(lambda s: 20 * math.exp(6 * s * s), 20.012)
    assert math.log(20 * math.exp(6 * best**2) / 20) == pytest.approx(math.log(20.012 / 20), rel=0.02)


def test_nothing_to_match(tiny_lm, tiny_windows):
    """A scheme that costs no perplexity is matched by full precision, and the note says so; one without a perplexity
    is refused."""
    matching = Matching(tiny_lm, tiny_windows(2), 2, make_mesh(1, 1))
    matching.found |= {"fp": 400.0, "int8": 399.0, "int2": math.nan}
    schemes, facts = matching.resolve({"prune~int8": parse_scheme("prune~int8")})
    assert schemes["prune~int8"].full and facts["prune~int8"]["scheme"] == "fp"
    assert sentences(facts) == [
        "prune~int8: its scheme costs no perplexity on these tokens, so the row is that of full precision."
    ]
    with pytest.raises(UserError, match="the perplexity of int2 is nan"):
        matching.resolve({"noise~int2": parse_scheme("noise~int2")})
