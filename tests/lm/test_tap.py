"""Listening and replacing: names of points, capture, patch, resume, and what XLA leaves out.

The values at every point are compared with PyTorch's hooks in test_model.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qsae_jax.errors import UserError
from qsae_jax.lm.layers import Linear
from qsae_jax.lm.load import abstract_lm
from qsae_jax.lm.model import LMConfig
from qsae_jax.lm.rope import Rope
from qsae_jax.lm.tap import (
    FINAL,
    Point,
    activations,
    capture,
    check_point,
    patch,
    points,
    resume,
    weights_before,
    width_at,
)

PARSED = {
    "embed": Point(None, "embed"),
    "hook_embed": Point(None, "embed"),
    "final": FINAL,
    "blocks.1.resid_post": Point(1, "resid_post"),
    "blocks.1.hook_resid_post": Point(1, "resid_post"),
    "blocks.12.hook_mlp_out": Point(12, "mlp_out"),
    "blocks.0.attn.hook_z": Point(0, "attn.z"),
    "blocks.0.mlp.hook_post": Point(0, "mlp.post"),
}


@pytest.mark.parametrize("text", PARSED)
def test_names(text):
    """Ours and TransformerLens's; printing gives ours, which parses back. Control: two names are two points."""
    point = Point.parse(text)
    assert point == PARSED[text]
    assert str(point) == text.replace("hook_", "")
    assert Point.parse(str(point)) == Point.parse(point) == point
    assert len(set(PARSED.values())) == len({str(p) for p in PARSED.values()}) == 6


UNKNOWN = {
    "blocks.1.resid_pst": "resid_post",
    "blocks.1.attn.zz": "attn.z",
    "blocks.1": None,
    "blocks.-1.resid_post": None,
    "blocks.x.resid_post": None,
    "block.1.resid_post": None,
    "embedding": "embed",
    "": None,
    "blocks.1.embed": "embed",
    "resid_post": "resid_post",
}


@pytest.mark.parametrize("text, near", UNKNOWN.items())
def test_unknown_names(text, near):
    with pytest.raises(UserError) as caught:
        Point.parse(text)
    assert f"`{text}`" in str(caught.value)
    assert near is None or near in str(caught.value).partition("nearest:")[2]


def test_a_layer_that_is_not_there(lm):
    assert check_point(lm, "blocks.2.resid_post").layer == 2
    for make in (capture, lambda lm, name: patch(lm, {name: lambda x: x})):
        with pytest.raises(UserError, match=r"blocks\.3\.resid_post.*0 to 2"):
            make(lm, "blocks.3.resid_post")


def test_points_are_in_the_order_of_the_data(make_lm):
    """As the model calls its tap; every point has the width that is announced."""
    lm, called = make_lm(n_layers=2), []
    tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    jax.eval_shape(lambda t: lm(t, lambda name, x: called.append((name, x[0, 0].size)) or x), tokens)
    assert [str(point) for point in points(lm)] == [name for name, _ in called]
    assert len(called) == 2 + 2 * 11 and {width for _, width in called} == {16, 24, 12, 40}
    assert all(width_at(lm, Point.parse(name)) == width for name, width in called[:12])


def test_capture_of_one_and_of_many(lm, tokens):
    """Bit-equal to what a tap sees; order and doubles of the request are kept. Control: another point is not."""
    kept = {}
    jax.jit(lambda lm: lm(tokens, lambda name, x: kept.__setitem__(name, x) or x)).lower(lm)
    assert set(kept) == {str(point) for point in points(lm)}
    one = capture(lm, "blocks.1.hook_resid_post")(tokens)
    assert one.shape == (3, 11, 16)
    both = capture(lm, ["blocks.2.resid_pre", "blocks.0.attn.z"])(tokens)
    assert list(both) == ["blocks.2.resid_pre", "blocks.0.attn.z"]
    np.testing.assert_allclose(both["blocks.2.resid_pre"], one, rtol=1e-6)
    assert both["blocks.0.attn.z"].shape == (3, 11, 4, 6)
    assert not np.allclose(capture(lm, "blocks.0.resid_post")(tokens), one, rtol=1e-3)


def is_linear(x):
    return isinstance(x, Linear)


