"""Folders in and out: every kind of file that transformers writes gives its logits, and what is saved comes back.

Logits agree within 1e-4 (float32, sums in another order); planted faults are above 1e-2.
"""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from qsae_jax.errors import UserError
from qsae_jax.lm.load import load_lm, stored_as
from qsae_jax.lm.save import save_lm
from qsae_jax.mesh import make_mesh

TOLERANCE = 1e-4
FAULT = 1e-2
logits = jax.jit(lambda lm, tokens: lm(tokens))


def distance(a, b):
    return float(np.abs(np.asarray(a, np.float32) - np.asarray(b, np.float32)).max())


def edit_config(folder, remove=(), **changes):
    file = folder / "config.json"
    facts = {key: value for key, value in json.loads(file.read_text()).items() if key not in remove}
    file.write_text(json.dumps(facts | changes))


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_logits_of_a_saved_model(llama, torch_logits, tokens, tmp_path, tied, shards):
    """Control: a model of another tying has other logits, so the head was read from where it should be."""
    model = llama(tie_word_embeddings=tied)
    model.save_pretrained(tmp_path, **({"max_shard_size": "20KB"} if shards else {}))
    assert (len(list(tmp_path.glob("*.safetensors"))) > 3) == shards
    ours = logits(load_lm(str(tmp_path)), tokens)
    assert distance(ours, torch_logits(model, tokens)) < TOLERANCE
    assert distance(ours, torch_logits(llama(tie_word_embeddings=not tied), tokens)) > FAULT


@pytest.mark.parametrize("width", ["head_dim given", "head_dim left out"])
@pytest.mark.parametrize("style", ["transformers 4", "transformers 5", "both"])
def test_styles_of_config(llama, torch_logits, tokens, tmp_path, style, width):
    """`rope_theta` beside `rope_scaling: null`, `rope_parameters`, or the base outside and the type inside: all read
    the base that transformers reads. Control: another base in the file gives other logits."""
    given = {} if width == "head_dim given" else {"head_dim": None, "num_attention_heads": 4}
    model = llama(**given)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["rope_parameters"] == {"rope_type": "default", "rope_theta": 777.0}
    if given:
        edit_config(tmp_path, remove=["head_dim"])

    def with_base(theta):
        if style == "transformers 4":
            old = {"rope_theta": theta, "rope_scaling": None, "torch_dtype": "float32", "pretraining_tp": 1}
            edit_config(tmp_path, remove=["rope_parameters", "dtype"], **old)
        elif style == "transformers 5":
            edit_config(tmp_path, rope_parameters={"rope_type": "default", "rope_theta": theta})
        else:
            edit_config(tmp_path, rope_theta=theta, rope_parameters={"rope_type": "default"})
        return load_lm(str(tmp_path))

    expected = torch_logits(model, tokens)
    lm = with_base(777.0)
    assert (lm.config.head_dim, lm.config.rope.theta) == (6, 777.0)
    assert distance(logits(lm, tokens), expected) < TOLERANCE
    assert with_base(776.0).config.rope.theta == 776.0
    assert distance(logits(with_base(10000.0), tokens), expected) > FAULT


def test_transformers_agrees_on_the_base_outside(llama, facts, tmp_path):
    """The style `both` above is how transformers itself reads such a file."""
    from transformers import AutoConfig

    facts |= {"rope_theta": 777.0, "rope_parameters": {"rope_type": "default"}}
    (tmp_path / "config.json").write_text(json.dumps(facts))
    assert AutoConfig.from_pretrained(tmp_path).rope_parameters["rope_theta"] == 777.0


