"""Tiny Llamas with every scalar off its default: on disk, in transformers and in Flax."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qsae_jax.lm.load import abstract_lm
from qsae_jax.lm.model import LMConfig
from qsae_jax.lm.rope import Rope
from tests.lm.families import randomised

FACTS = {
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 6,  # not 24 / 8
    "rms_norm_eps": 3e-3,
    "rope_parameters": {"rope_type": "default", "rope_theta": 777.0},
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}


GGML = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def ggml_name(name):
    name = name.removesuffix(".weight")
    if name.startswith("model.layers."):
        layer, rest = name.removeprefix("model.layers.").split(".", 1)
        return f"blk.{layer}.{GGML[rest]}.weight"
    return f"{GGML[name]}.weight"


@pytest.fixture
def facts():
    """A `config.json` as transformers 5 has it."""
    return json.loads(json.dumps(FACTS))


@pytest.fixture(scope="session")
def tokens():
    """Token ids `[3, 11]`; id 0 and repeats are among them."""
    ids = np.random.default_rng(7).integers(0, FACTS["vocab_size"], (3, 11)).astype(np.int32)
    ids[0, :3] = 0
    return ids


@pytest.fixture(scope="session")
def llama(torch):
    """Makes a random LlamaForCausalLM of transformers, norms included."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def make(**changes):
        return randomised(torch, LlamaForCausalLM(LlamaConfig(**(FACTS | changes))))

    return make


@pytest.fixture(scope="session")
def torch_logits(torch):
    """Logits of a transformers model, as NumPy."""

    def run(model, tokens):
        with torch.no_grad():
            return model(torch.from_numpy(tokens).long()).logits.float().numpy()

    return run


@pytest.fixture(scope="session")
def tensors():
    """Makes the tensors of a Hugging Face Llama, name -> array `[out, in]`, from a `config.json`."""

    def make(facts, seed=0, dtype=np.float32):
        random = np.random.default_rng(seed)
        d, f, v = facts["hidden_size"], facts["intermediate_size"], facts["vocab_size"]
        q, kv = (facts[f"num_{kind}_heads"] * facts["head_dim"] for kind in ("attention", "key_value"))
        shapes = {"model.embed_tokens.weight": (v, d), "model.norm.weight": (d,)}
        if not facts["tie_word_embeddings"]:
            shapes["lm_head.weight"] = (v, d)
        for layer in range(facts["num_hidden_layers"]):
            at = f"model.layers.{layer}."
            shapes |= {at + f"{norm}_layernorm.weight": (d,) for norm in ("input", "post_attention")}
            attention = {"q": (q, d), "k": (kv, d), "v": (kv, d), "o": (d, q)}
            shapes |= {at + f"self_attn.{x}_proj.weight": shape for x, shape in attention.items()}
            mlp = {"gate": (f, d), "up": (f, d), "down": (d, f)}
            shapes |= {at + f"mlp.{x}_proj.weight": shape for x, shape in mlp.items()}
        made = {name: random.normal(0, 0.3, shape) + (len(shape) == 1) for name, shape in shapes.items()}
        return {name: value.astype(dtype) for name, value in made.items()}

    return make


@pytest.fixture
def write_folder(tmp_path):
    """Writes a Hugging Face folder."""
    from safetensors.numpy import save_file

    def write(facts, tensors, name="model"):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(facts))
        save_file(tensors, folder / "model.safetensors")
        return folder

    return write


@pytest.fixture(scope="session")
def make_lm():
    """Makes a random LM, norms included."""

    def make(seed=0, **changes):
        config = {"family": "llama", "vocab": 97, "d_model": 16, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2}
        config |= {"head_dim": 6, "d_ff": 40, "norm_eps": 3e-3, "rope": Rope(777.0, 6), "tied": False, "context": 64}
        config |= {"act": "silu", "score_scale": 6**-0.5}
        random = np.random.default_rng(seed)

        def fill(x):
            return jnp.asarray(random.normal(x.ndim == 1, 0.3, x.shape), x.dtype)

        return jax.tree.map(fill, abstract_lm(LMConfig(**(config | changes))))

    return make


@pytest.fixture(scope="session")
def lm(make_lm):
    return make_lm()


def _metadata(facts):
    """What `GGUFWriter.add_*` is called with."""
    return {
        "block_count": facts["num_hidden_layers"],
        "context_length": facts["max_position_embeddings"],
        "embedding_length": facts["hidden_size"],
        "feed_forward_length": facts["intermediate_size"],
        "head_count": facts["num_attention_heads"],
        "head_count_kv": facts["num_key_value_heads"],
        "key_length": facts["head_dim"],
        "value_length": facts["head_dim"],
        "rope_dimension_count": facts["head_dim"],
        "rope_freq_base": facts["rope_parameters"]["rope_theta"],
        "layer_norm_rms_eps": facts["rms_norm_eps"],
        "vocab_size": facts["vocab_size"],
    }


@pytest.fixture
def gguf_file(tmp_path):
    """Writes a GGUF file: HF name -> (array, type or None); gives its path. `extra` is metadata as it stands."""
    import gguf

    def write(facts, entries, architecture="llama", skip=(), extra=(), name="model.gguf"):
        writer = gguf.GGUFWriter(tmp_path / name, architecture)
        for key, value in _metadata(facts).items():
            if key not in skip:
                getattr(writer, f"add_{key}")(value)
        for key, value in dict(extra).items():
            writer.add_uint32(key, value)
        for stored, (array, kind) in entries.items():
            writer.add_tensor(ggml_name(stored), np.ascontiguousarray(array), raw_dtype=kind)
        for step in ("write_header_to_file", "write_kv_data_to_file", "write_tensors_to_file", "close"):
            getattr(writer, step)()
        return str(tmp_path / name)

    return write
