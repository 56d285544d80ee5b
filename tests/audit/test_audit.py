"""The audit beside a slow float64 NumPy computation from the stored activations and logits."""

import json
import resource

import jax.numpy as jnp
import numpy as np
import pyarrow.parquet as pq
import pytest

from qsae_jax import audit, capture, fake_quantize
from qsae_jax.audit.survival import Survival
from qsae_jax.mesh import make_mesh, place
from qsae_jax.sae.model import SAE
from qsae_jax.sae.sparsity import ReLU

POINT, SKIP = "blocks.1.resid_post", 2
SCHEMES = ["int8", "int2-g8", "noise@int4"]


def slow_codes(sae, x):
    """float64 TopK codes of rows, by a sort."""
    W_enc, b_enc, b_dec = (np.asarray(getattr(sae, name)[...], np.float64) for name in ("W_enc", "b_enc", "b_dec"))
    pre = (x - b_dec) @ W_enc + b_enc
    lowest = np.sort(pre, axis=-1)[:, -sae.sparsity.k :][:, :1]
    return np.where(pre >= lowest, np.maximum(pre, 0), 0)


def slow_run(lm, sae, windows):
    x = np.asarray(capture(lm, POINT)(windows.ids), np.float64)[:, SKIP:].reshape(-1, sae.d)
    logits = np.asarray(lm(windows.ids), np.float64)[:, :-1]
    logp = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
    logp -= logits.max(-1, keepdims=True)
    return x, slow_codes(sae, x), logp


def slow_fvu(sae, x, z):
    W_dec, b_dec = (np.asarray(getattr(sae, name)[...], np.float64) for name in ("W_dec", "b_dec"))
    return ((x - z @ W_dec - b_dec) ** 2).sum() / ((x - x.mean(0)) ** 2).sum()


def slow_r(z, q):
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.array([np.corrcoef(z[:, i], q[:, i])[0, 1] for i in range(z.shape[1])])


@pytest.fixture(scope="module")
def judged(tiny_lm, tiny_sae, tiny_windows):
    """(the audit of 21 windows in batches of 4, so that the last is padded; its windows; the dictionary)."""
    windows, sae = tiny_windows(21), tiny_sae()
    return audit(tiny_lm, sae, windows, SCHEMES, POINT, skip_first=SKIP, batch=4), windows, sae


def test_every_number_equals_the_slow_computation(judged, tiny_lm):
    """r of every feature within 1e-4 (float32 activations are shared, float32 sums differ), the rest within 1e-4."""
    result, windows, sae = judged
    x, z, logp = slow_run(tiny_lm, sae, windows)
    active = (z > 0).mean(0) > 1e-3
    targets = windows.ids[:, 1:, None]
    base = -np.take_along_axis(logp, targets, -1).mean()
    assert result.facts["reference"]["ppl"] == pytest.approx(np.exp(base), rel=1e-5)
    assert result.facts["reference"]["fvu"] == pytest.approx(slow_fvu(sae, x, z), rel=1e-4)
    assert result.facts["reference"]["active"] == active.sum() > 20
    for row in result.facts["rows"]:
        y, q, logq = slow_run(fake_quantize(tiny_lm, row["scheme"]), sae, windows)
        r = slow_r(z, q)
        mine = result.features["r"][result.features["scheme"] == row["scheme"]]
        np.testing.assert_allclose(mine[active], np.nan_to_num(r[active]), atol=1e-4)
        assert np.abs(np.roll(mine, 1)[active] - np.nan_to_num(r[active])).max() > 0.02, "a shifted feature must show"
        r = np.nan_to_num(r[active])
        expected = {"survived": (r > 0.9).mean(), "damaged": (r < 0.5).mean(), "mean_r": r.mean()}
        expected |= {"blurred": ((r >= 0.5) & (r <= 0.9)).mean(), "median_r": np.median(r)}
        expected |= {"kl": (np.exp(logp) * (logp - logq)).sum(-1).mean(), "fvu": slow_fvu(sae, y, q)}
        expected |= {"activation_rel_mse": ((y - x) ** 2).sum() / (x**2).sum(), "l0": (q > 0).sum(1).mean()}
        ppl = np.exp(-np.take_along_axis(logq, targets, -1).mean())
        expected |= {"ppl": ppl, "delta_ppl": ppl / np.exp(base) - 1}
        for name, value in expected.items():
            assert row[name] == pytest.approx(value, rel=1e-4, abs=1e-4), (row["scheme"], name)


