"""Which weights a rule takes, on a model of two blocks with a head of its own."""

import jax
import numpy as np
import pytest
from flax import nnx

from qsae_jax.errors import UserError
from qsae_jax.quant.fake import assigned, departures, fake_quantize, weight_errors, weights
from qsae_jax.quant.scheme import parse_scheme
from qsae_jax.quant.where import Where

NAMES = ("attn.k", "attn.o", "attn.q", "attn.v", "mlp.down", "mlp.gate", "mlp.up")
ALL = {f"blocks.{layer}.{name}" for layer in range(2) for name in NAMES}
TAKEN = {
    "int4": ALL,
    "int4[0]": {path for path in ALL if path.startswith("blocks.0.")},
    "int4[0-1]": ALL,
    "int4[mlp.down]": {"blocks.0.mlp.down", "blocks.1.mlp.down"},
    "int4[attn]": {path for path in ALL if ".attn." in path},
    "int4[*.up,*.q]": {path for path in ALL if path.endswith((".up", ".q"))},
    "int4[attn.?]": {path for path in ALL if ".attn." in path},
    "int4[1,mlp.up]": {"blocks.1.mlp.up"},
    "int4[blocks.0.mlp.*]": {path for path in ALL if path.startswith("blocks.0.mlp.")},
    "int4[embed]": {"embed"},
    "int4[head]": {"head"},
    "int4[0,embed]": {"embed"} | {path for path in ALL if path.startswith("blocks.0.")},
    "int4[0,embed,mlp.up]": {"embed", "blocks.0.mlp.up"},
    "int4[*]": ALL,
    "int8[embed]+int4[head]+int4": ALL | {"embed", "head"},
    "fp[1]+int4": {path for path in ALL if path.startswith("blocks.0.")},
}


@pytest.mark.parametrize("name, taken", TAKEN.items())
def test_what_is_taken_is_what_changes(lm, name, taken):
    """The rule's own answer, and the weights that really differ; everything else is the same array."""
    assert set(assigned(weights(lm), parse_scheme(name))) == taken
    before, after = (dict(nnx.to_flat_state(nnx.state(x))) for x in (lm, fake_quantize(lm, name)))
    changed = {".".join(map(str, path)) for path, leaf in before.items() if (leaf[...] != after[path][...]).any()}
    assert changed == taken


def test_the_first_match_wins(lm):
    """Each weight is bit-equal to what the rule's own scheme makes of it alone; the other order is another model."""
    mixed = "int8[mlp.down]+int3[1]+int4"
    twins = {
        name: weights(fake_quantize(lm, name))
        for name in ("int8", "int3", "int4", mixed, "int3[1]+int8[mlp.down]+int4")
    }
    for path, leaf in twins[mixed].items():
        if path in ALL:
            own = "int8" if path.endswith("mlp.down") else "int3" if path.startswith("blocks.1") else "int4"
            np.testing.assert_array_equal(leaf[...], twins[own][path][...])
    other = twins["int3[1]+int8[mlp.down]+int4"]["blocks.1.mlp.down"][...]
    assert (other != twins[mixed]["blocks.1.mlp.down"][...]).any()


REFUSED = {
    "int4[mlp.dwn]": "no weight is named `mlp.dwn`; nearest: mlp.down",
    "int8[attn.x]+int4": "no weight is named `attn.x`",
    "int4[2-5]": "there is no block 5: the model has blocks 0 to 1",
    "int4[1-9]": "there is no block 9",
    "int4[mlp.down,mlp.dwn]": "no weight is named `mlp.dwn`; nearest: mlp.down",
    "int4[1,blocks.0.mlp.up]": "takes no weight: a name and a block are both to fit",
    "int4+int8[mlp.down]": r"every weight of \[mlp.down\] is taken by a rule before it",
    "int4+int8": "every weight of a rule without brackets is taken by a rule before it",
    "fp[0-1]+int4": "taken by a rule before it",
    "prune~int4": "is found by perplexity",
}


@pytest.mark.parametrize("name, said", REFUSED.items())
def test_a_rule_that_takes_nothing_is_refused(lm, name, said):
    with pytest.raises(UserError, match=said):
        fake_quantize(lm, name)


def test_a_tied_head_is_the_embedding(tiny_lm, lm):
    """The tests' models have heads of their own; one that is tied has none to name."""
    from dataclasses import replace

    from qsae_jax.lm.load import abstract_lm

    tied = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), abstract_lm(replace(lm.config, tied=True)))
    assert set(assigned(weights(tied), parse_scheme("int4[embed]"))) == {"embed"}
    with pytest.raises(UserError, match=r"the head of this model is its embedding: write \[embed\]"):
        fake_quantize(tied, "int4[head]")


def test_rows_of_embedding_and_head_are_channels(lm, slow_quantize):
    """One scale for each word, groups along the width. Control: one scale for each dimension is another."""
    twin = fake_quantize(lm, "int4[embed]+int5-g8[head]")
    for name, bits, group in (("embed", 4, 0), ("head", 5, 8)):
        w, ours = (np.asarray(getattr(x, name)[...]) for x in (lm, twin))
        np.testing.assert_array_equal(ours, slow_quantize(w, bits, "full_qmax", group))
        assert (ours != slow_quantize(w.T, bits, "full_qmax", group).T).any()
    told = weight_errors(lm, twin)
    assert told["embed"] > 0.05 and told["head"] > 0 and told["all"] > 0 and told["blocks.0.mlp.up"] == 0
    assert "embed" not in weight_errors(lm, fake_quantize(lm, "int4"))


def test_departures_are_told(lm):
    """Short last groups, and what GGUF does with rows that do not fit; nothing where all fits. 20 inputs (12
    matrices), 24 (o) and 40 (down)."""
    assert departures(lm, "int4") == departures(lm, "fp") == departures(lm, "int4-g4") == departures(lm, "nf4-g4") == []
    (a, b) = sorted(departures(lm, "int4-g10[attn.o,mlp.down,attn.q]+int8-g8[mlp.gate]"))
    assert "in rows of 20 the last group has 4 of 8 weights (2 matrices)" in a
    assert "in rows of 24 the last group has 4 of 10 weights (2 matrices)" in b
    told = departures(lm, "q4_k")
    assert (
        len(told) == 3
        and "rows of 20 are kept as f16, as llama.cpp does where q4_k does not fit (10 matrices)" in told[0]
    )
    assert any("in rows of 40 the last group has 8 of 32 weights" in line for line in departures(lm, "noise@mxfp4"))
    with pytest.raises(UserError, match="wider than every matrix"):
        departures(lm, "prune~int4-g64")


def test_where_by_path():
    where = Where(((2, 3),), ("mlp.*",))
    assert where.takes("blocks.2.mlp.up") and not where.takes("blocks.4.mlp.up") and not where.takes("blocks.2.attn.q")
    assert not where.takes("embed") and not Where().takes("embed") and Where((), ("embed",)).takes("embed")
    assert not Where((), ("mlp",)).takes("blocks.0.mlpx.up")
