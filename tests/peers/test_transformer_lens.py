"""Processed models against TransformerLens itself: tiny random models of transformers through its own converters and
its own processing, at every point and every weight that both have, within 1e-4 (float32, values of order 1 to 10)."""

import tempfile

import numpy as np
import pytest
from einops import rearrange

from qsae_jax.lm.load import load_lm
from qsae_jax.lm.tap import capture, points

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("transformer_lens")

TOLERANCE, FAULT = 1e-4, 1e-2
BASE = {"vocab_size": 97, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 40}
BASE |= {"max_position_embeddings": 32}
RMS = BASE | {"rms_norm_eps": 3e-3, "num_key_value_heads": 2}
# TransformerLens ignores GPT-2's n_inner and NeoX's rotary base, and rounds its share of rotary: 4 of 6 in both.
NEOX = BASE | {"layer_norm_eps": 3e-3, "rotary_pct": 0.67}
MODELS = {
    "gpt2": ("gpt2", {"vocab_size": 97, "n_embd": 24, "n_layer": 3, "n_head": 4, "n_positions": 32, "n_ctx": 32,
                      "layer_norm_epsilon": 3e-3}),
    "neox parallel": ("gpt_neox", NEOX),
    "neox sequential": ("gpt_neox", NEOX | {"use_parallel_residual": False}),
    "llama": ("llama", RMS),
    "mistral": ("mistral", RMS | {"head_dim": 6, "sliding_window": 4}),
    "qwen2": ("qwen2", RMS),
}  # fmt: skip


def build(kind, facts):
    config = transformers.AutoConfig.for_model(kind, **facts)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    random = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=random) * 0.3 + (1 if p.ndim == 1 else 0.05))
    return model


def hooked(model, processed):
    """What `HookedTransformer.from_pretrained` gives, without the hub's name."""
    from transformer_lens import HookedTransformer
    from transformer_lens import loading_from_pretrained as loading

    flags = dict.fromkeys(("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases"), processed)
    with tempfile.TemporaryDirectory(prefix="tiny_") as path:
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(path)
        cfg = loading.get_pretrained_model_config(
            path, hf_cfg=model.config.to_dict(), fold_ln=processed, device="cpu", dtype=torch.float32
        )
        cfg.tokenizer_name = None
        state = loading.get_pretrained_state_dict(path, cfg, model, dtype=torch.float32)
    state = {key: value.detach().clone() for key, value in state.items()}
    lens = HookedTransformer(cfg, tokenizer=None, move_to_device=False)
    lens.load_and_process_state_dict(state, refactor_factored_attn_matrices=False, **flags)
    return lens.eval()


def lens_name(point):
    """blocks.1.attn.q -> blocks.1.attn.hook_q; `final` is what the unembedding reads."""
    if str(point) == "final":
        return "ln_final.hook_normalized"
    head, _, last = str(point).rpartition(".")
    return f"{head}.hook_{last}" if head else f"hook_{last}"


def far(a, b):
    return float(np.abs(np.asarray(a) - np.asarray(b)).max())


@pytest.fixture(params=MODELS)
def trio(request, tmp_path):
    """Ours processed, ours as it is, and TransformerLens's."""
    model = build(*MODELS[request.param])
    model.save_pretrained(tmp_path)
    ours = load_lm(str(tmp_path), processing="transformer_lens")
    return ours, load_lm(str(tmp_path)), hooked(model, True)


def test_every_point_and_the_logits(trio):
    """Control: the unprocessed model differs at some point by more than 1e-2, and in its logits."""
    ours, plain, lens = trio
    tokens = np.random.default_rng(0).integers(0, 97, (2, 13)).astype(np.int32)
    with torch.no_grad():
        logits, cache = lens.run_with_cache(torch.from_numpy(tokens).long())
    mine = capture(ours, points(ours))(tokens)
    apart = {str(p): far(x, cache[lens_name(p)]) for p, x in mine.items()}
    assert {point: d for point, d in apart.items() if d > TOLERANCE} == {}
    assert far(ours(tokens), logits) < TOLERANCE
    assert far(plain(tokens), logits) > FAULT
    theirs = capture(plain, points(plain))(tokens)
    assert max(far(x, cache[lens_name(p)]) for p, x in theirs.items()) > FAULT


def test_every_weight(trio):
    """What a quantizer would round: q, k, v, o, the mlp and the head, in TransformerLens's layout."""
    ours, plain, lens = trio

    def weights(lm):
        attn, mlp = lm.blocks[1].attn, lm.blocks[1].mlp
        named = {f"W_{x.upper()}": rearrange(np.asarray(getattr(attn, x)[...]), "d h k -> h d k") for x in "qkv"}
        named |= {"W_O": attn.o[...], "W_in": mlp.up[...], "W_out": mlp.down[...], "W_E": lm.embed[...]}
        return named | ({"W_gate": mlp.gate[...]} if lm.config.gated else {})

    groups = lens.cfg.n_heads // (lens.cfg.n_key_value_heads or lens.cfg.n_heads)
    expected = {name: getattr(lens, name)[1].detach().numpy() for name in weights(ours) if name != "W_E"}
    expected["W_E"] = lens.W_E.detach().numpy()
    expected |= {name: expected[name][::groups] for name in ("W_K", "W_V")}  # repeated for each head there
    assert {name: d for name, x in weights(ours).items() if (d := far(x, expected[name])) > 1e-5} == {}
    assert far(ours.head[...].T, lens.W_U.detach().numpy()) < 1e-5
    assert far(weights(plain)["W_Q"], expected["W_Q"]) > FAULT
    o_bias = 0 if ours.blocks[1].attn.o_bias is None else ours.blocks[1].attn.o_bias[...]
    assert far(o_bias, lens.b_O[1].detach().numpy()) < 1e-5
    head_bias = 0 if ours.head_bias is None else ours.head_bias[...]
    assert far(head_bias, lens.b_U.detach().numpy()) < 1e-5
