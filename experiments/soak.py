"""Twenty million made-up activations through training and through an audit's sums: does memory grow?

    .venv/bin/python experiments/soak.py [--rows 20_000_000] [--d 64] [--latents 512]

Prints the process's memory along the way; the last line says by how much it grew after the first tenth.
"""

import argparse
import json
import resource
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from qsae_jax.audit.survival import Survival
from qsae_jax.mesh import make_mesh
from qsae_jax.sae.fit import Job, fit
from qsae_jax.sae.settings import SAEConfig

SEQ = 64
BATCH = 4096


def held() -> float:
    """MiB of this process now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


class Rows:
    """Endless rows with some structure, a pure function of how many were taken, and quantized ones beside them."""

    def __init__(self, d: int, seen: list[tuple[int, float]]):
        self.mesh, self.batch, self.taken, self.until, self.seen = make_mesh(1, 1), BATCH, 0, 0, seen
        mixing = jax.random.normal(jax.random.key(0), (2 * d, d))

        @jax.jit
        def make(i):
            codes = jax.random.exponential(jax.random.key(i), (BATCH, 2 * d))
            x = jnp.where(codes > 3, codes, 0) @ mixing
            return {"fp": x, "int4": jnp.round(x)}

        self.make = make

    def described(self) -> dict[str, int]:
        return {"seed": 0}

    def first(self, rows: int) -> dict[str, jax.Array]:
        return self.make(0)

    def __next__(self) -> dict[str, jax.Array]:
        self.taken += BATCH
        if self.taken // BATCH % 100 == 0:
            self.seen.append((self.taken, held()))
        return self.make(self.taken // BATCH)


def main() -> None:
    given = argparse.ArgumentParser()
    given.add_argument("--rows", type=int, default=20_000_000)
    given.add_argument("--d", type=int, default=64)
    given.add_argument("--latents", type=int, default=512)
    args = given.parse_args()
    trained: list[tuple[int, float]] = []
    rows = Rows(args.d, trained)
    config = SAEConfig(sparsity="topk", k=8, expansion=args.latents / args.d)
    with tempfile.TemporaryDirectory() as folder:
        saes = fit(rows, {"fp": Job("fp"), "int4": Job("int4")}, config, args.rows, Path(folder))  # pyright: ignore[reportArgumentType]
    tell("train", trained)
    windows, audited = args.rows // SEQ, []
    survival, each = Survival(saes["fp"], ["fp", "int4"], windows), BATCH // SEQ
    for i in range(windows // each):
        made = {name: x.reshape(each, SEQ, args.d) for name, x in rows.make(i).items()}
        survival.add(made, np.ones(each, np.float32), i * each)
        if i % 100 == 99:
            audited.append(((i + 1) * BATCH, held()))
    print(json.dumps({"survived": survival.row("int4")["survived"]}))
    tell("audit", audited)


def tell(stage: str, seen: list[tuple[int, float]]) -> None:
    for rows, size in seen[:: max(len(seen) // 10, 1)]:
        print(json.dumps({"stage": stage, "rows": rows, "mib": round(size, 1)}))
    settled = max(size for _, size in seen[: max(len(seen) // 10, 1)])
    print(json.dumps({"stage": stage, "grew_mib": round(max(size for _, size in seen) - settled, 1)}), flush=True)


if __name__ == "__main__":
    main()
