"""fake_quantize against the slow quantizer on the exported matrices, which lie as torch's Linear has them."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from qsae_jax.errors import UserError
from qsae_jax.lm.load import load_lm
from qsae_jax.lm.save import save_lm
from qsae_jax.mesh import make_mesh, place
from qsae_jax.quant.fake import fake_quantize, linear_weights, weight_errors
from qsae_jax.quant.names import EXAMPLES
from qsae_jax.quant.scheme import parse_scheme

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
NAMES = ["int4", "int3-tensor", "int4-g8", "int2-g7-asym", "int5-g21-signed_full", "int4-half", "int6-g32-no_clip"]


@pytest.fixture
def exported(tmp_path):
    """The tensors of an LM's Hugging Face folder, `[out, in]`."""

    def export(lm, name="out"):
        save_lm(lm, tmp_path / name)
        return load_file(tmp_path / name / "model.safetensors")

    return export


@pytest.mark.parametrize("name", NAMES)
def test_equal_to_quantizing_the_exported_rows(lm, exported, slow_quantize, name):
    """Export, then round every row of `[out, in]` in NumPy, or round, then export: bit-equal, for all seven matrices
    of each block, with groups that cut across heads (6) and leave a rest. Control: rounding columns is another."""
    how = parse_scheme(name).rules[0].how
    grid, group = how.grid, how.groups.inputs if how.groups.outputs else -1
    before, after = exported(lm, "before"), exported(fake_quantize(lm, name), "after")
    matrices = [key for key in before if key.split(".")[-2] in LINEAR]
    assert len(matrices) == 14
    for key in matrices:
        w = before[key]
        np.testing.assert_array_equal(after[key], slow_quantize(w, grid.bits, grid.convention, group), key)
        assert (after[key] != w).mean() > 0.9
        if group >= 0:
            assert (after[key] != slow_quantize(w.T, grid.bits, grid.convention, group).T).any(), key


def test_equal_to_torch_rows(torch, lm, exported):
    """The paper's int4 in five lines of torch on nn.Linear weights: within 1e-6 of the row's largest weight (torch
    divides by the scale, which moves no code here). Control: one scale for the whole matrix is far away."""

    def by(w, dims):
        scale = w.abs().amax(dims, keepdim=True) / 7
        return torch.clamp(torch.round(w / scale), -8, 7) * scale

    before, after = exported(lm, "before"), exported(fake_quantize(lm, "int4"), "after")
    for key, w in before.items():
        if key.split(".")[-2] in LINEAR:
            w, ours = torch.from_numpy(w), torch.from_numpy(after[key])
            assert (ours - by(w, (1,))).abs().max() < 1e-6 * w.abs().max()
            assert (ours - by(w, (0, 1))).abs().max() > 1e-2 * w.abs().max()


@pytest.mark.parametrize("name", ["int4", "int4-tensor", "noise@int4"])
def test_only_block_matrices_change(lm, exported, name):
    """Embedding, head and norms are bit-equal, the model that was given too. Control: every matrix did change."""
    kept = jax.tree.map(lambda x: np.array(x, copy=True), lm)
    twin = fake_quantize(lm, name)
    for a, b in zip(jax.tree.leaves(kept), jax.tree.leaves(lm), strict=True):
        np.testing.assert_array_equal(a, b)
    before, after = exported(lm, "before"), exported(twin, "after")
    changed = {key for key in before if (before[key] != after[key]).any()}
    assert changed == {key for key in before if key.split(".")[-2] in LINEAR}
    assert twin.config == lm.config and twin is not lm


def test_full_precision_changes_nothing(lm):
    for a, b in zip(jax.tree.leaves(fake_quantize(lm, "fp")), jax.tree.leaves(lm), strict=True):
        np.testing.assert_array_equal(a, b)


# Where the extremum need not be a code, or the error is new each time, rounding twice is not rounding once.
AGAIN = ("int4-half", "noise@int4", "permuted@int4", "nf4-double")
UNFIT = {"int4[4-8]": "there is no block 8", "prune~int4": "found by perplexity"}
WIDE = "groups of (128|64) are wider than every matrix .40 inputs"


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_example_runs_and_rounding_twice_is_rounding_once(lm, name):
    """Q(Q(W)) = Q(W) within 1e-6 where the extremum is on the grid."""
    wide = ("-g64" in name or "-g128" in name) and WIDE
    if said := UNFIT.get(name) or wide:
        with pytest.raises(UserError, match=said):
            fake_quantize(lm, name)
        return
    once = fake_quantize(lm, name)
    error = weight_errors(lm, once)["all"]
    assert (error > 0) == (name not in ("fp", "same"))
    twice = weight_errors(once, fake_quantize(once, name))["all"]
    if name in AGAIN:
        assert twice > 1e-4
    else:
        assert twice < 1e-6


