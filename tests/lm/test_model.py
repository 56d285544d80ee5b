"""The forward pass against transformers' PyTorch Llama, at every point, in float32 on a CPU.

Both add the same numbers in different orders, which for values of order 1 gives differences of some 1e-6; the
tolerance is 1e-4. The faults planted as controls differ by more than 1e-2.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qsae_jax.lm.families import HUB
from qsae_jax.lm.layers import RMSNorm
from qsae_jax.lm.load import abstract_lm, load_lm
from qsae_jax.lm.model import count_parameters
from qsae_jax.lm.rope import Rope, rotary
from qsae_jax.lm.tap import capture, points

TOLERANCE = 1e-4
FAULT = 1e-2


def distance(a, b):
    return float(np.abs(np.asarray(a) - np.asarray(b)).max())


def rebuilt(lm, **changes):
    """The same weights under another config."""
    other = abstract_lm(replace(lm.config, **changes))
    nnx.update(other, nnx.state(lm))
    return other


def shuffled(lm, path):
    """The same model with one weight's first dimension turned by one."""
    other = nnx.clone(lm)
    leaf = dict(nnx.to_flat_state(nnx.state(other)))[path]
    leaf.set_value(jnp.roll(leaf.get_value(), 1, axis=0))
    nnx.update(other, nnx.from_flat_state([(path, leaf)]))
    return other


logits = jax.jit(lambda lm, tokens: lm(tokens))


@pytest.fixture(scope="module")
def pair(llama, tmp_path_factory):
    """A transformers model, and ours loaded from its folder."""
    model, folder = llama(), tmp_path_factory.mktemp("llama")
    model.save_pretrained(folder)
    return model, load_lm(str(folder))


FAULTS = {
    "rope base": lambda lm: rebuilt(lm, rope=Rope(10000.0, 6)),
    "norm epsilon": lambda lm: rebuilt(lm, norm_eps=1e-6),
    "head tied": lambda lm: rebuilt(lm, tied=True),
    **{
        f"{'.'.join(map(str, path))} shuffled": lambda lm, path=path: shuffled(lm, path)
        for path in [
            ("embed",),
            ("head",),
            ("final_norm", "scale"),
            ("blocks", 0, "attn_norm", "scale"),
            ("blocks", 2, "mlp_norm", "scale"),
            *(("blocks", 1, "attn", x) for x in "qkvo"),
            *(("blocks", 1, "mlp", x) for x in ("gate", "up", "down")),
        ]
    },
}


def test_logits_equal_transformers_and_every_fault_is_seen(pair, torch_logits, tokens):
    model, lm = pair
    expected = torch_logits(model, tokens)
    assert np.abs(expected).mean() > 0.5  # not all near zero, where anything agrees
    assert distance(logits(lm, tokens), expected) < TOLERANCE
    seen = {name: distance(logits(fault(lm), tokens), expected) for name, fault in FAULTS.items()}
    assert {name: d for name, d in seen.items() if d < FAULT} == {}


def hooked(torch, model, tokens):
    """Every point of a transformers model, by hooks: point -> activations, heads not yet apart."""
    kept = {}

    def after(module, name):
        module.register_forward_hook(
            lambda m, given, out: kept.__setitem__(name, out[0] if isinstance(out, tuple) else out)
        )

    def before(module, name):
        module.register_forward_pre_hook(
            lambda m, given, named: kept.__setitem__(name, given[0] if given else named["hidden_states"]),
            with_kwargs=True,
        )

    after(model.model.embed_tokens, "embed")
    after(model.model.norm, "final")
    for layer, block in enumerate(model.model.layers):
        at = f"blocks.{layer}."
        before(block, at + "resid_pre")
        before(block.post_attention_layernorm, at + "resid_mid")
        after(block, at + "resid_post")
        for x in "qkv":
            after(getattr(block.self_attn, f"{x}_proj"), at + f"attn.{x}")
        before(block.self_attn.o_proj, at + "attn.z")
        after(block.self_attn, at + "attn_out")
        after(block.mlp.gate_proj, at + "mlp.pre")
        before(block.mlp.down_proj, at + "mlp.post")
        after(block.mlp, at + "mlp_out")
    with torch.no_grad():
        states = model(torch.from_numpy(tokens).long(), output_hidden_states=True).hidden_states
    return {name: value.numpy() for name, value in kept.items()}, [state.numpy() for state in states]


