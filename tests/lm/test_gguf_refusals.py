"""What is wrong with a GGUF file is refused: a UserError of one line that names the thing. Control: the file that
each damage is done to loads."""

import struct
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from qsae_jax.cli import main
from qsae_jax.errors import UserError
from qsae_jax.lm.gguf import GGUF
from qsae_jax.lm.load import load_config, load_lm, stored_as

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


@pytest.mark.parametrize("raw", [b"no model", b"GGUF", b"GGUF" + b"\xff" * 60, b"\0" * 200])
def test_another_file_of_that_name(tmp_path, raw):
    (tmp_path / "model.gguf").write_bytes(raw)
    refused(str(tmp_path / "model.gguf"), "model.gguf")


# The same file written out by hand, so that any part of it can be another.
FLOAT, STRING, ARRAY, UINT = 6, 8, 9, 4
SIZES = {"block_count": 1, "context_length": 64, "embedding_length": 8, "feed_forward_length": 12}
SIZES |= {"attention.head_count": 2, "attention.head_count_kv": 1, "rope.dimension_count": 4}
MATRICES = {"attn_q": (8, 8), "attn_k": (4, 8), "attn_v": (4, 8), "attn_output": (8, 8)}
MATRICES |= {"ffn_gate": (12, 8), "ffn_up": (12, 8), "ffn_down": (8, 12), "attn_norm": (8,), "ffn_norm": (8,)}
SHAPES = {"token_embd": (10, 8), "output_norm": (8,)} | {f"blk.0.{x}": shape for x, shape in MATRICES.items()}


def string(text):
    raw = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(raw)) + raw


def number(key, value):
    return string(key) + struct.pack("<II", UINT, value)


def tensor(name, shape, offset, kind=0, dims=None):
    lengths = struct.pack(f"<{len(shape)}Q", *shape[::-1])
    return string(name) + struct.pack("<I", dims or len(shape)) + lengths + struct.pack("<IQ", kind, offset)


