"""How fast all linear weights of SmolLM2 are rounded, beside torchao and compressed-tensors, one after the other.

    make peers      # once: the environment of the PyTorch tools
    .venv/bin/python experiments/bench_quant.py

Each is given the same 210 matrices in memory and gives all of them back as float32, symmetric int4 in groups of 64 by
the convention they share (`half`); medians of five, compiling not counted. Ours is `fake_quantize` itself: a new
model, and the check that every weight is finite. The others choose a scale per group, quantize and dequantize, as
their fake quantization does. Printed too: int4-g128, what a copy of the weights takes, and a sweep over bits.
"""

import argparse
import importlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from qsae_jax.pages import with_huge_pages

ROOT = Path(__file__).parents[1]
GROUP = 64
SAME = f"int4-g{GROUP}-half"


def seconds(run: Callable[[], Any]) -> float:
    run()
    times = []
    for _ in range(5):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def ours(work: Path) -> dict[str, float]:
    """Seconds; and the matrices as files for the others, `[out, in]`."""
    import jax

    from qsae_jax import fake_quantize, load_lm
    from qsae_jax.lm.save import stored_tensors
    from qsae_jax.lm.sources import SMOLLM2

    lm = load_lm(SMOLLM2)
    blocks = {name: w for name, w in stored_tensors(lm).items() if "_proj" in name}
    np.savez(work / "weights.npz", **blocks)  # pyright: ignore[reportArgumentType]

    def whole(name: str) -> None:
        jax.block_until_ready(jax.tree.leaves(fake_quantize(lm, name)))

    arrays = [np.asarray(w) for w in blocks.values()]
    facts = {name: seconds(lambda name=name: whole(name)) for name in (SAME, "int4-g128")}
    facts["copy"] = seconds(lambda: [w.copy() for w in arrays])
    began = time.perf_counter()
    whole("int8-half")
    facts["first"] = time.perf_counter() - began
    began = time.perf_counter()
    for bits in range(7, 1, -1):
        whole(f"int{bits}-half")
    return facts | {"six_more": time.perf_counter() - began, "weights": sum(w.size for w in arrays)}


def theirs(kind: str, work: Path) -> dict[str, float]:
    """Runs in the other environment: symmetric int4 in groups of 128, their own convention."""
    torch = importlib.import_module("torch")

    files = np.load(work / "weights.npz")
    weights = [torch.from_numpy(files[name]) for name in files.files]

    def by_torchao(w: Any) -> Any:
        ao = importlib.import_module("torchao.quantization.quant_primitives")
        size, dtype, ends = (1, GROUP), torch.int8, (-8, 7)
        scale, zero = ao.choose_qparams_affine(w, ao.MappingType.SYMMETRIC, size, dtype, *ends)
        codes = ao.quantize_affine(w, size, scale, zero, dtype, *ends)
        return ao.dequantize_affine(codes, size, scale, zero, dtype, *ends)

    def by_compressed_tensors(w: Any) -> Any:
        package = "compressed_tensors.quantization"
        ct, forward, utils = map(importlib.import_module, (package, f"{package}.lifecycle.forward", f"{package}.utils"))
        args = ct.QuantizationArgs(num_bits=4, symmetric=True, strategy="group", group_size=GROUP)
        groups = w.reshape(len(w), -1, GROUP)
        return forward.fake_quantize(w, *utils.calculate_qparams(groups.amin(-1), groups.amax(-1), args), args)

    one = {"torchao": by_torchao, "compressed-tensors": by_compressed_tensors}[kind]
    with torch.inference_mode():
        return {"seconds": seconds(lambda: [one(w) for w in weights])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "bench_quant")
    parser.add_argument("--peer", help=argparse.SUPPRESS)
    parser.add_argument("--peer-python", type=Path, default=ROOT / ".venv-peers" / "bin" / "python")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    if given.peer:
        print(json.dumps(theirs(given.peer, given.work)))
        return
    mine = ours(given.work)
    for name in (SAME, "int4-g128"):
        speed = 8e-9 * mine["weights"] / mine[name]
        print(f"ours, {name}: {mine[name]:.2f} s for {mine['weights'] / 1e6:.0f} million weights, {speed:.1f} GB/s")
    print(f"a copy of them: {mine['copy']:.2f} s")
    print(f"sweep: int8-half with compiling {mine['first']:.2f} s, int7 to int2 {mine['six_more']:.2f} s")
    if not given.peer_python.is_file():
        print(f"the PyTorch tools are skipped: {given.peer_python} is not there")
        return
    for kind in ("torchao", "compressed-tensors"):
        command = [given.peer_python, __file__, "--peer", kind, "--work", given.work]
        done = subprocess.run([*map(str, command)], capture_output=True, text=True)
        if done.returncode:
            print(f"{kind} did not run: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
            continue
        took = json.loads(done.stdout.splitlines()[-1])["seconds"]
        print(f"{kind}: {took:.2f} s, {took / mine[SAME]:.2f} times ours")


if __name__ == "__main__":
    with_huge_pages()  # here, and by inheritance in the peers
    main()
