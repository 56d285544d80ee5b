"""Writes tests/sae/goldens with the real SAELens: dictionaries of random weights, and what SAELens makes of an input.

Run in the environment of `make peers`: `.venv-peers/bin/python tests/peers/write_goldens.py`.
"""

from pathlib import Path

import torch
from sae_lens import SAE, StandardSAE, StandardSAEConfig, TopKSAE, TopKSAEConfig
from sae_lens.saes.sae import SAEMetadata
from safetensors.torch import save_file

GOLDENS = Path(__file__).parents[1] / "sae" / "goldens"
CASES = {
    "topk": (TopKSAE, TopKSAEConfig, {"k": 3}),
    "topk_uncentred": (TopKSAE, TopKSAEConfig, {"k": 3, "apply_b_dec_to_input": False}),
    "topk_rescaled": (TopKSAE, TopKSAEConfig, {"k": 3, "rescale_acts_by_decoder_norm": True}),
    "standard": (StandardSAE, StandardSAEConfig, {}),
    "standard_uncentred": (StandardSAE, StandardSAEConfig, {"apply_b_dec_to_input": False}),
}


def random_sae(case: str, seed: int, d: int = 8, m: int = 24) -> SAE:
    """A dictionary of SAELens with biases away from 0 and decoder rows of lengths from 0.3 to 3."""
    kind, config, facts = CASES[case]
    sae = kind(config(d_in=d, d_sae=m, **facts))
    sae.cfg.metadata = SAEMetadata(model_name="random", hook_name="blocks.0.hook_resid_post")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
            parameter = getattr(sae, name)
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        sae.b_enc *= 0.5
        sae.W_dec *= torch.linspace(0.3, 3, m)[torch.randperm(m, generator=generator), None] / 8**0.5
    return sae


def main() -> None:
    for seed, case in enumerate(CASES):
        sae = random_sae(case, seed)
        sae.save_model(GOLDENS / case)
        x = 2 * torch.randn((5, 8), generator=torch.Generator().manual_seed(100 + seed)) + 1
        with torch.no_grad():
            codes = sae.encode(x)
            found = {"x": x, "codes": codes, "reconstruction": sae.decode(codes)}
        save_file(found, GOLDENS / case / "expected.safetensors")


if __name__ == "__main__":
    main()
