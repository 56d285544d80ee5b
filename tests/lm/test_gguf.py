"""GGUF files written by the `gguf` package, read back as the model that they were made from.

The oracles are written here from ggml's block layouts, slowly: one block at a time, in NumPy.
"""

import gguf
import jax
import numpy as np
import pytest
from flax import nnx
from gguf import GGMLQuantizationType as Kind

from qsae_jax.lm.load import load_lm, stored_as

logits = jax.jit(lambda lm, tokens: lm(tokens))


def permuted(name, w, facts):
    """The rows of q and k in llama.cpp's order: in each head, row i of the first half, then row i of the second."""
    heads = {"q": "num_attention_heads", "k": "num_key_value_heads"}.get(name.split("_proj")[0][-1])
    if heads is None or not name.endswith(("q_proj.weight", "k_proj.weight")):
        return w
    half, rows = facts["head_dim"] // 2, []
    for head in range(facts[heads]):
        for i in range(half):
            rows += [w[(2 * head) * half + i], w[(2 * head + 1) * half + i]]
    return np.stack(rows)


def f16(raw):
    return np.float32(np.frombuffer(bytes(raw), "<f2")[0])


def nibbles(raw):
    """Element j in the low half of byte j, element j + 16 in its high half."""
    raw = np.asarray(raw)
    return np.concatenate([raw & 15, raw >> 4]).astype(np.float32)


def six_bit(b):
    """The eight scales and eight minima of Q4_K, of six bits, from 12 bytes."""
    low = [(b[j] & 63, b[j + 4] & 63) for j in range(4)]
    high = [((b[j + 8] & 15) | (b[j] >> 6) << 4, (b[j + 8] >> 4) | (b[j + 4] >> 6) << 4) for j in range(4)]
    return low + high