def test_the_table_of_features(judged, tiny_lm, tmp_path):
    """One row a scheme and latent; rates, means and peaks of both runs as NumPy has them; files read back."""
    result, windows, sae = judged
    result.write(tmp_path)
    table = pq.read_table(tmp_path / "features.parquet").to_pydict()
    assert len(table["r"]) == len(SCHEMES) * sae.latents
    _, z, _ = slow_run(tiny_lm, sae, windows)
    _, q, _ = slow_run(fake_quantize(tiny_lm, "int2-g8"), sae, windows)
    rows = np.array(table["scheme"]) == "int2-g8"
    for tail, codes in (("", z), ("_twin", q)):
        for name, value in (("firing_rate", (codes > 0).mean(0)), ("mean_activation", codes.mean(0))):
            np.testing.assert_allclose(np.array(table[name + tail])[rows], value, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(np.array(table["max_activation" + tail])[rows], codes.max(0), rtol=1e-4)
    facts = json.loads((tmp_path / "audit.json").read_text())
    tokens = {"n": 21 * 16, "seq": 16, "bos": False, "skip_first": SKIP, "counted": 21 * 14, "source": "random"}
    assert facts["tokens"] == tokens and [row["scheme"] for row in facts["rows"]] == SCHEMES


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(8, 1), (2, 4), (1, 8)])
def test_a_mesh_gives_the_same_audit(shape, judged, tiny_lm, tiny_sae, flat):
    """Weights cut over `model`, tokens over `data`: the numbers of one device within float32 sums."""
    result, windows, _ = judged
    mesh = make_mesh(*shape)
    lm, sae = place(tiny_lm, mesh), place(tiny_sae(), mesh)
    assert len({s.device for s in sae.W_enc[...].addressable_shards}) == shape[0] * shape[1]
    got = audit(lm, sae, windows, SCHEMES, POINT, skip_first=SKIP, batch=8, mesh=mesh)
    np.testing.assert_allclose(got.features["r"], result.features["r"], atol=2e-4)
    for mine, other in zip(got.facts["rows"], result.facts["rows"], strict=True):
        assert mine["scheme"] == other["scheme"]
        numbers = {name: value for name, value in flat(mine).items() if "intervals" not in name}
        assert numbers == pytest.approx({name: flat(other)[name] for name in numbers}, rel=2e-4, abs=2e-4, nan_ok=True)
        ends = {name: value for name, value in flat(mine).items() if "intervals" in name}
        assert ends == pytest.approx({name: flat(other)[name] for name in ends}, rel=2e-2, abs=2e-2, nan_ok=True)


def test_a_silenced_feature_is_damaged():
    """A feature that is active at full precision and silent in the twin has r 0, one silent in both has none."""
    eye, none = jnp.eye(16), jnp.zeros(16)
    sae = SAE(ReLU(), eye, none, eye, none)  # its codes are the positive part of what it reads
    z = np.random.default_rng(0).normal(size=(640, 16)).astype(np.float32)
    z[:, 0] = -1
    q = z.copy()
    q[:, 1] = -1
    sums = Survival(sae, ["fp", "twin"], 1)
    sums.add({"fp": jnp.asarray(z)[None], "twin": jnp.asarray(q)[None]}, np.ones(1, np.float32))
    r = sums.correlations("twin")
    assert np.isnan(r[0]) and r[1] == 0 and np.all(r[2:] > 0.999)
    assert sums.row("twin")["damaged"] == pytest.approx(1 / 15)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_tokens(tiny_lm, tiny_sae, tiny_windows):
    """Peak memory of 200,000 tokens within 10 % of that of 20,000; keeping the codes alone would break it."""

    def peak(n):
        audit(tiny_lm, tiny_sae(), tiny_windows(n // 16), ["int8"], POINT, batch=128)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    few, many = peak(20_000), peak(200_000)
    assert many < 1.1 * few
    kept = np.ones((200_000, 2048), np.float32)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > 1.1 * few, len(kept)
