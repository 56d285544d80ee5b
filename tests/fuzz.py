"""Spoils well-made files of every format at random and reads them: nothing may come out but a reading or a UserError.

    python -m tests.fuzz --seconds 3600 --seed 1 --keep found/

What breaks a reader is kept with its traceback. test_fuzz.py does the same for a moment.
"""

import argparse
import random
import resource
import shutil
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qsae_jax import load_lm, save_lm, save_sae
from qsae_jax.acts.tokens import load_windows
from qsae_jax.cli import main
from qsae_jax.errors import UserError
from qsae_jax.lm.model import LM, LMConfig
from qsae_jax.lm.rope import Rope
from qsae_jax.quant.names import EXAMPLES
from qsae_jax.quant.scheme import parse_schemes
from qsae_jax.recipe import read_study
from qsae_jax.sae.formats import load_stored
from qsae_jax.sae.model import SAE
from qsae_jax.sae.sparsity import TopK
from tests.lm.conftest import ggml_name

EDGES = (0, 1, 255, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**53, 2**63 - 1, 2**63, 2**64 - 1)
WORDS = (b"null", b"-1", b"1e999", b"NaN", b"[]", b"{}", b'""', b"true", b"99999999999999999999", b"0", b"../x",
         b"\\u0000", b"[" * 3000, b'"int4"', b"2147483648", b"0.5")  # fmt: skip
MOST_BYTES = 6 << 30
"""Beyond what the process has: a reader that allocates what a header claims runs into it."""


@dataclass(frozen=True)
class Target:
    """A reader and a well-made thing to spoil: a file of a folder, or a text."""

    name: str
    whole: Path
    file: str
    read: Callable[[Path], object]


def tiny() -> LM:
    shape = {"vocab": 300, "d_model": 16, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "head_dim": 6, "d_ff": 24}
    scalars = {"norm_eps": 3e-3, "rope": Rope(777.0, 6), "tied": False, "context": 64, "act": "silu"}
    return LM(LMConfig(family="llama", **shape, **scalars, score_scale=6**-0.5), nnx.Rngs(0))


def write_gguf(folder: Path, lm_folder: Path) -> None:
    """The model's tensors as a GGUF file, some of them quantized."""
    from safetensors.numpy import load_file

    folder.mkdir()
    writer = gguf.GGUFWriter(folder / "m.gguf", "llama")
    facts = {"block_count": 2, "context_length": 64, "embedding_length": 16, "feed_forward_length": 24, "head_count": 4,
             "head_count_kv": 2, "key_length": 6, "value_length": 6, "rope_dimension_count": 6, "rope_freq_base": 777.0,
             "layer_norm_rms_eps": 3e-3, "vocab_size": 300}  # fmt: skip
    for key, value in facts.items():
        getattr(writer, f"add_{key}")(value)
    for name, array in load_file(lm_folder / "model.safetensors").items():
        writer.add_tensor(ggml_name(name), np.ascontiguousarray(array))
    for step in ("write_header_to_file", "write_kv_data_to_file", "write_tensors_to_file", "close"):
        getattr(writer, step)()


def targets(root: Path) -> list[Target]:
    """Every format, written once."""
    save_lm(tiny(), root / "model")
    write_gguf(root / "gguf", root / "model")
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(24, 16)).astype(np.float32)
    sae = SAE(TopK(3), jnp.asarray(rows.T), jnp.zeros(24), jnp.asarray(rows), jnp.zeros(16))
    save_sae(sae, root / "sae", {"hook_name": "blocks.1.resid_post"})
    with redirect_stdout(StringIO()):
        for kind in ("dictionary_learning", "sparsify"):
            assert main(["sae", "convert", str(root / "sae"), "--to", kind, "--out", str(root / kind)]) == 0
    (root / "npz").mkdir()
    arrays = {"W_enc": rows.T, "W_dec": rows, "b_enc": np.zeros(24, np.float32), "b_dec": np.zeros(16, np.float32)}
    np.savez(root / "npz/params.npz", threshold=np.full(24, 0.3, np.float32), **arrays)
    (root / "tokens").mkdir()
    np.save(root / "tokens/ids.npy", np.zeros((4, 16), np.int32))
    (root / "study").mkdir()
    shutil.copy(Path(__file__).parents[1] / "experiments/retrain_or_not.toml", root / "study/s.toml")
    (root / "scheme").mkdir()
    (root / "scheme/name").write_text(",".join(EXAMPLES))
    pt = next((root / "dictionary_learning").glob("*.pt")).name

    def schemes(folder: Path) -> object:
        return parse_schemes((folder / "name").read_bytes().decode("utf-8", "replace"))

    return [
        *(Target(f"model {file}", root / "model", file, load_lm_of) for file in ("config.json", "model.safetensors")),
        Target("gguf", root / "gguf", "m.gguf", lambda folder: load_lm_of(folder / "m.gguf")),
        *(Target(f"sae {file}", root / "sae", file, load_sae_of) for file in ("cfg.json", "sae_weights.safetensors")),
        Target("pt", root / "dictionary_learning", pt, lambda folder: load_sae_of(folder / pt)),
        Target("dictionary_learning config", root / "dictionary_learning", "config.json", load_sae_of),
        Target("sparsify config", root / "sparsify", "cfg.json", load_sae_of),
        Target("npz", root / "npz", "params.npz", lambda folder: load_sae_of(folder / "params.npz")),
        Target("tokens", root / "tokens", "ids.npy", lambda folder: windows_of(folder / "ids.npy")),
        Target("study", root / "study", "s.toml", lambda folder: read_study(folder / "s.toml")),
        Target("scheme", root / "scheme", "name", schemes),
    ]


