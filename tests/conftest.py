"""The policy of every test: eight simulated CPU devices, no hub, no silent rank promotion."""

import os

# Before anything imports huggingface_hub, which reads it once.
os.environ["HF_HUB_OFFLINE"] = "1"

import hypothesis
import jax
import pytest

# Before any backend is touched. JAX_PLATFORMS=cuda runs the tests on a GPU instead.
if "JAX_PLATFORMS" not in os.environ:
    jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

# The first example of a test compiles, so no deadline; the same examples in every run.
hypothesis.settings.register_profile("qsae", deadline=None, derandomize=True)
hypothesis.settings.load_profile("qsae")


def pytest_addoption(parser):
    parser.addoption("--once", action="store_true", help="run each test in the first of its cases only")


def pytest_collection_modifyitems(config, items):
    """Under --once the first case of every test: enough to see that another Python and JAX run all of it."""
    if config.getoption("--once"):
        first = {
            (item.path, item.cls, getattr(item, "originalname", item.name)): item for item in reversed(items)
        }.values()
        kept = [item for item in items if item in first]
        config.hook.pytest_deselected(items=[item for item in items if item not in first])
        items[:] = kept


@pytest.fixture(scope="session")
def torch():
    """The oracle of the parity tests, which are skipped where it is not installed."""
    return pytest.importorskip("torch", reason="torch, the oracle of this test, is installed on Python 3.11 only")


@pytest.fixture(scope="session")
def tiny_lm():
    """A random Llama with every scalar off its default, big enough for a byte-level vocabulary."""
    from flax import nnx

    from qsae_jax.lm.model import LM, LMConfig
    from qsae_jax.lm.rope import Rope

    shape = {"vocab": 300, "d_model": 16, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "head_dim": 6, "d_ff": 24}
    scalars = {"norm_eps": 3e-3, "rope": Rope(777.0, 6), "tied": False, "context": 64}
    scalars |= {"act": "silu", "score_scale": 6**-0.5}
    return LM(LMConfig(family="llama", **shape, **scalars), nnx.Rngs(0))


@pytest.fixture(scope="session")
def tiny_sae():
    """`tiny_sae(seed)`: a random TopK dictionary of 32 latents on width 16, biases away from zero."""
    import jax.numpy as jnp

    from qsae_jax.sae.model import SAE
    from qsae_jax.sae.sparsity import TopK

    def make(seed: int = 0) -> SAE:
        keys = jax.random.split(jax.random.key(seed), 4)
        W_enc, W_dec = jax.random.normal(keys[0], (16, 32)), jax.random.normal(keys[1], (32, 16)) / 4
        b_enc, b_dec = 0.3 * jax.random.normal(keys[2], (32,)), 0.1 * jax.random.normal(keys[3], (16,))
        return SAE(TopK(4), *map(jnp.asarray, (W_enc, b_enc, W_dec, b_dec)))

    return make


@pytest.fixture(scope="session")
def tiny_windows():
    """`tiny_windows(n)`: n windows of 16 random tokens."""
    import numpy as np

    from qsae_jax.acts.tokens import Windows

    return lambda n: Windows(np.random.default_rng(7).integers(0, 300, (n, 16), dtype=np.int32), "random", bos=False)


@pytest.fixture(scope="session")
def tiny_folder(tiny_lm, tmp_path_factory):
    """The tiny model as a Hugging Face folder, with a byte-level tokenizer that adds nothing."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    from qsae_jax.lm.save import save_lm
    from qsae_jax.lm.tokenizer import TextTokenizer

    folder = tmp_path_factory.mktemp("tiny") / "model"
    save_lm(tiny_lm, folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    TextTokenizer(inner, None, None, False).save(folder)
    return folder


@pytest.fixture(scope="session")
def flat():
    """The numbers of nested tables and lists, each under one name."""

    def flattened(facts, before=""):
        found = {}
        for key, value in facts.items() if isinstance(facts, dict) else enumerate(facts):
            if isinstance(value, dict | list):
                found |= flattened(value, f"{before}{key}.")
            elif isinstance(value, int | float):
                found[f"{before}{key}"] = value
        return found

    return flattened
