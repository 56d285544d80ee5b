"""Dictionaries trained by SAELens and dictionary_learning on a file of activations; quality_sae.py runs it.

    .venv-peers/bin/python experiments/peer_dictionaries.py LIB KIND ROWS.npy OUT --latents M --k K [--lr LR] ...

LIB is saelens or dictionary_learning, KIND topk or batchtopk. What decides the result beside the library is the same
for all: rows in the order of the file, batch, width, k, warm-up and decay of the learning rate, and after how many
tokens a latent is dead. What a library says itself (initialisation, AuxK, b_dec, normalisation) is left as it is.
Prints one JSON line: seconds and samples per second.
"""

# pyright: reportMissingImports=false

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch


def saelens(kind: str, rows: torch.Tensor, out: Path, given: argparse.Namespace) -> float:
    """Trained on activations of mean norm sqrt(d) (`expected_average_only_in`), folded before it is saved."""
    from sae_lens import SAETrainer
    from sae_lens.config import SAETrainerConfig
    from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig

    d, steps = rows.shape[1], len(rows) // given.batch
    facts = {"d_in": d, "d_sae": given.latents, "k": given.k}
    sae = (
        TopKTrainingSAE(TopKTrainingSAEConfig(**facts))
        if kind == "topk"
        else BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(**facts))
    )
    scale = d**0.5 / rows[:8192].norm(dim=-1).mean().item()
    config = SAETrainerConfig(
        total_training_samples=len(rows), train_batch_size_samples=given.batch, lr=given.lr or 3e-4, lr_end=1e-12,
        lr_scheduler_name="constant", lr_warm_up_steps=steps // 20, lr_decay_steps=int(steps * 0.3),
        dead_feature_window=max(given.dead_after // given.batch, 1), device="cpu",
    )  # fmt: skip
    batches = iter((rows * scale).split(given.batch))
    trainer = SAETrainer(config, sae, batches)
    began = time.perf_counter()
    for batch in (rows * scale).split(given.batch):
        trainer.step(batch)
        trainer.n_training_steps += 1
    took = time.perf_counter() - began
    sae.fold_activation_norm_scaling_factor(scale)
    sae.save_inference_model(out)
    return took


def dictionary_learning(kind: str, rows: torch.Tensor, out: Path, given: argparse.Namespace) -> float:
    """Trained on activations of mean square norm 1, as its own loop normalises them; scaled back before it is saved."""
    from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
    from dictionary_learning.trainers.top_k import TopKTrainer

    d, steps = rows.shape[1], len(rows) // given.batch
    make = {"topk": TopKTrainer, "batchtopk": BatchTopKTrainer}[kind]
    trainer = make(
        steps=steps, activation_dim=d, dict_size=given.latents, k=given.k, layer=0, lm_name="none", device="cpu",
        warmup_steps=max(steps // 20, 1), decay_start=int(steps * 0.7), lr=given.lr or None, seed=given.seed,
        threshold_start_step=int(steps * 0.3), threshold_beta=0.99,
    )  # fmt: skip
    trainer.dead_feature_threshold = given.dead_after
    scale = rows[:8192].pow(2).sum(-1).mean().sqrt().item()
    began = time.perf_counter()
    for step, batch in enumerate((rows / scale).split(given.batch)):
        trainer.update(step, batch)
    took = time.perf_counter() - began
    trainer.ae.scale_biases(scale)
    out.mkdir(parents=True, exist_ok=True)
    torch.save(trainer.ae.state_dict(), out / "ae.pt")
    (out / "config.json").write_text(json.dumps({"trainer": trainer.config, "buffer": {}}, default=str))
    return took


def main() -> None:
    asked = argparse.ArgumentParser()
    asked.add_argument("lib", choices=("saelens", "dictionary_learning"))
    asked.add_argument("kind", choices=("topk", "batchtopk"))
    asked.add_argument("rows", type=Path)
    asked.add_argument("out", type=Path)
    for name, kind, default in (
        ("latents", int, 2304), ("k", int, 32), ("batch", int, 1024), ("dead-after", int, 32_768), ("seed", int, 0),
        ("lr", float, 0.0),
    ):  # fmt: skip
        asked.add_argument(f"--{name}", type=kind, default=default)
    given = asked.parse_args()
    torch.manual_seed(given.seed)
    rows = torch.from_numpy(np.load(given.rows))
    train = {"saelens": saelens, "dictionary_learning": dictionary_learning}[given.lib]
    took = train(given.kind, rows[: len(rows) // given.batch * given.batch], given.out, given)
    print(json.dumps({"seconds": round(took, 2), "samples_per_s": round(len(rows) / took, 1)}))


if __name__ == "__main__":
    main()
