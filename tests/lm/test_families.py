"""Every family against transformers' PyTorch model, in float32 on a CPU: logits, every point, and the way back.

Three tiny random configurations each, every scalar off its default (families.py). Both sides add the same numbers in
different orders, which for values of order 10 gives differences of some 1e-5; the tolerance is 1e-4. Controls: each
scalar and each weight in turn is changed, and is seen by more than 1e-3. Only the first comparison is compiled: a
changed scalar would compile anew.
"""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange
from flax import nnx

from qsae_jax.errors import UserError
from qsae_jax.lm.families import HUB
from qsae_jax.lm.load import abstract_lm, load_lm
from qsae_jax.lm.rope import Rope
from qsae_jax.lm.save import save_lm
from qsae_jax.lm.tap import capture, patch, points
from tests.lm.families import CONFIGS, FUSED, POINTS, randomised

TOLERANCE, FAULT = 1e-4, 1e-3
CASES = [(name, i) for name, configs in CONFIGS.items() for i in range(len(configs))]


def distance(a, b):
    return float(np.abs(np.asarray(a) - np.asarray(b)).max())


def build(torch, name, facts):
    """A random model of transformers, norms and biases included."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(name, **json.loads(json.dumps(facts)))
    return randomised(torch, AutoModelForCausalLM.from_config(config, attn_implementation="eager"))


@pytest.fixture(scope="module")
def pair(torch, tmp_path_factory):
    """`pair(name, i)`: a model of transformers, and ours loaded from its folder; made once each."""
    made = {}

    def make(name, i):
        if (name, i) not in made:
            model, folder = build(torch, name, CONFIGS[name][i]), tmp_path_factory.mktemp(name)
            model.save_pretrained(folder)
            made[name, i] = model, load_lm(str(folder))
        return made[name, i]

    return make


def test_the_table_has_every_family():
    assert set(CONFIGS) == set(POINTS) == set(HUB)
    assert all(len(configs) >= 3 for configs in CONFIGS.values())


def hooked(torch, name, model, tokens, layers):
    """Every point of a transformers model, by hooks: point -> activations, heads not yet apart."""
    kept, modules = {}, dict(model.named_modules())

    def listen(module, point, side):
        def before(m, given, named):
            kept[point] = (given[0] if given else named["hidden_states"]).numpy()

        def after(m, given, out):
            kept[point] = (out[0] if isinstance(out, tuple) else out).numpy()

        if side == "in":
            return module.register_forward_pre_hook(before, with_kwargs=True)
        return module.register_forward_hook(after)

    handles = []
    for point, (module, side) in POINTS[name].items():
        for layer in range(layers) if "{}" in point else (0,):
            handles.append(listen(modules[module.format(layer)], point.format(layer), side))
    with torch.no_grad():
        out = model(torch.from_numpy(tokens).long()).logits.numpy()
    for handle in handles:
        handle.remove()
    for point in [point for point in kept if point.endswith("qkv")]:
        parts = rearrange(kept.pop(point), FUSED[name], three=3, k=6)
        kept |= {point.removesuffix("qkv") + x: part for x, part in zip("qkv", parts, strict=True)}
    return kept, out


@pytest.mark.parametrize("name, i", CASES)
def test_logits_and_every_point(pair, torch, tokens, name, i):
    """Control: the same points on the tokens turned by one are far away, all of them."""
    model, lm = pair(name, i)
    theirs, expected = hooked(torch, name, model, tokens, 3)
    if lm.config.parallel:
        theirs = {point: x for point, x in theirs.items() if "resid_mid" not in point}
    assert np.abs(expected).mean() > 0.3  # not all near zero, where anything agrees
    ours = {str(p): np.asarray(x).reshape(3, 11, -1) for p, x in capture(lm, points(lm))(tokens).items()}
    assert distance(lm.unembed(ours["final"]), expected) < TOLERANCE
    assert set(ours) == set(theirs)
    assert {p: d for p in ours if (d := distance(ours[p], theirs[p])) > TOLERANCE} == {}
    turned, _ = hooked(torch, name, model, np.roll(tokens, 1, axis=1), 3)
    assert min(distance(x, turned[p]) for p, x in ours.items()) > 1e-2


def rebuilt(lm, **changes):
    """The same weights under another config."""
    other = abstract_lm(replace(lm.config, **changes))
    nnx.update(other, nnx.state(lm))
    return other


def faults(c):
    """Every scalar of a config that the family has, each changed a little or left out."""
    yield "norm_eps", {"norm_eps": c.norm_eps * 2}
    yield "score_scale", {"score_scale": c.score_scale * 1.1}
    yield "act", {"act": "silu" if c.act != "silu" else "gelu"}
    if c.act.startswith("gelu") and not c.post_norms:
        yield "act", {"act": "gelu" if c.act == "gelu_tanh" else "gelu_tanh"}
    for key in ("score_cap", "logit_cap", "norm_offset"):
        if getattr(c, key):
            yield key, {key: 0.0}
            yield f"{key} a little", {key: getattr(c, key) * 1.1}
    if c.embed_scale != 1:
        yield "embed_scale", {"embed_scale": c.embed_scale * 1.1}
    if c.windows:
        yield "windows", {"windows": ()}
        yield "windows by one", {"windows": tuple(w + 1 if w else 0 for w in c.windows)}
        yield "order of windows", {"windows": c.windows[1:] + c.windows[:1]}
    for key in ("rope", "local_rope"):
        if turns := getattr(c, key):
            yield f"base of {key}", {key: replace(turns, theta=turns.theta * 1.5)}
            if turns.slowed:
                yield f"{key} not slowed", {key: replace(turns, slowed=None)}
            for field in ("factor", "low", "high", "original") if turns.slowed and turns.slowed.original else ():
                slowed = replace(
                    turns.slowed, **{field: type(getattr(turns.slowed, field))(getattr(turns.slowed, field) * 1.3)}
                )
                yield f"{field} of {key}", {key: replace(turns, slowed=slowed)}
            if turns.dims < c.head_dim:
                yield "share of rotary", {key: Rope(turns.theta, c.head_dim)}
    if c.local_rope:
        yield "local_rope", {"local_rope": None}
    if not c.post_norms and not c.gated and c.rope:
        yield "parallel", {"parallel": not c.parallel}


@pytest.mark.parametrize("name, i", CASES)
def test_every_scalar_is_seen(pair, torch_logits, tokens, name, i):
    """A changed scalar changes the logits. The windows in another order are seen where they differ by layer."""
    model, lm = pair(name, i)
    expected, seen = torch_logits(model, tokens), {}
    for fault, change in faults(lm.config):
        if replace(lm.config, **change) != lm.config:
            seen[fault] = distance(rebuilt(lm, **change)(tokens), expected)
    assert len(seen) >= 3
    # GELU and its tanh approximation differ by 5e-4 at most: in the logits of these models by 1e-3 and more.
    assert {fault: d for fault, d in seen.items() if d < (2e-4 if fault == "act" else FAULT)} == {}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_weight_is_seen(pair, torch_logits, tokens, name):
    """Each weight of the ends and of the middle layer, its first axis turned by one. A bias of all keys adds the same
    to every score where no rotary turns it, so that of GPT-2 changes nothing."""
    model, lm = pair(name, 0)
    expected, flat = torch_logits(model, tokens), nnx.to_flat_state(nnx.state(lm))
    seen = {}
    for path, leaf in flat:
        if path[0] != "blocks" or path[1] == 1:
            other = nnx.clone(lm)
            nnx.update(other, nnx.from_flat_state([(path, leaf.replace(jnp.roll(leaf.get_value(), 1, axis=0)))]))
            seen[".".join(map(str, path))] = distance(other(tokens), expected)
    if name == "gpt2":
        assert seen.pop("blocks.1.attn.k_bias") < TOLERANCE
    assert len(seen) > 10
    assert {path: d for path, d in seen.items() if d < FAULT} == {}


@pytest.mark.parametrize("name, i", CASES)
def test_transformers_reads_what_is_saved(pair, torch_logits, tokens, tmp_path, name, i):
    """Logits within 1e-4, no weight missing or left over, and the same config when read again; reloaded weights are
    bit-equal. Control: one weight exported in another order gives other logits."""
    from transformers import AutoModelForCausalLM

    _, lm = pair(name, i)
    save_lm(lm, tmp_path / "saved")
    model, told = AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(told.values()), told
    theirs = torch_logits(model.eval(), tokens)
    assert distance(lm(tokens), theirs) < TOLERANCE
    again = load_lm(str(tmp_path / "saved"))
    assert replace(again.config, score_scale=lm.config.score_scale) == lm.config
    assert abs(again.config.score_scale / lm.config.score_scale - 1) < 1e-12
    for a, b in zip(jax.tree.leaves(nnx.state(lm)), jax.tree.leaves(nnx.state(again)), strict=True):
        np.testing.assert_array_equal(a, b)
    other = nnx.clone(lm)
    other.blocks[2].attn.o.set_value(jnp.roll(other.blocks[2].attn.o[...], 1, axis=0))
    assert distance(other(tokens), theirs) > FAULT


@pytest.mark.parametrize("name", CONFIGS)
def test_unknown_facts_are_refused(pair, tmp_path, name):
    """Any key that the family's table does not know is named; control: without it the same folder loads."""
    _, lm = pair(name, 0)
    save_lm(lm, tmp_path / "saved")
    load_lm(str(tmp_path / "saved"))
    file = tmp_path / "saved" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"attention_sinks": 3}))
    with pytest.raises(UserError, match="attention_sinks"):
        load_lm(str(tmp_path / "saved"))


@pytest.mark.parametrize("name", CONFIGS)
def test_every_point_can_be_replaced_added_to_and_ablated(pair, tokens, name):
    """At each point of the middle layer and the ends: zeros in its place change the logits, so does a vector added;
    what it was in its place does not, by a bit."""
    _, lm = pair(name, 0)
    before = np.asarray(lm(tokens))
    for point in [point for point in points(lm) if point.layer in (None, 1)]:
        site = str(point)
        np.testing.assert_array_equal(patch(lm, {site: lambda x: x})(tokens), before)
        assert distance(patch(lm, {site: jnp.zeros_like})(tokens), before) > FAULT, site
        ramp = patch(lm, {site: lambda x: x + jnp.linspace(-1, 1, x.shape[-1]).reshape((1,) * (x.ndim - 1) + (-1,))})
        if (name, point.site) != ("gpt2", "attn.k"):  # the same for every key: the softmax does not see it
            assert distance(ramp(tokens), before) > FAULT, site