def header(fields=(), infos=(), magic=b"GGUF", version=3, align=32):
    """A whole tiny Llama's header, with metadata and tensors added at its end."""
    known = [string("general.architecture") + struct.pack("<I", STRING) + string("llama")]
    known += [number(f"llama.{key}", value) for key, value in SIZES.items()]
    epsilon = string("llama.attention.layer_norm_rms_epsilon") + struct.pack("<If", FLOAT, 3e-3)
    held, offset = [], 0
    for name, shape in SHAPES.items():
        held.append(tensor(f"{name}.weight", shape, offset))
        offset += -(-int(np.prod(shape)) * 4 // align) * align
    fields, held = [*known, epsilon, *fields], [*held, *infos]
    return magic + struct.pack("<IQQ", version, len(held), len(fields)) + b"".join(fields + held)


def written(folder, head, align=32):
    size = sum(-(-int(np.prod(shape)) * 4 // align) * align for shape in SHAPES.values())
    path = folder / "model.gguf"
    path.write_bytes(head + bytes(-len(head) % align + size))
    return str(path)


def array(key, kind, count, rest=b""):
    return string(key) + struct.pack("<IIQ", ARRAY, kind, count) + rest


MALFORMED = {
    "magic": ({"magic": b"GGML"}, "expected GGUF"),
    "version 1": ({"version": 1}, "version 1"),
    "other byte order": ({"version": 3 << 24}, "version 50331648"),
    "key twice": ({"fields": [number("llama.block_count", 1)]}, "`llama.block_count` stands there twice"),
    "tensor twice": ({"infos": [tensor("output_norm.weight", (8,), 0)]}, "`output_norm.weight` stands there twice"),
    "beyond the end": ({"infos": [tensor("x", (8,), 1 << 20)]}, "a tensor ends at byte"),
    "shape beyond the end": ({"infos": [tensor("x", (2**63, 2**63), 0)]}, "a tensor ends at byte"),
    "type": ({"infos": [tensor("x", (8,), 0, kind=99)]}, "99"),
    "blocks": ({"infos": [tensor("x", (8,), 0, kind=2)]}, "type Q4_0 has shape (8,)"),
    "no dimensions": ({"infos": [tensor("x", (), 0)]}, "shape ()"),
    "no length": ({"infos": [tensor("x", (0, 8), 0)]}, "shape (0, 8)"),
    "dimensions": ({"infos": [tensor("x", (8,), 0, dims=2**32 - 1)]}, "not a readable GGUF"),
    "alignment 0": ({"fields": [number("general.alignment", 0)]}, "alignment is 0"),
    "alignment of text": (
        {"fields": [string("general.alignment") + struct.pack("<I", STRING) + string("32")]}, "alignment is '32'",
    ),
    "arrays of arrays": ({"fields": [array("x", ARRAY, 1, struct.pack("<IQ", UINT, 0))]}, "array of arrays"),
    "endless array": ({"fields": [array("x", UINT, 2**62)]}, "not a readable GGUF"),
    "endless texts": ({"fields": [array("x", STRING, 2**62)]}, "not a readable GGUF"),
    "kind of value": ({"fields": [string("x") + struct.pack("<I", 13)]}, "not a readable GGUF"),
    "endless text": ({"fields": [string("x") + struct.pack("<IQ", STRING, 2**63)]}, "not a readable GGUF"),
    "endless key": ({"fields": [struct.pack("<Q", 2**63)]}, "a text of 9223372036854775808 bytes"),
    "key of bytes": ({"fields": [number(b"\xff\xfe", 1)]}, "utf-8"),
    "value of bytes": ({"fields": [string("llama.x") + struct.pack("<I", STRING) + string(b"\xff")]}, "`llama.x`"),
    "key of our own": ({"fields": [number("llama.rope_freqs", 1)]}, "`llama.rope_freqs`"),
    "slowed turns": ({"infos": [tensor("rope_freqs.weight", (7,), 0)]}, "`rope_freqs.weight`"),
    "slowed by nothing": ({"infos": [tensor("rope_freqs.weight", (2,), 0)]}, "`rope_freqs.weight`"),
}  # fmt: skip


@pytest.mark.parametrize("how, named", MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed(tmp_path, capsys, how, named):
    """At the command line, status 2 and one line. Control: the header is drawn as it stands, and with a harmless
    field and tensor where the damaged ones are put."""
    for fine in ({}, {"fields": [number("general.x", 1)]}, {"version": 2}):
        assert main(["points", "--model", written(tmp_path, header(**fine))]) == 0
    capsys.readouterr()
    path = written(tmp_path, header(**how))
    refused(path, named)
    assert main(["points", "--model", path]) == 2
    told = capsys.readouterr()
    assert named in told.err and told.err.count("\n") == 1 and not told.out


def test_truncated_anywhere(tmp_path, monkeypatch):
    """Cut at 40 places of the header, at its end and within the data. Controls: nothing cut off, it loads; with
    struct's own error let through, a cut is seen to raise that."""
    path, head = written(tmp_path, header()), len(header())
    raw = Path(path).read_bytes()
    load_lm(path)
    for at in [*np.linspace(0, head, 40).astype(int), head + 1, len(raw) - 32, len(raw) - 1]:
        Path(path).write_bytes(raw[:at])
        refused(path, "model.gguf")
    Path(path).write_bytes(raw[:20])
    monkeypatch.setattr("qsae_jax.lm.gguf.BAD", (ValueError,))
    with pytest.raises(struct.error):
        load_lm(path)


def test_truncated_vocabulary(tmp_path):
    """A file without tensors ends with its metadata: texts that go beyond the end are seen, not cut off."""
    texts = array("x", STRING, 2, string("one") + string("three"))
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + texts)
    assert GGUF(path).get("x") == ["one", "three"]
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(UserError, match="ends within its header"):
        GGUF(path)


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(0, len(header()) - 1), st.integers(0, 255)), min_size=1, max_size=4))
def test_any_bytes(tmp_path_factory, flips):
    """Bytes of the header are replaced: the file is read or refused, and nothing else is raised."""
    raw = bytearray(header())
    for at, byte in flips:
        raw[at] = byte
    path = written(tmp_path_factory.getbasetemp(), bytes(raw))
    for read in (load_config, stored_as):
        try:
            read(path)
        except UserError as error:
            assert "\n" not in str(error)
