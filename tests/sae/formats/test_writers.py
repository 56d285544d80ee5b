"""Every writer and its own reader: the same codes, in the owner's layout; and what a format has no place for."""

import jax.numpy as jnp
import numpy as np
import pytest

from qsae_jax.errors import UserError
from qsae_jax.sae.formats import WRITERS, load_stored, save_sae
from qsae_jax.sae.model import NORMS, SAE, recentred
from qsae_jax.sae.sparsity import BatchTopK, Gated, JumpReLU, ReLU, TopK

from .conftest import K, arrays_of

CLOSE = {"rtol": 1e-5, "atol": 2e-5}
FACTS = {"model_name": "org/model", "hook_name": "blocks.3.hook_resid_post", "quantization": "int4-g128"}


def dictionary(kind, centred=True, skip=False, norm=None, transcodes=False):
    a = {name: jnp.asarray(value) for name, value in arrays_of().items()}
    sparsity = {"relu": ReLU(), "topk": TopK(K), "batchtopk": BatchTopK(K), "jumprelu": JumpReLU(a["threshold"]),
                "gated": Gated(a["b_gate"], a["b_mag"], a["r_mag"])}[kind]  # fmt: skip
    b_enc = None if kind == "gated" else a["b_enc"]
    return SAE(sparsity, a["W_enc"], b_enc, a["W_dec"], a["b_dec"], centred, a["W_skip"] if skip else None,
               NORMS.get(norm), transcodes)  # fmt: skip


TRANSCODER = {"centred": False, "transcodes": True}
HOLDS = {
    "saelens": [
        *({"kind": kind, "centred": c} for kind in ("relu", "topk", "jumprelu", "gated") for c in (True, False)),
        *({"kind": kind, "norm": norm} for kind in ("topk", "gated") for norm in NORMS),
        *({"kind": kind, "skip": skip} | TRANSCODER for kind in ("relu", "jumprelu") for skip in (True, False)),
    ],
    "dictionary_learning": [
        {"kind": kind, "centred": c} for kind in ("relu", "topk", "jumprelu", "gated") for c in (True, False)
    ],
    "sparsify": [{"kind": "topk"}, {"kind": "topk", "centred": False}, {"kind": "topk", "skip": True} | TRANSCODER],
    "gemma_scope": [{"kind": "jumprelu"}, {"kind": "jumprelu", "centred": False}, {"kind": "relu"}],
}


@pytest.mark.parametrize(
    "format, case", [(f, c) for f in HOLDS for c in HOLDS[f]], ids=lambda v: v if isinstance(v, str) else str(v)
)
def test_written_and_read_again(tmp_path, x, format, case):
    """Codes and reconstruction to 1e-5; dictionary_learning's AutoEncoder gives its codes the decoder's norms, as its
    own loader does. Control: with W_dec's first two rows exchanged they differ."""
    sae = dictionary(**case)
    save_sae(sae, tmp_path / "a", FACTS, format)
    stored = load_stored(tmp_path / "a")
    assert stored.format.split()[0] == format and stored.sae.transcodes == sae.transcodes
    renormed = format == "dictionary_learning" and case["kind"] == "relu" and case["centred"]
    norms = np.linalg.norm(sae.W_dec[...], axis=-1)[None] if renormed else 1
    np.testing.assert_allclose(stored.sae.encode(x), sae.encode(x) * norms, **CLOSE)
    np.testing.assert_allclose(stored.sae(x), sae(x), **CLOSE)
    sae.W_dec[...] = sae.W_dec[...].at[:2].set(sae.W_dec[...][1::-1])
    assert not np.allclose(stored.sae(x), sae(x), **CLOSE)
    if format in ("saelens", "dictionary_learning"):
        assert FACTS.items() <= stored.metadata.items()


REFUSED = [
    *((format, {"kind": "batchtopk"}, "depends on the batch") for format in WRITERS),
    ("saelens", {"kind": "topk"} | TRANSCODER, "no architecture `topk_transcoder`"),
    ("saelens", {"kind": "relu", "skip": True}, "no place for a skip connection"),
    ("saelens", {"kind": "relu", "norm": "layer_norm"} | TRANSCODER, "no place for a norm"),
    ("dictionary_learning", {"kind": "relu"} | TRANSCODER, "no place for a transcoder"),
    ("dictionary_learning", {"kind": "topk", "norm": "layer_norm"}, "no place for a norm"),
    ("sparsify", {"kind": "jumprelu"}, "holds TopK dictionaries"),
    ("gemma_scope", {"kind": "topk"}, "holds JumpReLU dictionaries"),
    ("gemma_scope", {"kind": "jumprelu", "skip": True} | TRANSCODER, "no place for a skip"),
    ("sealens", {"kind": "topk"}, "no format `sealens` to write; nearest: saelens"),
]


@pytest.mark.parametrize("format, case, message", REFUSED, ids=str)
def test_what_a_format_cannot_hold_is_refused(tmp_path, format, case, message):
    """In one line, and nothing is left on the disk."""
    with pytest.raises(UserError, match=message) as caught:
        save_sae(dictionary(**case), tmp_path / "a", format=format)
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["relu", "topk", "jumprelu", "gated"])
@pytest.mark.parametrize("centred", [True, False])
def test_b_dec_moves_into_the_other_biases(x, kind, centred):
    """The same function to 1e-5. Control: only the flag changed is another."""
    sae = dictionary(kind, centred)
    moved = recentred(sae, not centred)
    assert moved.centred != centred
    np.testing.assert_allclose(moved.encode(x), sae.encode(x), **CLOSE)
    np.testing.assert_allclose(moved(x), sae(x), **CLOSE)
    assert not np.allclose(dictionary(kind, not centred).encode(x), sae.encode(x), **CLOSE)


def test_a_latent_that_never_fires_keeps_its_threshold(tmp_path, x):
    sae = dictionary("jumprelu")
    sae.sparsity.threshold[...] = sae.sparsity.threshold[...].at[2].set(jnp.inf)
    save_sae(sae, tmp_path / "a")
    codes = load_stored(tmp_path / "a").sae.encode(x)
    assert not np.any(codes[:, 2]) and np.any(codes[:, 3])
    sae.sparsity.threshold[...] = sae.sparsity.threshold[...].at[2].set(jnp.nan)
    save_sae(sae, tmp_path / "a")
    with pytest.raises(UserError, match="threshold holds NaN"):
        load_stored(tmp_path / "a")
