"""Dictionaries that cross between us and the real SAELens, both ways."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qsae_jax.errors import UserError
from qsae_jax.sae.formats import load_stored, save_sae
from qsae_jax.sae.model import SAE
from qsae_jax.sae.sparsity import ReLU, TopK

sae_lens = pytest.importorskip("sae_lens")
torch = pytest.importorskip("torch")

CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # float32 sums of 8 and 24 products


@pytest.fixture
def x():
    return 2 * np.random.default_rng(9).standard_normal((7, 8), np.float32) + 1


def random_arrays(seed=0):
    rng = np.random.default_rng(seed)
    lengths = rng.permutation(np.linspace(0.3, 2, 24))[:, None]
    return {
        "W_enc": rng.standard_normal((8, 24), np.float32),
        "b_enc": rng.standard_normal(24, np.float32),
        "W_dec": (rng.standard_normal((24, 8)) * lengths).astype(np.float32),
        "b_dec": rng.standard_normal(8, np.float32),
    }


def theirs(sae, x):
    """Codes and reconstruction of SAELens."""
    with torch.no_grad():
        codes = sae.encode(torch.tensor(x))
        return codes.numpy(), sae.decode(codes).numpy()


def ours(sae, x):
    return np.asarray(sae.encode(x)), np.asarray(sae(x))


def agree(one, two):
    return all(np.allclose(a, b, **CLOSE) for a, b in zip(one, two, strict=True))


def swapped(sae, name):
    """The control: two latents of one array exchanged."""
    w = getattr(sae, name)
    i, j = (0, 1) if name == "W_dec" else ((slice(None), 0), (slice(None), 1))
    w[...] = w[...].at[i].set(w[...][j]).at[j].set(w[...][i])
    return sae


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("sparsity", [TopK(3), ReLU()], ids=["topk", "relu"])
def test_saelens_reads_ours(tmp_path, x, sparsity, centred):
    """Codes and reconstructions to 1e-5, and the metadata. Controls: rows of W_enc, or of W_dec, swapped."""
    sae = SAE(sparsity, *(jnp.asarray(a) for a in random_arrays().values()), centred=centred)
    facts = {"quantization": "int4-g128", "hook_name": "blocks.1.hook_resid_post", "model_name": "random"}
    save_sae(sae, tmp_path / "sae", facts)
    loaded = sae_lens.SAE.load_from_disk(tmp_path / "sae")
    assert agree(ours(sae, x), theirs(loaded, x))
    assert facts.items() <= loaded.cfg.metadata.to_dict().items()
    assert not agree(ours(swapped(sae, "W_enc"), x), theirs(loaded, x))
    assert not agree(ours(swapped(swapped(sae, "W_enc"), "W_dec"), x), theirs(loaded, x))


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("kind", ["topk", "topk rescaled", "standard"])
def test_we_read_those_of_saelens(tmp_path, x, kind, centred):
    """Codes and reconstructions to 1e-5, and the metadata. Control: rows of W_enc swapped."""
    facts = {"d_in": 8, "d_sae": 24, "apply_b_dec_to_input": centred}
    if kind == "standard":
        sae = sae_lens.StandardSAE(sae_lens.StandardSAEConfig(**facts))
    else:
        rescaled = kind == "topk rescaled"
        sae = sae_lens.TopKSAE(sae_lens.TopKSAEConfig(**facts, k=3, rescale_acts_by_decoder_norm=rescaled))
    sae.load_state_dict({name: torch.tensor(a) for name, a in random_arrays(1).items()})
    sae.cfg.metadata.hook_name = "blocks.1.hook_resid_post"
    sae.save_model(tmp_path)
    stored = load_stored(tmp_path)
    assert agree(ours(stored.sae, x), theirs(sae, x))
    assert stored.metadata["hook_name"] == "blocks.1.hook_resid_post"
    assert not agree(ours(swapped(stored.sae, "W_enc"), x), theirs(sae, x))


@pytest.mark.parametrize("mode", ["layer_norm", "expected_average_only_in"])
def test_what_we_cannot_read_is_refused(tmp_path, mode):
    """A run-time normalisation that SAELens wrote. Control: the same dictionary without it is read."""
    for norm in "none", mode:
        config = sae_lens.StandardSAEConfig(d_in=8, d_sae=24, normalize_activations=norm)
        sae_lens.StandardSAE(config).save_model(tmp_path / norm)
    load_stored(tmp_path / "none")
    with pytest.raises(UserError, match=f"normalize_activations is `{mode}`"):
        load_stored(tmp_path / mode)


def test_training_exports_what_saelens_reads(tmp_path, x):
    """A trained and folded dictionary, whose activations have mean square norm far from 1. Control: its biases not
    folded differ."""
    from qsae_jax.mesh import make_mesh
    from qsae_jax.sae.train import SAEConfig, finished, make_step, start

    mesh, config = make_mesh(1, 1), SAEConfig(k=3, lr=0.01)
    acts = jnp.asarray(np.tile(x, (9, 1)))
    state, step = start(config, acts, 24, 5, 0, mesh), make_step(config, 5, mesh)
    for _ in range(5):
        state, _ = step(state, acts)
    save_sae(finished(state), tmp_path)
    loaded = sae_lens.SAE.load_from_disk(tmp_path)
    assert agree(ours(finished(state), x), theirs(loaded, x))
    assert not agree(jax.device_get(ours(state.sae, x)), theirs(loaded, x))
