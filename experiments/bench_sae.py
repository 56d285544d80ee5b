"""How fast dictionaries train beside SAELens and dictionary_learning, one after the other, in one go.

    make peers      # once: the environment of the PyTorch tools
    .venv/bin/python experiments/bench_sae.py [--latents 8192 32768] [--kinds topk relu] [--runner]

Steps on random activations (d 512, k 32, batch 2048, AuxK on, float32), after three that are not counted: compiling
is paid once a training. Beside each of our steps stands the product of the batch with the encoder, which no exact
method does without. `--dead` counts half of the latents as dead, so that AuxK has work. `--runner` times the whole way
instead, from tokens to a saved dictionary (SmolLM2, block 8, 4,608 latents), beside SAELens's own runner. The peers'
scripts are peer_steps.py and peer_runner.py.
"""

import argparse
import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qsae_jax import load_lm, load_tokenizer, load_windows, save_lm, save_sae
from qsae_jax.acts.stream import ActivationStream
from qsae_jax.lm.sources import SMOLLM2
from qsae_jax.lm.tap import Point
from qsae_jax.mesh import make_mesh
from qsae_jax.pages import with_huge_pages
from qsae_jax.products import in_bfloat16, matmul
from qsae_jax.sae.fit import Job, fit
from qsae_jax.sae.settings import SAEConfig
from qsae_jax.sae.train import make_step, start

ROOT = Path(__file__).parents[1]
D, K, BATCH = 512, 32, 2048
PEERS = {
    "topk": ("saelens topk", "dictionary_learning topk"),
    "batchtopk": ("saelens batchtopk", "dictionary_learning batchtopk"),
    "matryoshka": ("saelens matryoshka",),
    "relu": ("saelens standard",),
    "gated": ("saelens gated",),
    "jumprelu": ("saelens jumprelu",),
}


def milliseconds(run: Callable[[], Any], steps: int) -> float:
    """The median of so many runs."""
    times = []
    for _ in range(steps):
        began = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - began)
    return 1e3 * statistics.median(times)


def product(latents: int, steps: int, bf16: bool) -> float:
    """The encoder's product alone."""
    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.standard_normal((n, D), np.float32)) for n in (BATCH, latents))
    multiply = jax.jit(lambda x, w: (in_bfloat16 if bf16 else matmul)(x, w.T))
    multiply(x, w).block_until_ready()
    return milliseconds(lambda: multiply(x, w), steps)


def ours(kind: str, latents: int, steps: int, dead: bool, bf16: bool) -> float:
    """A step of training, from activations on the device to the next state."""
    pool = jnp.asarray(np.random.default_rng(0).standard_normal((16 * BATCH, D), np.float32))
    config, mesh = SAEConfig(sparsity=kind, k=K, bf16=bf16), make_mesh(1, 1)
    state = start(config, [pool[:8192]], latents, 10**6, 0, mesh)
    if dead:
        state = state._replace(silent=jnp.where(jnp.arange(latents) % 2, 2**29, 0).astype(jnp.int32))
    step, at = make_step(config, 10**6, mesh), 0

    def once() -> Any:
        nonlocal state, at
        at = (at + 1) % 16
        state, metrics = step(state, pool[at * BATCH : (at + 1) * BATCH])
        return state.sae, metrics

    for _ in range(3):
        jax.block_until_ready(once())
    return milliseconds(once, steps)


def steps_beside(given: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for latents in given.latents:
        for kind in given.kinds:
            floor = product(latents, given.steps, given.bf16)
            row = {"kind": kind, "latents": latents, "product_ms": floor,
                   "ours_ms": ours(kind, latents, given.steps, given.dead, given.bf16)}  # fmt: skip
            for peer in PEERS[kind]:
                command = [given.python, given.peer, *peer.split(), D, latents, K, BATCH, given.steps]
                done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=True)
                row[f"{peer} ms"] = json.loads(done.stdout.splitlines()[-1])["ms_per_step"]
                row[f"ratio to {peer}"] = row[f"{peer} ms"] / row["ours_ms"]
            row |= {"samples_per_s": 1e3 * BATCH / row["ours_ms"], "times the product": row["ours_ms"] / floor}
            rows.append({key: round(value, 2) if isinstance(value, float) else value for key, value in row.items()})
            print(json.dumps(rows[-1]), flush=True)
    return rows


def runner(given: argparse.Namespace) -> None:
    """From tokens to a saved dictionary; both get the model's folder and the token file, loading is not counted."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        windows = load_windows("stdlib-docs", load_tokenizer(SMOLLM2), 256)
        save_lm(load_lm(SMOLLM2), work / "model")
        np.save(work / "tokens.npy", windows.ids)
        lm = load_lm(str(work / "model"))
        began = time.perf_counter()
        stream = ActivationStream({"fp": lm}, Point(8, "resid_post"), windows, make_mesh(1, 1), batch=BATCH)
        made = fit(stream, {"fp": Job("fp")}, SAEConfig(k=K), given.tokens, work / "train")
        save_sae(made["fp"], work / "sae")
        row = {"tokens": given.tokens, "ours_tokens_per_s": given.tokens / (time.perf_counter() - began)}
        facts = {"layer": 8, "latents": made["fp"].latents, "k": K, "tokens": given.tokens, "batch": BATCH}
        options = [word for name, value in facts.items() for word in (f"--{name}", value)]
        script = ROOT / "experiments" / "peer_runner.py"
        command = [given.python, script, work / "model", work / "tokens.npy", work / "peer", *options]
        done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=True)
        row["saelens_tokens_per_s"] = json.loads(done.stdout.splitlines()[-1])["tokens_per_s"]
        row["ratio"] = row["ours_tokens_per_s"] / row["saelens_tokens_per_s"]
        print(json.dumps({key: round(value, 2) for key, value in row.items()}))


def main() -> None:
    asked = argparse.ArgumentParser()
    asked.add_argument("--latents", type=int, nargs="+", default=[8192, 32768])
    asked.add_argument("--kinds", nargs="+", default=list(PEERS), choices=list(PEERS))
    asked.add_argument("--steps", type=int, default=10)
    asked.add_argument("--tokens", type=int, default=131_072)
    asked.add_argument("--runner", action="store_true")
    asked.add_argument("--dead", action="store_true")
    asked.add_argument("--bf16", action="store_true")
    asked.add_argument("--peer", type=Path, default=ROOT / "experiments" / "peer_steps.py")
    asked.add_argument("--python", type=Path, default=ROOT / ".venv-peers" / "bin" / "python")
    given = asked.parse_args()
    runner(given) if given.runner else steps_beside(given)


if __name__ == "__main__":
    with_huge_pages()  # here, and by inheritance in the peers
    main()
