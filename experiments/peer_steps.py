# pyright: reportMissingImports=false
"""One training step of SAELens or dictionary_learning after another, on random activations; bench_sae.py runs it.

    .venv-peers/bin/python experiments/peer_steps.py LIB KIND D M K BATCH STEPS

LIB is saelens (topk, batchtopk, matryoshka, standard, gated, jumprelu) or dictionary_learning (topk, batchtopk). Each
is built as its own defaults say and stepped as its own loop steps it. Prints one JSON line: the median step, in
milliseconds, after three that are not counted.
"""

import importlib
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

SAELENS = {
    "topk": ("topk_sae", "TopK"),
    "batchtopk": ("batchtopk_sae", "BatchTopK"),
    "matryoshka": ("matryoshka_batchtopk_sae", "MatryoshkaBatchTopK"),
    "standard": ("standard_sae", "Standard"),
    "gated": ("gated_sae", "Gated"),
    "jumprelu": ("jumprelu_sae", "JumpReLU"),
}
DICTIONARY_LEARNING = {"topk": ("top_k", "TopKTrainer"), "batchtopk": ("batch_top_k", "BatchTopKTrainer")}


def saelens(kind: str, d: int, m: int, k: int, batches: Iterator[torch.Tensor], batch: int) -> Callable[[], Any]:
    from sae_lens import SAETrainer
    from sae_lens.config import SAETrainerConfig

    module, name = SAELENS[kind]
    owner = importlib.import_module(f"sae_lens.saes.{module}")
    facts: dict[str, Any] = {"d_in": d, "d_sae": m}
    if "topk" in module:
        facts["k"] = k
    if kind == "matryoshka":
        facts["matryoshka_widths"] = [m // 32, 3 * m // 32, 7 * m // 32, 15 * m // 32, m]
    sae = getattr(owner, f"{name}TrainingSAE")(getattr(owner, f"{name}TrainingSAEConfig")(**facts))
    config = SAETrainerConfig(
        total_training_samples=batch * 10**6, train_batch_size_samples=batch, lr=3e-4, lr_end=3e-5
    )
    trainer = SAETrainer(config, sae, batches)

    def step() -> None:
        trainer.step(next(batches))
        trainer.n_training_steps += 1

    return step


def dictionary_learning(
    kind: str, d: int, m: int, k: int, batches: Iterator[torch.Tensor], batch: int
) -> Callable[[], Any]:
    module, name = DICTIONARY_LEARNING[kind]
    make = getattr(importlib.import_module(f"dictionary_learning.trainers.{module}"), name)
    trainer = make(steps=10**6, activation_dim=d, dict_size=m, k=k, layer=0, lm_name="none", device="cpu")
    count = itertools.count()
    return lambda: trainer.update(next(count), next(batches))


def main() -> None:
    lib, kind = sys.argv[1:3]
    d, m, k, batch, steps = map(int, sys.argv[3:8])
    pool = torch.randn(16 * batch, d, generator=torch.Generator().manual_seed(0))
    build = {"saelens": saelens, "dictionary_learning": dictionary_learning}[lib]
    step, times = build(kind, d, m, k, itertools.cycle(pool.split(batch)), batch), []
    for _ in range(3 + steps):
        began = time.perf_counter()
        step()
        times.append(time.perf_counter() - began)
    print(json.dumps({"ms_per_step": round(1e3 * statistics.median(times[3:]), 1)}))


if __name__ == "__main__":
    main()