def q4_k(b):
    d, dmin, qs = f16(b[:2]), f16(b[2:4]), b[16:]
    out = []
    for j, (scale, low) in enumerate(six_bit([int(x) for x in b[4:16]])):
        chunk = qs[32 * (j // 2) : 32 * (j // 2) + 32]
        codes = (chunk >> 4 if j % 2 else chunk & 15).astype(np.float32)
        out.append(d * np.float32(scale) * codes - dmin * np.float32(low))
    return np.concatenate(out)


def q6_k(b):
    ql, qh, scales, d = b[:128].astype(int), b[128:192].astype(int), b[192:208].view(np.int8), f16(b[208:210])
    out = np.zeros(256, np.float32)
    for i in range(256):
        half, j = divmod(i, 128)
        quarter, k = divmod(j, 32)
        low = ql[64 * half + 32 * (quarter % 2) + k] >> (4 * (quarter // 2)) & 15
        high = qh[32 * half + k] >> (2 * quarter) & 3
        out[i] = d * np.float32(scales[i // 16]) * np.float32((low | high << 4) - 32)
    return out


# type -> (bytes a block, weights a block, decoder of one block)
BLOCKS = {
    Kind.F32: (4, 1, lambda b: b.view("<f4")),
    Kind.F16: (2, 1, lambda b: b.view("<f2").astype(np.float32)),
    Kind.BF16: (2, 1, lambda b: np.concatenate([np.zeros(2, np.uint8), b]).view("<f4")),
    Kind.Q8_0: (34, 32, lambda b: f16(b[:2]) * b[2:].view(np.int8).astype(np.float32)),
    Kind.Q4_0: (18, 32, lambda b: f16(b[:2]) * (nibbles(b[2:]) - 8)),
    Kind.Q4_1: (20, 32, lambda b: f16(b[:2]) * nibbles(b[4:]) + f16(b[2:4])),
    Kind.Q4_K: (144, 256, q4_k),
    Kind.Q6_K: (210, 256, q6_k),
}


def encoded(w, kind, random):
    """Rows of bytes: by `gguf` where it can, else random ones whose 16-bit scales are small and finite."""
    if kind not in (Kind.Q4_K, Kind.Q6_K):
        return gguf.quants.quantize(w, kind).view(np.uint8).reshape(len(w), -1)
    size, n, _ = BLOCKS[kind]
    raw = random.integers(0, 256, (len(w), w.shape[1] // n, size), dtype=np.uint8)
    scale = random.uniform(0.5, 2, (*raw.shape[:2], 2)) * {Kind.Q4_K: 1e-3, Kind.Q6_K: 1e-4}[kind]
    at = 0 if kind == Kind.Q4_K else 208
    raw[..., at : at + 4] = scale.astype("<f2").view(np.uint8)[..., : size - at]
    return raw.reshape(len(w), -1)


def decoded(raw, kind):
    size, _, one = BLOCKS[kind]
    return np.stack([np.concatenate([one(block) for block in row.reshape(-1, size)]) for row in raw])


@pytest.fixture
def write_gguf(gguf_file):
    """Writes a GGUF file of HF tensors and gives its path, and what the blocks hold: HF tensors again."""

    def write(facts, tensors, kind=Kind.F32, skip=(), permute=permuted):
        random, entries, held = np.random.default_rng(3), {}, {}
        for name, w in tensors.items():
            if w.ndim == 1:
                held[name], entries[name] = w, (w, None)
                continue
            raw = encoded(w, kind, random)
            held[name] = decoded(raw, kind)
            raw = raw[permute(name, np.arange(len(w)), facts)]
            entries[name] = (raw.view(f"<f{BLOCKS[kind][0]}") if kind in (Kind.F32, Kind.F16) else raw, kind)
        return gguf_file(facts, entries, skip=skip), held

    return write


def widened(facts, kind):
    """The rows of every matrix have whole blocks."""
    wide = BLOCKS[kind][1] > 32
    sizes = {"hidden_size": 256, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 32}
    small = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 24}
    sizes |= {"intermediate_size": 256, "num_hidden_layers": 1}
    return facts | (sizes if wide else small | {"intermediate_size": 96, "num_hidden_layers": 2})


def same(a, b):
    """Bit-equal weights."""
    pairs = zip(*(nnx.to_flat_state(nnx.state(lm)) for lm in (a, b)), strict=True)
    return all(bool((x.get_value() == y.get_value()).all()) for (_, x), (_, y) in pairs)


@pytest.mark.parametrize("kind", BLOCKS, ids=lambda kind: kind.name)
def test_weights_equal_the_slow_decoder(facts, tensors, write_folder, write_gguf, tokens, kind):
    """Bit-equal to a folder of the decoded weights; so are the logits. Control: with q and k left in the order of
    Hugging Face, and with the weights before they were rounded, they are not."""
    facts = widened(facts, kind)
    given = tensors(facts)
    path, held = write_gguf(facts, given, kind)
    lm = load_lm(path)
    folder = load_lm(str(write_folder(facts, held)))
    assert same(lm, folder)
    assert lm.config.rope.theta == 777.0 and abs(lm.config.norm_eps - 3e-3) < 1e-9
    np.testing.assert_allclose(np.asarray(logits(lm, tokens)), np.asarray(logits(folder, tokens)), atol=1e-4)
    assert same(folder, load_lm(str(write_folder(facts, given)))) == (kind == Kind.F32)
    straight, _ = write_gguf(facts, given, kind, permute=lambda name, w, facts: w)
    assert not same(load_lm(straight), folder)
    assert float(np.abs(logits(load_lm(straight), tokens) - logits(folder, tokens)).max()) > 1e-2


FIRST_CODE = {Kind.Q8_0: 2, Kind.Q4_0: 2, Kind.Q4_1: 4, Kind.Q4_K: 16, Kind.Q6_K: 0}


@pytest.mark.parametrize("kind", FIRST_CODE, ids=lambda kind: kind.name)
def test_the_slow_decoder_sees_a_nibble(kind):
    """Control of the oracle: with the halves of one byte of codes exchanged, one or two weights are others."""
    random = np.random.default_rng(0)
    raw = encoded(random.normal(size=(1, BLOCKS[kind][1])).astype(np.float32), kind, random)
    other = raw.copy()
    at = next(i for i in range(FIRST_CODE[kind], raw.size) if raw[0, i] >> 4 != raw[0, i] & 15)
    other[0, at] = (int(raw[0, at]) << 4 | int(raw[0, at]) >> 4) & 255
    assert 1 <= (decoded(raw, kind) != decoded(other, kind)).sum() <= 2


def test_logits_equal_transformers(llama, torch_logits, facts, write_gguf, tokens):
    """An F32 file of a transformers model against that model, 1e-4; unrolled rotary order is far away."""
    model = llama()
    given = {name: p.detach().numpy() for name, p in model.named_parameters()}
    expected = torch_logits(model, tokens)
    path, _ = write_gguf(facts, given)
    assert float(np.abs(logits(load_lm(path), tokens) - expected).max()) < 1e-4
    path, _ = write_gguf(facts, given, permute=lambda name, w, facts: w)
    assert float(np.abs(logits(load_lm(path), tokens) - expected).max()) > 1e-2


def test_tied_and_left_out(facts, tensors, write_folder, write_gguf):
    """No `output.weight` means tied; without `key_length` and `head_count_kv` heads divide the width, ungrouped."""
    facts |= {"tie_word_embeddings": True, "hidden_size": 48, "num_key_value_heads": 8}
    given = tensors(facts)
    path, _ = write_gguf(facts, given, skip=("key_length", "value_length", "head_count_kv", "vocab_size"))
    lm = load_lm(path)
    assert lm.config.tied and (lm.config.head_dim, lm.config.n_kv_heads, lm.config.vocab) == (6, 8, 97)
    assert same(lm, load_lm(str(write_folder(facts, given))))


@pytest.mark.parametrize("kind", [Kind.F16, Kind.Q4_1, Kind.Q6_K], ids=lambda kind: kind.name)
def test_stored_as(facts, tensors, write_gguf, kind):
    """The matrices are counted, the norms are not: seven a block, embedding and head. Plain floating point is None."""
    facts = widened(facts, kind)
    path, _ = write_gguf(facts, tensors(facts), kind)
    packed = f"GGUF blocks of type {kind.name} ({7 * facts['num_hidden_layers'] + 2})"
    assert stored_as(path) == (None if kind == Kind.F16 else packed)