@pytest.mark.parametrize("data, model", [(2, 4), (1, 8)])
def test_logits_on_a_mesh(facts, tensors, write_folder, tokens, data, model):
    """The same logits within 1e-5 (partial sums of the devices), with the weights cut as the rules say. Control:
    with the pieces of one weight in another order they are far away."""
    folder = str(write_folder(facts, tensors(facts)))
    whole, lm = load_lm(folder), load_lm(folder, mesh=make_mesh(data, model))
    q, k = lm.blocks[0].attn.q.get_value(), lm.blocks[0].attn.k.get_value()
    assert {shard.data.shape for shard in q.addressable_shards} == {(24, 8 // model, 6)}
    assert {shard.data.shape for shard in k.addressable_shards} == {(24, 1 if model == 4 else 4, 6)}
    expected = logits(whole, tokens)
    assert distance(logits(lm, tokens), expected) < 1e-5
    lm.blocks[0].attn.q.set_value(jnp.roll(q, 1, axis=1))
    assert distance(logits(lm, tokens), expected) > FAULT


@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
def test_half_precision_files(llama, torch, torch_logits, tokens, tmp_path, kind):
    """A 16-bit file read as float32 is PyTorch's float32 model of the same values within 1e-4, read as bfloat16 it
    holds these very values; control: the values before they were cut to 16 bits are elsewhere."""
    model = llama()
    before = torch_logits(model, tokens)
    model.to(getattr(torch, kind)).save_pretrained(tmp_path)
    model = type(model).from_pretrained(tmp_path, dtype=torch.float32)  # `to` has cut the rotary buffer as well
    lm = load_lm(str(tmp_path))
    assert lm.embed[...].dtype == jnp.float32
    assert distance(logits(lm, tokens), torch_logits(model, tokens)) < TOLERANCE
    assert distance(logits(lm, tokens), before) > TOLERANCE
    half = load_lm(str(tmp_path), dtype=jnp.dtype(kind))
    assert half.embed[...].dtype == kind
    assert distance(half.embed[...], lm.embed[...]) == 0


@pytest.mark.parametrize("tied", [False, True])
def test_transformers_reads_what_is_saved(llama, torch_logits, facts, tensors, write_folder, tokens, tmp_path, tied):
    """Logits within 1e-4, no weight missing or left over; the scalars are those of the first config. Control: a
    tensor exported in another order gives other logits."""
    from transformers import AutoModelForCausalLM

    facts["tie_word_embeddings"] = tied
    lm = load_lm(str(write_folder(facts, tensors(facts))))
    out = tmp_path / "saved"
    save_lm(lm, out, {"qsae_jax": "int4", "source": "here"})
    model, told = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(told.values()), told
    kept = {key: getattr(model.config, key) for key in facts}
    assert kept == facts
    assert distance(logits(lm, tokens), torch_logits(model, tokens)) < TOLERANCE
    lm.blocks[2].attn.o.set_value(jnp.roll(lm.blocks[2].attn.o[...], 1, axis=0))
    assert distance(logits(lm, tokens), torch_logits(model, tokens)) > FAULT
    with safe_open(out / "model.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt", "qsae_jax": "int4", "source": "here"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_round_trip_is_bit_equal(facts, tensors, write_folder, tmp_path, dtype):
    """folder -> LM -> folder gives the same tensors under the same names, and the same LM again. Control: one bit
    of one weight is seen."""
    given = tensors(facts, dtype=jnp.dtype(dtype))
    lm = load_lm(str(write_folder(facts, given)), dtype=jnp.dtype(dtype))
    save_lm(lm, tmp_path / "out")
    saved = load_file(tmp_path / "out" / "model.safetensors")

    def same(a, b):
        return a.keys() == b.keys() and all(a[x].dtype == b[x].dtype and (a[x] == b[x]).all() for x in a)

    assert same(saved, given)
    flipped = {name: value.copy() for name, value in saved.items()}
    flipped["model.layers.1.mlp.up_proj.weight"].view(np.uint8)[3, 3] ^= 1
    assert not same(flipped, given)
    again = load_lm(str(tmp_path / "out"), dtype=jnp.dtype(dtype))
    assert again.config == lm.config
    for (path, a), (other, b) in zip(
        *(nnx.to_flat_state(nnx.state(x)) for x in (lm, again)),
        strict=True,
    ):
        assert path == other
        np.testing.assert_array_equal(np.asarray(a.get_value()), np.asarray(b.get_value()))


def test_a_tied_file_may_carry_its_head(facts, tensors, write_folder, tokens):
    """Older files store `lm_head` beside the embedding: the same numbers once more. Control: other ones, of which
    transformers makes an untied model, are refused."""
    facts["tie_word_embeddings"] = True
    given = tensors(facts)
    bare = load_lm(str(write_folder(facts, given)))
    head = {"lm_head.weight": given["model.embed_tokens.weight"].copy()}
    full = load_lm(str(write_folder(facts, given | head, "full")))
    assert distance(logits(bare, tokens), logits(full, tokens)) == 0
    assert float(jnp.abs(logits(full, tokens)).max()) > 1
    head["lm_head.weight"][3, 5] += 1
    with pytest.raises(UserError, match="tie_word_embeddings false"):
        load_lm(str(write_folder(facts, given | head, "other")))


def test_saving_replaces_a_folder_whole(facts, tensors, write_folder, tmp_path):
    """A file of an earlier save, a second shard say, does not stay to be loaded with the new ones."""
    lm = load_lm(str(write_folder(facts, tensors(facts))))
    out = tmp_path / "out"
    shutil.copytree(tmp_path / "model", out)
    save_file({"x": np.zeros(1, np.float32)}, out / "stale.safetensors")
    save_lm(lm, out)
    assert sorted(file.name for file in out.iterdir()) == ["config.json", "model.safetensors"]
    assert [file.name for file in tmp_path.iterdir() if file.name.startswith(".")] == []


def test_a_folder_is_not_packed(facts, tensors, write_folder):
    assert stored_as(str(write_folder(facts, tensors(facts)))) is None
