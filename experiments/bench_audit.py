"""How fast an audit is beside the same audit in PyTorch, transformers and SAELens, one after the other, in one go.

    make peers      # once: the environment of the PyTorch tools
    .venv/bin/python experiments/bench_audit.py [--windows 32] [--seq 512] [--bits 8 7 6 5 4]

Both get the same model folder, dictionary and token file. Neither time counts loading the model; ours counts
compiling, which a longer audit pays once. Also printed: whether the two agree on what they measured. The PyTorch
script is not part of this repository (`--peer FILE`, called as FILE MODEL_DIR SAE_DIR TOKENS.npy LAYER BITS...);
without it only our own figures are printed.
"""

import argparse
import json
import subprocess
import time
from pathlib import Path

import numpy as np

from qsae_jax import audit, load_lm, load_sae, load_tokenizer, load_windows, save_lm, save_sae
from qsae_jax.acts.stream import ActivationStream
from qsae_jax.acts.tokens import Windows
from qsae_jax.lm.sources import SMOLLM2
from qsae_jax.lm.tap import Point
from qsae_jax.mesh import make_mesh
from qsae_jax.pages import with_huge_pages
from qsae_jax.sae.fit import Job, fit
from qsae_jax.sae.train import SAEConfig

ROOT = Path(__file__).parents[1]
LAYER, BITS = 8, [8, 7, 6, 5, 4]


def prepare(work: Path, windows: int, seq: int) -> Windows:
    """The model as a folder, a dictionary of 4,608 latents trained a little, and the tokens."""
    found = load_windows("stdlib-docs", load_tokenizer(SMOLLM2), seq)
    if not (work / "model").is_dir():
        save_lm(load_lm(SMOLLM2), work / "model")
    if not (work / "sae").is_dir():
        lm, rest, mesh = load_lm(str(work / "model")), found.part(windows, len(found)), make_mesh(1, 1)
        stream = ActivationStream({"fp": lm}, Point(LAYER, "resid_post"), rest, mesh, batch=512)
        saes = fit(stream, {"fp": Job("fp")}, SAEConfig(lr=1.5e-3), 32_768, work / "train")
        save_sae(saes["fp"], work / "sae")
    np.save(work / "tokens.npy", found.ids[:windows])
    return found.part(0, windows)


def ours(work: Path, windows: Windows, bits: list[int]) -> dict[str, dict[str, float]]:
    """Rows by scheme, and `speed`."""
    lm, sae = load_lm(str(work / "model")), load_sae(work / "sae")
    began = time.perf_counter()
    facts = audit(lm, sae, windows, [f"int{b}" for b in bits], Point(LAYER, "resid_post")).facts
    took = time.perf_counter() - began
    rows = {row["scheme"]: row for row in facts["rows"]} | {"fp": facts["reference"]}
    return rows | {"speed": {"tokens_per_s": windows.ids.size * (1 + len(bits)) / took, "seconds": took}}


def theirs(work: Path, python: Path, script: Path, bits: list[int]) -> dict[str, dict[str, float]]:
    command = [python, script, work / "model", work / "sae", work / "tokens.npy", LAYER, *bits]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=True)
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {row.pop("scheme", "speed"): row for row in rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--seq", type=int, default=512)
    parser.add_argument("--bits", type=int, nargs="+", default=BITS)
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "bench_audit")
    parser.add_argument("--peer", type=Path, default=ROOT.parent / "shared" / "bench" / "peer_audit.py")
    parser.add_argument("--peer-python", type=Path, default=ROOT / ".venv-peers" / "bin" / "python")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    windows = prepare(given.work, given.windows, given.seq)
    mine = ours(given.work, windows, given.bits)
    print(f"ours: {mine['speed']['tokens_per_s']:.0f} tokens/s ({mine['speed']['seconds']:.0f} s)")
    if missing := [path for path in (given.peer, given.peer_python) if not path.is_file()]:
        print(f"the PyTorch audit is skipped: {missing[0]} is not there")
        return
    other = theirs(given.work, given.peer_python, given.peer, given.bits)
    print(f"PyTorch: {other['speed']['tokens_per_s']:.0f} tokens/s ({other['speed']['seconds']:.0f} s)")
    print(f"ratio: {mine['speed']['tokens_per_s'] / other['speed']['tokens_per_s']:.2f}")
    for scheme in ("fp", *(f"int{b}" for b in given.bits)):
        for name in ("ppl", "active", "survived", "damaged"):
            if name in other[scheme]:
                print(f"{scheme} {name}: ours {mine[scheme][name]:.5g}, PyTorch {other[scheme][name]:.5g}")


if __name__ == "__main__":
    with_huge_pages()  # here, and by inheritance in the peers
    main()
