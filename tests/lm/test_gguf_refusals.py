"""What is wrong with a GGUF file is refused: a UserError of one line that names the thing. Control: the file that
each damage is done to loads."""

from pathlib import Path

import numpy as np
import pytest

from qsae_jax.errors import UserError
from qsae_jax.lm.load import load_lm

Q = "model.layers.1.self_attn.q_proj.weight"


def without(name):
    return lambda given: {key: value for key, value in given.items() if key != name}


def changed(name, change):
    return lambda given: given | {name: change(given[name].copy())}


def spoiled(w):
    w[2, 3] = np.nan
    return w


TENSORS = {
    "no embedding": (without("model.embed_tokens.weight"), "token_embd.weight"),
    "no norm": (without("model.norm.weight"), "final_norm.scale"),
    "no matrix": (without(Q), "blocks.1.attn.q"),
    "NaN": (changed(Q, spoiled), "blk.1.attn_q.weight"),
    "transposed": (changed(Q, lambda w: w.T), "blk.1.attn_q.weight"),
    "another block": (lambda given: given | {Q.replace(".1.", ".7."): given[Q]}, "blocks.7.attn.q"),
}
METADATA = {
    "architecture": ({"architecture": "mamba"}, "`mamba`"),
    "no depth": ({"skip": ["block_count"]}, "block_count"),
    "no epsilon": ({"skip": ["layer_norm_rms_eps"]}, "layer_norm_rms_epsilon"),
    "no context": ({"skip": ["context_length"]}, "context_length"),
    "unknown key": ({"extra": {"llama.expert_count": 8}}, "expert_count"),
    "scaled rotary": ({"extra": {"llama.rope.scaling.attn_factor": 8}}, "rope.scaling.attn_factor"),
    "rotary of a part": (
        {"skip": ["rope_dimension_count"], "extra": {"llama.rope.dimension_count": 4}},
        "rope.dimension_count",
    ),
}


def refused(path, named):
    with pytest.raises(UserError) as caught:
        load_lm(path)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


def plain(given):
    return {name: (w, None) for name, w in given.items()}


@pytest.mark.parametrize("damage, named", TENSORS.values(), ids=TENSORS.keys())
def test_tensors(facts, tensors, gguf_file, damage, named):
    given = tensors(facts)
    load_lm(gguf_file(facts, plain(given)))
    refused(gguf_file(facts, plain(damage(given)), name="damaged.gguf"), named)


@pytest.mark.parametrize("how, named", METADATA.values(), ids=METADATA.keys())
def test_metadata(facts, tensors, gguf_file, how, named):
    given = plain(tensors(facts))
    load_lm(gguf_file(facts, given, extra={"general.quantization_version": 2}))
    refused(gguf_file(facts, given, name="damaged.gguf", **how), named)


def test_a_stranger_is_named(facts, tensors, gguf_file):
    file = Path(gguf_file(facts, plain(tensors(facts))))
    file.write_bytes(file.read_bytes().replace(b"blk.1.attn_q.weight", b"blk.1.attn_x.weight"))
    refused(str(file), "blk.1.attn_x.weight")


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.001, 0.01, 0.02, 0.03, 0.05, 0.5, 0.99])
def test_a_truncated_file(facts, tensors, gguf_file, tmp_path, share):
    """Cut in the header, the metadata, the tensors' names and the data."""
    path = gguf_file(facts, plain(tensors(facts)))
    raw = (tmp_path / "model.gguf").read_bytes()
    (tmp_path / "model.gguf").write_bytes(raw[: int(len(raw) * share)])
    refused(path, "model.gguf")


@pytest.mark.parametrize("raw", [b"no model", b"GGUF", b"GGUF" + b"\xff" * 60, b"\0" * 200])
def test_another_file_of_that_name(tmp_path, raw):
    (tmp_path / "model.gguf").write_bytes(raw)
    refused(str(tmp_path / "model.gguf"), "model.gguf")