def test_errors_are_those_of_numpy(lm):
    """Relative Frobenius norms, 1e-5; `all` is of the matrices laid end to end, not the mean."""
    twin = fake_quantize(lm, "int3")
    told = weight_errors(lm, twin)
    pairs = {path: (np.asarray(w[...], float), np.asarray(v[...], float))
             for (path, w), (_, v) in zip(linear_weights(lm), linear_weights(twin), strict=True)}  # fmt: skip
    slow = {path: np.linalg.norm(w - v) / np.linalg.norm(w) for path, (w, v) in pairs.items()}
    total = [np.concatenate([x.ravel() for x in side]) for side in zip(*pairs.values(), strict=True)]
    slow["all"] = np.linalg.norm(total[0] - total[1]) / np.linalg.norm(total[0])
    assert told.keys() == slow.keys() and len(told) == 15
    assert told == pytest.approx(slow, rel=1e-5)
    assert abs(slow["all"] - np.mean([told[path] for path in pairs])) > 1e-4 * slow["all"]


def test_errors_fall_with_bits(lm):
    """By a factor of about two a bit; by less for smaller groups than for rows, and most for the matrix."""
    errors = [weight_errors(lm, fake_quantize(lm, f"int{bits}"))["all"] for bits in range(2, 9)]
    assert all(1.8 < a / b < 3.5 for a, b in pairwise(errors))
    by = [weight_errors(lm, fake_quantize(lm, f"int4-{part}"))["all"] for part in ("g5", "channel", "tensor")]
    assert by == sorted(by) and by[0] < 0.9 * by[2]


def test_sixteen_bit_models(lm, slow_quantize):
    """The scale is computed in float32 from bfloat16 weights, and the result cut to bfloat16; control: float32
    weights give another result."""
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), lm)
    twin = fake_quantize(half, "int4")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(twin)} == {"bfloat16"}
    w, ours = (np.asarray(x.blocks[1].mlp.down[...], np.float32).T for x in (half, twin))
    expected = np.asarray(jnp.asarray(slow_quantize(w, 4), jnp.bfloat16), np.float32)
    np.testing.assert_array_equal(ours, expected)
    assert (ours != np.asarray(fake_quantize(lm, "int4").blocks[1].mlp.down[...]).T).any()


ON_A_MESH = (
    *("int4", "int4-tensor", "int3-g7-asym", "int4-duan2026", "int4-g8-mse", "int4-g8-hqq", "int4-stochastic"),
    *("nvfp4", "nf4-double", "prune0.3", "permuted@int4", "int4[embed]+fp8_e4m3"),
)


@pytest.mark.parametrize("name", ON_A_MESH)
def test_on_a_mesh(lm, name):
    """Weights cut over eight devices give the same bits, and stay cut. Control: they were cut."""
    mesh = make_mesh(1, 8)
    cut = place(lm, mesh)
    twin = fake_quantize(cut, name)
    for (path, a), (_, b) in zip(linear_weights(fake_quantize(lm, name)), linear_weights(twin), strict=True):
        np.testing.assert_array_equal(np.asarray(a[...]), np.asarray(b[...]), path)
    up = twin.blocks[0].mlp.up.get_value()
    assert cut.blocks[0].mlp.up.get_value().addressable_shards[0].data.shape == (20, 5)
    assert up.addressable_shards[0].data.shape == (20, 5)


def test_the_twin_is_saved_and_loaded_as_it_is(lm, tmp_path):
    twin = fake_quantize(lm, "int4-g7-asym")
    save_lm(twin, tmp_path / "twin")
    again = load_lm(str(tmp_path / "twin"))
    state = [nnx.to_flat_state(nnx.state(x)) for x in (twin, again)]
    assert all(bool((a.get_value() == b.get_value()).all()) for (_, a), (_, b) in zip(*state, strict=True))


def test_groups_wider_than_every_matrix_are_refused(lm):
    """The widest has 40 inputs; control: 40 itself is a row of it, and all of every other."""
    fake_quantize(lm, "int4-g40")
    with pytest.raises(UserError, match=r"`int4-g41`.*40 inputs"):
        fake_quantize(lm, "int4-g41")