def load_lm_of(path: Path) -> object:
    return jax.block_until_ready(jax.tree.leaves(load_lm(str(path))))


def load_sae_of(path: Path) -> object:
    sae = load_stored(str(path)).sae
    return np.asarray(sae.W_dec[...]).sum()


def windows_of(path: Path) -> object:
    return np.asarray(load_windows(f"npy:{path}", None, 16, vocab=300).ids).sum()


def spoilt(data: bytes, chance: random.Random) -> bytes:
    """With one to four faults."""
    found = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        # Heads decide what a file is: half of the faults fall into the first kilobyte.
        end = len(found) if chance.random() < 0.5 else min(len(found), 1024)
        at, far = chance.randrange(end + 1), chance.randrange(1, 33)
        kind = chance.randrange(7)
        if kind == 0 and found:
            at = min(at, len(found) - 1)
            found[at] ^= 1 << chance.randrange(8)
        elif kind == 1:
            found[at : at + far] = chance.randbytes(far)
        elif kind == 2:
            del found[at : at + far]
        elif kind == 3:
            found[at:at] = found[at : at + far]
        elif kind == 4:
            del found[at:]
        elif kind == 5:
            size = chance.choice((1, 2, 4, 8))
            found[at : at + size] = (chance.choice(EDGES) % 256**size).to_bytes(size, "little")
        else:
            found[at : at + chance.choice((0, 1, 4))] = chance.choice(WORDS)
    return bytes(found)


def breaks(target: Target, chance: random.Random, work: Path) -> str:
    """The traceback of what a reader should not raise, or nothing."""
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(target.whole, work)
    (work / target.file).write_bytes(spoilt((target.whole / target.file).read_bytes(), chance))
    try:
        target.read(work)
    except UserError as error:
        return f"more than one line: {error!r}" if "\n" in str(error) else ""
    except Exception:
        return traceback.format_exc()
    return ""


def fuzz(seconds: float, seed: int, root: Path, only: str = "") -> Iterator[tuple[Target, str, Path]]:
    """Faults for so long, each target in turn: what breaks, and the folder that broke it."""
    some = [target for target in targets(root) if only in target.name]
    chance, began, turn = random.Random(seed), time.monotonic(), 0
    while time.monotonic() - began < seconds or turn < len(some):
        target = some[turn % len(some)]
        turn += 1
        if told := breaks(target, chance, root / "work"):
            yield target, told, root / "work"
    print(f"{turn} files in {time.monotonic() - began:.0f} s")


def run() -> int:
    given = argparse.ArgumentParser()
    given.add_argument("--seconds", type=float, default=60)
    given.add_argument("--seed", type=int, default=0)
    given.add_argument("--only", default="")
    given.add_argument("--keep", type=Path, default=Path("fuzz-found"))
    args = given.parse_args()
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MOST_BYTES, resource.RLIM_INFINITY))
    seen: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as root:
        for target, told, work in fuzz(args.seconds, args.seed, Path(root), args.only):
            last = f"{target.name}: {told.strip().splitlines()[-1][:120]}"
            where = [line for line in told.splitlines() if "qsae_jax" in line]
            seen[f"{last} @ {where[-1].strip() if where else ''}"] += 1
            if seen[f"{last} @ {where[-1].strip() if where else ''}"] == 1:
                into = args.keep / f"{target.name.replace(' ', '-')}-{len(seen)}"
                shutil.copytree(work, into, dirs_exist_ok=True)
                (into / "traceback.txt").write_text(told)
    for what, count in seen.most_common():
        print(count, what)
    return 1 if seen else 0


if __name__ == "__main__":
    raise SystemExit(run())