FAMILIES = {
    "gated": {},
    "plain": {"family": "gpt2", "gated": False, "act": "gelu", "n_kv_heads": 4},
    "parallel": {"family": "gpt_neox", "gated": False, "parallel": True, "act": "gelu", "n_kv_heads": 4},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_that_run_before_a_point(make_lm, tokens, family):
    """At every point the number of weights of linear maps whose change would change its activations, by gradients of a
    random sum of them. Control: a point further is not the same number."""
    lm = make_lm(n_layers=2, **FAMILIES[family])
    random = np.random.default_rng(5)
    counts = []
    seen, back = jax.vjp(lambda lm: activations(lm, tuple(points(lm)), tokens), lm)
    back = jax.jit(back)
    for at, point in enumerate(points(lm)):
        (slopes,) = back(
            tuple(jnp.asarray(random.normal(size=x.shape) * (i == at), x.dtype) for i, x in enumerate(seen))
        )
        read = [one for one in jax.tree.leaves(slopes, is_leaf=is_linear) if is_linear(one)]
        counts.append(sum(one[...].size for one in read if float(jnp.abs(one[...]).max()) > 0))
        assert weights_before(lm, point) == counts[-1], point
    assert counts[0] == 0 and counts[-1] == max(counts) and len(set(counts)) >= 10


def flops(lowered):
    return lowered.compile().cost_analysis()["flops"]


@pytest.fixture(scope="module")
def deep():
    config = LMConfig("llama", 97, 16, 8, 4, 2, 6, 40, 3e-3, Rope(777.0, 6), False, 64, "silu", 6**-0.5)
    return abstract_lm(config), jax.ShapeDtypeStruct((2, 8), jnp.int32), jax.ShapeDtypeStruct((2, 8, 16), jnp.float32)


def test_capture_computes_no_later_layer(deep):
    """The compiled program of a capture at block 1 of 8 has the operations of two blocks, within 15 %. Control: at
    block 7 it has those of eight, and a second point there brings them back."""
    lm, tokens, _ = deep

    def cost(*names):
        return flops(activations.lower(lm, tuple(Point.parse(name) for name in names), tokens))

    last = cost("blocks.7.resid_post")
    assert 1.7 / 8 < cost("blocks.1.resid_post") / last < 2.3 / 8
    assert 0.95 < cost("blocks.1.resid_post", "blocks.7.resid_post") / last < 1.05
    assert cost("blocks.7.resid_mid") < 0.97 * last


def test_resume_computes_no_earlier_layer(deep):
    """From block 5 on, two of eight are left. Control: from the embedding on, all."""
    lm, tokens, x = deep
    whole = flops(activations.lower(lm, (FINAL,), tokens))
    assert 1.7 / 8 < flops(resume.lower(lm, Point(5, "resid_post"), tokens, x)) / whole < 2.3 / 8
    assert 0.95 < flops(resume.lower(lm, Point(None, "embed"), tokens, x)) / whole < 1.05


def test_patch_with_identity_changes_nothing(lm, tokens):
    """At every point at once, bit-equal. Control: doubling a single one changes the logits."""
    logits = lm(tokens)
    everywhere = patch(lm, {point: lambda x: x for point in points(lm)})
    np.testing.assert_array_equal(everywhere(tokens), logits)
    some = ["blocks.1.attn.k", "blocks.2.mlp.pre", "final"]
    moved = {name: jax.jit(patch(lm, {name: lambda x: 2 * x}))(tokens) - logits for name in some}
    assert {name: d for name, diff in moved.items() if (d := float(jnp.abs(diff).max())) < 1e-2} == {}


@pytest.mark.parametrize("name", ["embed", "blocks.1.resid_post", "blocks.0.attn.z"])
def test_replacing_equals_resuming(lm, tokens, name):
    """`patch` with another activation and `resume` from it agree within 1e-5, also when heads are flattened; with
    the model's own activation both give its own logits. Controls: neither is the other."""
    own = capture(lm, name)(tokens)
    other = jnp.asarray(np.random.default_rng(0).normal(size=own.shape), jnp.float32)

    def resumed(x):
        return lm.unembed(resume(lm, Point.parse(name), tokens, x.reshape(3, 11, -1)))

    patched = patch(lm, {name: lambda x: other})(tokens)
    np.testing.assert_allclose(resumed(other), patched, atol=1e-5)
    np.testing.assert_allclose(resumed(own), lm(tokens), atol=1e-5)
    assert float(jnp.abs(patched - lm(tokens)).max()) > 1e-2


def test_two_edits_at_once(lm, tokens):
    """The second sees what the first did: shifting the stream at 0 and shifting it back at 1's input is no change in
    the shortcut, but block 0's own points before it stay as they were."""
    seen = {}
    shift = patch(
        lm, {"blocks.0.resid_post": lambda x: x + 1, "blocks.1.resid_pre": lambda x: seen.setdefault("x", x) - 1}
    )
    np.testing.assert_allclose(shift(tokens), lm(tokens), atol=1e-5)
    np.testing.assert_allclose(seen["x"] - 1, capture(lm, "blocks.0.resid_post")(tokens), atol=1e-5)


def test_patch_holds_what_a_function_gives(lm, tokens):
    """Zeros of whole numbers are zeros. Another shape, nothing at all, and one point under two names are refused;
    control: the same names one at a time are not."""
    site = "blocks.1.resid_post"
    whole, zero = (patch(lm, {site: lambda x, d=d: np.zeros(x.shape, d)})(tokens) for d in (np.int32, np.float32))
    np.testing.assert_array_equal(whole, zero)
    for wrong in (lambda x: x[0, 0], lambda x: x[:1], lambda x: None):
        with pytest.raises(UserError, match=r"blocks\.1\.resid_post.*keep the shape"):
            patch(lm, {site: wrong})(tokens)
    with pytest.raises(UserError, match="two names of one point"):
        patch(lm, {site: jnp.zeros_like, "blocks.1.hook_resid_post": jnp.ones_like})
    both = [patch(lm, {name: jnp.zeros_like})(tokens) for name in (site, "blocks.1.hook_resid_post")]
    np.testing.assert_array_equal(*both)
