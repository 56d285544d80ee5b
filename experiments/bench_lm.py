"""How many tokens a second pass through a language model, beside PyTorch's transformers, in one go.

    .venv/bin/python experiments/bench_lm.py [--windows 32] [--seq 256] [--rounds 3]

Two figures: to a point (SmolLM2-135M, blocks 0 to 8: what a dictionary reads), and the loss of every token of the
whole model. Both sides get the same weights and tokens in float32, and take turns, because the machine drifts;
compiling is not counted. PyTorch runs in a process of its own, with the loss as a user would write it (logits,
log-softmax, gather). Also printed: how far apart the two are.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from qsae_jax import load_lm, load_tokenizer, load_windows, save_lm
from qsae_jax.lm.load import load_config
from qsae_jax.lm.loss import token_losses
from qsae_jax.lm.model import LM
from qsae_jax.lm.sources import SMOLLM2
from qsae_jax.lm.tap import FINAL, Point, activations
from qsae_jax.pages import with_huge_pages

ROOT = Path(__file__).parents[1]
LAYER, BATCH = 8, 8
SIDES = ("ours", "torch")


def timed(step: Callable[[np.ndarray], float], batches: list[np.ndarray]) -> tuple[float, float]:
    """(tokens per second, mean of what the step gives); the first batch, which compiles, is not counted."""
    step(batches[0])
    began = time.perf_counter()
    values = [step(batch) for batch in batches]
    return sum(batch.size for batch in batches) / (time.perf_counter() - began), float(np.mean(values))


def ours(folder: Path, batches: list[np.ndarray]) -> dict[str, tuple[float, float]]:
    lm = load_lm(str(folder))

    def to_point(batch: np.ndarray) -> float:
        return float(np.abs(activations(lm, (Point(LAYER, "resid_post"),), batch)[0]).mean())

    def loss(batch: np.ndarray) -> float:
        return float(np.mean(token_losses([lm], [activations(lm, (FINAL,), batch)[0]], batch)[0][0]))

    return {"point": timed(to_point, batches), "loss": timed(loss, batches)}


def theirs(folder: Path, batches: list[np.ndarray]) -> dict[str, tuple[float, float]]:
    torch: Any = import_module("torch")  # not installed on every Python, which the type checker would say
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    every = model.model.layers

    def to_point(batch: np.ndarray) -> float:
        kept = {}
        handle = every[LAYER].register_forward_hook(lambda _, __, out: kept.__setitem__("x", out))
        model.model.layers = every[: LAYER + 1]
        with torch.no_grad():
            model.model(torch.from_numpy(batch).long(), use_cache=False)
        handle.remove()
        x = kept["x"]
        return float((x[0] if isinstance(x, tuple) else x).abs().mean())

    def loss(batch: np.ndarray) -> float:
        tokens = torch.from_numpy(batch).long()
        with torch.no_grad():
            logp = torch.log_softmax(model(tokens, use_cache=False).logits[:, :-1].float(), -1)
        return float(-logp.gather(-1, tokens[:, 1:, None]).mean())

    point = timed(to_point, batches)
    model.model.layers = every
    return {"point": point, "loss": timed(loss, batches)}


def multiplications(lm_folder: Path) -> dict[str, float]:
    """Floating-point operations per token of the matrices alone, attention's scores left out."""
    c = load_config(str(lm_folder))
    block = 2 * c.d_model * (2 * c.n_heads + 2 * c.n_kv_heads) * c.head_dim + 2 * 3 * c.d_model * c.d_ff
    return {"point": block * (LAYER + 1), "loss": block * c.n_layers + 2 * c.d_model * c.vocab}


def prepare(work: Path, windows: int, seq: int) -> None:
    if not (work / "model").is_dir():
        lm: LM = load_lm(SMOLLM2)
        save_lm(lm, work / "model")
    np.save(work / "tokens.npy", load_windows("stdlib-docs", load_tokenizer(SMOLLM2), seq).ids[:windows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--seq", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "bench_lm")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.side:
        ids = np.load(given.work / "tokens.npy")
        run = ours if given.side == "ours" else theirs
        print(json.dumps(run(given.work / "model", list(ids.reshape(-1, BATCH, ids.shape[1])))))
        return
    given.work.mkdir(parents=True, exist_ok=True)
    prepare(given.work, given.windows // BATCH * BATCH, given.seq)
    seen: dict[str, list[dict]] = {side: [] for side in SIDES}
    for _ in range(given.rounds):
        for side in SIDES:
            command = [sys.executable, __file__, "--work", str(given.work), "--side", side]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            seen[side].append(json.loads(done.stdout.splitlines()[-1]))
    work = multiplications(given.work / "model")
    for what in ("point", "loss"):
        speeds = {side: sorted(one[what][0] for one in runs) for side, runs in seen.items()}
        mine, other = (speeds[side][len(speeds[side]) // 2] for side in SIDES)
        apart = abs(seen["ours"][0][what][1] / seen["torch"][0][what][1] - 1)
        print(
            f"{what}: {mine:.0f} tokens/s, PyTorch {other:.0f}, ratio {mine / other:.2f} (medians of {given.rounds}); "
            f"{mine * work[what] / 1e9:.0f} GFLOP/s in the matrices; means apart by {apart:.1e}"
        )


if __name__ == "__main__":
    with_huge_pages()  # here, and by inheritance in the peers
    main()
