"""What `qsae plan` says of this machine, beside what was measured on it: programs one by one, and a study's memory.

    .venv/bin/python experiments/bench_plan.py [--device cpu] [STUDY.toml]

Every program of the plan is run on random numbers of its own shapes (the median of five runs, after one); the study,
by default the demo's model on few tokens, is run in a process of its own, whose largest memory stands beside the
plan's. Planned seconds are of products, memory and links; a study's stages also load, quantize and compile.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from qsae_jax import load_lm
from qsae_jax.audit.sums import batch_sums, first_means
from qsae_jax.devices import DEVICES
from qsae_jax.lm.loss import token_losses
from qsae_jax.lm.sources import SMOLLM2
from qsae_jax.lm.tap import FINAL, Point, activations
from qsae_jax.mesh import make_mesh
from qsae_jax.pages import with_huge_pages
from qsae_jax.plan import named_device, plan
from qsae_jax.recipe import Study, read_study
from qsae_jax.sae.train import finished, make_step, start

SMALL = {
    "model": SMOLLM2, "point": "blocks.8.resid_post", "schemes": ["int8", "int6", "int4"], "compare": "int4",
    "sae": {"sparsity": "topk", "k": 32, "expansion": 8}, "tokens": {"audit": 4096, "compare": 2048},
    "train": {"tokens": 16_384},
}  # fmt: skip


def seconds(run, times: int = 5) -> float:
    jax.block_until_ready(run())
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        jax.block_until_ready(run())
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def measured(study: Study) -> dict[str, float]:
    """Of one batch of the study's windows: passes to the point and to the end, losses and sums of all runs, a step."""
    lm, point, mesh = load_lm(study.model), Point.parse(study.point), make_mesh(1, 1)
    seq, rng = study.tokens.seq, np.random.default_rng(0)
    windows = max(2048 // seq, 1)
    tokens = jnp.asarray(rng.integers(0, lm.config.vocab, (windows, seq)), jnp.int32)
    x, final = activations(lm, (point, FINAL), tokens)
    rows = x.reshape(-1, x.shape[-1])
    found = {"train: forward passes": seconds(lambda: activations(lm, (point,), tokens))}
    found["audit: forward passes"] = seconds(lambda: activations(lm, (point, FINAL), tokens))
    runs = 1 + len(study.schemes)
    found["audit: losses"] = seconds(lambda: token_losses([lm] * runs, [final] * runs, tokens))
    steps, batch = 1000, study.train.batch
    state = start(study.sae, [rows], round(rows.shape[1] * study.sae.expansion), steps, 0, mesh)
    step = make_step(study.sae, steps, mesh)
    held = [step(state, rows[:batch])[0]]

    def once():
        held[0], metrics = step(held[0], rows[:batch])
        return metrics.loss

    found["train: steps"] = seconds(once, 20)
    sae = finished(held[0], study.sae)
    acts, weight = x[:, study.tokens.skip_first :], jnp.ones(windows)
    shifts = first_means(sae, acts, weight)
    local = jnp.zeros(windows, jnp.int32)
    found["audit: sums over features"] = seconds(lambda: batch_sums(sae, [acts] * runs, weight, local, shifts, 2))
    return found


def peak(study: Path, settings: list[str]) -> float:
    """The largest memory of the study in a process of its own, bytes."""
    with tempfile.TemporaryDirectory() as out:
        argv = [sys.executable, "-m", "qsae_jax", "run", str(study), "--out", out]
        going = subprocess.Popen(
            [*argv, *(word for one in settings for word in ("--set", one))], stderr=subprocess.DEVNULL
        )
        _, status, used = os.wait4(going.pid, 0)
        assert status == 0, "the study failed"
        stages = json.loads((Path(out) / "run.json").read_text())["stages"]
        tell(measured_stages={stage["name"]: stage["seconds"] for stage in stages})
    return used.ru_maxrss * 1024


def main() -> None:
    given = argparse.ArgumentParser()
    given.add_argument("study", nargs="?", type=Path)
    given.add_argument("--device", default="cpu")
    given.add_argument("--set", action="append", default=[])
    args = given.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = args.study or Path(folder) / "small.toml"
        if not args.study:
            lines = [f"{key} = {json.dumps(value)}" for key, value in SMALL.items() if not isinstance(value, dict)]
            for name, table in SMALL.items():
                if isinstance(table, dict):
                    lines += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in table.items())]
            path.write_text("\n".join(lines))
        study, device = read_study(path, args.set), named_device(args.device)
        found = plan(study, 1, 1, device)
        planned = {
            f"{stage.name}: {what}": cost.seconds(DEVICES[device])
            for stage in found.stages for what, (_, cost) in stage.runs.items()
        }  # fmt: skip
        for what, taken in measured(study).items():
            ours = planned[what]
            tell(program=what, planned_ms=1e3 * ours, measured_ms=1e3 * taken, ratio=ours / taken)
        tell(planned_stages={stage.name: round(stage.seconds(DEVICES[device]), 1) for stage in found.stages})
        most, real = max(stage.bytes for stage in found.stages), peak(path, args.set)
        tell(planned_gib=most / 2**30, measured_gib=real / 2**30, ratio=most / real)


def tell(**facts) -> None:
    print(json.dumps({key: round(x, 2) if isinstance(x, float) else x for key, x in facts.items()}), flush=True)


if __name__ == "__main__":
    with_huge_pages()  # here, and by inheritance in the peers
    main()