def test_every_point_equals_a_hook_and_its_neighbours_do_not(pair, torch, tokens):
    """Each point against a forward hook and, for the residual stream, against `hidden_states`. Control: the hooks
    of another layer, of another site of the same width, and of the other tokens are all far away."""
    model, lm = pair
    theirs, states = hooked(torch, model, tokens)
    ours = {str(p): np.asarray(x).reshape(3, 11, -1) for p, x in capture(lm, points(lm))(tokens).items()}
    assert set(ours) == set(theirs)
    assert {p: d for p in ours if (d := distance(ours[p], theirs[p])) > TOLERANCE} == {}
    assert distance(ours["blocks.0.resid_post"], states[1]) < TOLERANCE
    assert distance(ours["blocks.1.resid_pre"], states[1]) < TOLERANCE
    assert distance(ours["final"], states[3]) < TOLERANCE
    same = {frozenset([f"blocks.{i}.resid_post", f"blocks.{i + 1}.resid_pre"]) for i in range(2)}
    same.add(frozenset(["embed", "blocks.0.resid_pre"]))
    pairs = [(a, b) for a in ours for b in theirs if a != b and ours[a].shape == theirs[b].shape]
    assert len(pairs) > 300
    near = {frozenset([a, b]) for a, b in pairs if distance(ours[a], theirs[b]) < FAULT}
    assert near == same


def test_a_point_is_not_compared_with_itself_of_other_tokens(pair, torch, tokens):
    """Control of the comparison above: the same point on the tokens turned by one is far away."""
    model, lm = pair
    theirs, _ = hooked(torch, model, np.roll(tokens, 1, axis=1))
    ours = capture(lm, points(lm))(tokens)
    assert min(distance(np.asarray(x).reshape(3, 11, -1), theirs[str(p)]) for p, x in ours.items()) > FAULT


@pytest.mark.parametrize("theta", [777.0, 10000.0])
def test_rotary_equals_complex_multiplication_in_float64(theta):
    """Coordinate i and i + k/2 as one complex number, turned by position * theta^(-2i/k); 1e-5 for float32 angles
    up to 12. Control: with neighbours paired, as GPT-J and llama.cpp store them, the result is another."""
    x = np.random.default_rng(0).normal(size=(2, 13, 3, 8)).astype(np.float32)
    turn = np.exp(1j * np.arange(13)[:, None] * theta ** (-2 * np.arange(4) / 8))[None, :, None]
    halves = (x[..., :4] + 1j * x[..., 4:]) * turn
    ours = rotary(jnp.asarray(x), Rope(theta, 8))
    assert distance(ours, np.concatenate([halves.real, halves.imag], -1)) < 1e-5
    neighbours = (x[..., ::2] + 1j * x[..., 1::2]) * turn
    assert distance(ours, np.stack([neighbours.real, neighbours.imag], -1).reshape(x.shape)) > FAULT


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_norm_equals_float64_and_is_computed_in_float32(dtype):
    """Relative 1e-6 in float32, half a last place (2^-8) in bfloat16. Controls: an epsilon left out, and squares
    summed in bfloat16, are off by more."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 500)) * 0.05, dtype)
    norm = RMSNorm(500, 3e-3)
    y = np.asarray(x, np.float64)

    def expected(eps):
        return y / np.sqrt((y**2).mean(-1, keepdims=True) + eps)

    tolerance = 1e-6 if dtype == jnp.float32 else 2**-8
    assert norm(x).dtype == dtype
    np.testing.assert_allclose(np.asarray(norm(x), np.float64), expected(3e-3), rtol=tolerance)
    assert not np.allclose(np.asarray(norm(x), np.float64), expected(0.0), rtol=tolerance)
    coarse = x * jax.lax.rsqrt(jax.lax.reduce_precision(jnp.sum(x * x, -1, keepdims=True), 8, 3) / 500 + 3e-3)
    assert not np.allclose(np.asarray(coarse, np.float64), expected(3e-3), rtol=tolerance)


def test_causality(lm, tokens):
    """Changing the last token changes no earlier logit by a bit, and does change the last."""
    other = tokens.copy()
    other[:, -1] = (other[:, -1] + 1) % 97
    a, b = np.asarray(logits(lm, tokens)), np.asarray(logits(lm, other))
    np.testing.assert_array_equal(a[:, :-1], b[:, :-1])
    assert distance(a[:, -1], b[:, -1]) > FAULT


@pytest.mark.parametrize("tied", [False, True])
def test_parameters_are_counted(llama, facts, tied):
    """Against PyTorch's count: a tied head is counted once in both."""
    config = HUB["llama"].config(facts | {"tie_word_embeddings": tied})
    model = llama(tie_word_embeddings=tied)
    assert count_parameters(abstract_lm(config)) == sum(p.numel() for p in model.parameters())
