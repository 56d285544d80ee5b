"""TransformerLens's processing leaves every probability what it was, and moves the stream as it should.

The comparison with TransformerLens itself is in tests/peers. Here: log-probabilities within 1e-4 (float32; values of
order 10), for every configuration of every family; what is centred is centred, what is folded is gone.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qsae_jax.errors import UserError
from qsae_jax.lm.families import HUB
from qsae_jax.lm.layers import LayerNorm
from qsae_jax.lm.load import abstract_lm, load_lm
from qsae_jax.lm.process import as_transformer_lens, moves, process
from qsae_jax.lm.save import save_lm
from qsae_jax.lm.tap import capture, points
from qsae_jax.mesh import make_mesh
from tests.lm.families import CONFIGS

TOLERANCE, FAULT = 1e-4, 1e-2
CASES = [(name, i) for name, configs in CONFIGS.items() for i in range(len(configs))]


def random_lm(name, i):
    """A model of the family, every weight random and none with a mean of zero."""
    random = np.random.default_rng(5)
    config = HUB[name].config(dict(CONFIGS[name][i]))
    return jax.tree.map(lambda x: jnp.asarray(random.normal(0.1, 0.3, x.shape), x.dtype), abstract_lm(config))


def log_probabilities(lm, tokens):
    return np.asarray(jax.nn.log_softmax(lm(tokens)))


@pytest.mark.parametrize("name, i", CASES)
def test_probabilities_stay(tokens, name, i):
    """Control: with the mean taken out of one more matrix that a norm does not hide, they do not."""
    lm = random_lm(name, i)
    before = log_probabilities(lm, tokens)
    kept = [np.asarray(x) for x in jax.tree.leaves(nnx.state(lm))]
    new = process(lm, "transformer_lens", make_mesh(1, 1))
    assert np.abs(log_probabilities(new, tokens) - before).max() < TOLERANCE
    assert new.config.processing == "transformer_lens" and lm.config.processing == "none"
    for a, b in zip(kept, jax.tree.leaves(nnx.state(lm)), strict=True):
        np.testing.assert_array_equal(a, b)  # the model given is untouched
    # The tree is that of the new config, so that everything else treats it as any model.
    shapes = {path: leaf.shape for path, leaf in nnx.to_flat_state(nnx.state(abstract_lm(new.config)))}
    assert {path: leaf.shape for path, leaf in nnx.to_flat_state(nnx.state(new))} == shapes
    new.blocks[1].attn.o.set_value(new.blocks[1].attn.o[...] - new.blocks[1].attn.o[...].mean(0, keepdims=True))
    assert np.abs(log_probabilities(new, tokens) - before).max() > FAULT


@pytest.mark.parametrize("name", CONFIGS)
def test_what_moves(tokens, name):
    """With LayerNorm every point of the stream loses its mean over the width and keeps the rest; with RMSNorm it
    stays, bit for bit the same within 1e-4. Control: before, the stream had a mean."""
    lm = random_lm(name, 0)
    at = [f"blocks.{layer}.resid_{where}" for layer in (0, 2) for where in ("pre", "post")]
    before = {point: np.asarray(x) for point, x in capture(lm, at)(tokens).items()}
    new = process(lm, "transformer_lens", make_mesh(1, 1))
    layer_norm = lm.config.layer_norm
    for point, x in capture(new, at)(tokens).items():
        mean = before[point].mean(-1, keepdims=True)
        assert np.abs(mean).max() > FAULT
        np.testing.assert_allclose(x, before[point] - (mean if layer_norm else 0), atol=TOLERANCE)
    for block in new.blocks:
        for norm in (block.attn_norm, block.mlp_norm):
            assert isinstance(norm, LayerNorm) == layer_norm
            np.testing.assert_allclose(norm.scale[...], 1.0 - new.config.norm_offset)
            assert not layer_norm or not np.any(norm.bias[...])
        assert block.attn.v_bias is None or not np.any(block.attn.v_bias[...])


@pytest.mark.parametrize("name, i", [("gpt2", 0), ("gpt_neox", 2), ("llama", 0), ("llama", 2), ("gemma2", 0)])
def test_which_points_move(tokens, name, i):
    """`moves` against every point of a model in both forms: those that it names differ by more than 1e-3, the others
    by less than 1e-4. Control: there are points of both kinds."""
    lm = random_lm(name, i)
    new = process(lm, "transformer_lens", make_mesh(1, 1))
    a, b = (capture(x, points(lm))(tokens) for x in (lm, new))
    apart = {point: float(np.abs(a[point] - b[point]).max()) for point in a}
    assert {str(p) for p, d in apart.items() if d > 1e-3} == {str(p) for p in apart if moves(lm.config, p.site)}
    assert all(d > 1e-3 or d < TOLERANCE for d in apart.values())
    assert 0 < sum(moves(lm.config, p.site) for p in apart) < len(apart)


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "llama"])
def test_the_head(name):
    """Its own, and without a mean over the vocabulary where no cap would notice."""
    lm = random_lm(name, 0)
    new = as_transformer_lens(nnx.clone(lm))
    assert not new.config.tied
    mean = float(np.abs(np.asarray(new.head[...]).mean(0)).max())
    assert (mean < 1e-6) == (not lm.config.logit_cap) == (name != "gemma2")


@pytest.mark.parametrize("name", ["gpt2", "qwen2"])
def test_no_export(tmp_path, name):
    """A processed model has biases that its family has no place for. Control: as it is, it is saved."""
    lm = random_lm(name, 0)
    with pytest.raises(UserError, match="unprocessed"):
        save_lm(as_transformer_lens(nnx.clone(lm)), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    save_lm(lm, tmp_path / "out")


def test_unknown_names(facts, tensors, write_folder):
    folder = str(write_folder(facts, tensors(facts)))
    with pytest.raises(UserError, match=r"transformer_lense.*nearest: transformer_lens"):
        load_lm(folder, processing="transformer_lense")
