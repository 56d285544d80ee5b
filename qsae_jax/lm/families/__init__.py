"""Every family by the name that its files use: `model_type` of a config.json, `general.architecture` of a GGUF file.

Adding a family is one entry here and one line in tests/lm/families.py.
"""

from qsae_jax.lm.families import gemma, gpt2, llama, neox
from qsae_jax.lm.families.table import Family

HUB: dict[str, Family] = {
    "llama": Family(llama.llama, llama.ROWS, llama.export_llama, prefix="model.", ignored=llama.IGNORED),
    "mistral": Family(llama.mistral, llama.ROWS, llama.export_mistral, prefix="model.", ignored=llama.IGNORED),
    "qwen2": Family(llama.qwen2, llama.ROWS, llama.export_qwen2, prefix="model.", ignored=llama.IGNORED),
    "qwen3": Family(llama.qwen3, llama.ROWS, llama.export_qwen3, prefix="model.", ignored=llama.IGNORED),
    "gemma2": Family(gemma.gemma2, gemma.ROWS, gemma.export_gemma2, prefix="model.", ignored=llama.IGNORED),
    "gemma3_text": Family(gemma.gemma3, gemma.ROWS, gemma.export_gemma3, prefix="model.", ignored=llama.IGNORED),
    "gpt2": Family(gpt2.gpt2, gpt2.ROWS, gpt2.export_gpt2, prefix="transformer.", ignored=gpt2.IGNORED),
    "gpt_neox": Family(neox.neox, neox.ROWS, neox.export_neox, prefix="gpt_neox.", ignored=neox.IGNORED),
}
GGML: dict[str, Family] = {
    "llama": Family(llama.llama_gguf, llama.GGUF_ROWS, ignored=llama.GGUF_IGNORED),
    "qwen2": Family(llama.qwen2_gguf, llama.PLAIN_GGUF_ROWS),
    "qwen3": Family(llama.qwen3_gguf, llama.PLAIN_GGUF_ROWS),
    "gemma2": Family(gemma.gemma2_gguf, gemma.GGUF_ROWS, shifted_norms=True),
    "gemma3": Family(gemma.gemma3_gguf, gemma.GGUF_ROWS, shifted_norms=True),
    "gpt2": Family(gpt2.gpt2_gguf, gpt2.GGUF_ROWS),
    "gptneox": Family(neox.neox_gguf, neox.GGUF_ROWS),
}
