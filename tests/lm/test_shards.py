"""Safetensors files are mapped, not read: values equal the library's own reader bit for bit, a device asks for its own
piece, and loading holds the model and one tensor."""

import json
import mmap
import os
import struct
import subprocess
import sys

import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from safetensors import safe_open
from safetensors.numpy import save_file

from qsae_jax.errors import UserError
from qsae_jax.lm import load
from qsae_jax.lm.shards import Shards
from qsae_jax.mesh import make_mesh

DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}
Q, K = (f"model.layers.0.self_attn.{x}_proj.weight" for x in "qk")


def some(dtype):
    random = np.random.default_rng(1)
    shapes = {"a": (5, 3), "b": (7,), "c": (2, 3, 4), "none": (0, 3), "scalar": ()}
    return {name: random.normal(size=shape).astype(dtype) for name, shape in shapes.items()}


def write(folder, tensors, shards):
    """One file, or each tensor in its own, with an index."""
    if not shards:
        save_file(tensors, folder / "model.safetensors")
        return dict.fromkeys(tensors, "model.safetensors")
    home = {name: f"model-{name}.safetensors" for name in tensors}
    for name, value in tensors.items():
        save_file({name: value}, folder / home[name])
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": home}))
    return home


def owner(array):
    """What holds the memory of a view."""
    while isinstance(array, np.ndarray):
        array = array.base
    return array


@pytest.mark.parametrize("shards", [False, True], ids=["one file", "shards"])
@pytest.mark.parametrize("kind", DTYPES)
def test_values_are_views_of_the_file(tmp_path, kind, shards):
    """Bit-equal to the library's reader, dtype and shape too, and in the map of the file. Controls: a copy is in no
    map; one bit changed in the file is seen, in one value of one tensor."""
    home = write(tmp_path, some(DTYPES[kind]), shards)

    def differing():
        opened = Shards(tmp_path)
        assert sorted(opened.names) == sorted(home)
        return {x: n for x in home if (n := int((opened.read(x) != before[x]).sum()))}

    before = {}
    for name, file in home.items():
        with safe_open(tmp_path / file, "numpy") as theirs:
            before[name] = theirs.get_tensor(name)
        ours = Shards(tmp_path).read(name)
        assert (ours.dtype, ours.shape) == (before[name].dtype, before[name].shape) == (DTYPES[kind], ours.shape)
        assert ours.tobytes() == before[name].tobytes()
        assert ours.size == 0 or (isinstance(owner(ours), mmap.mmap) and not ours.flags.writeable)
        assert owner(ours.copy()) is None
    assert differing() == {}
    file = tmp_path / home["c"]
    raw = bytearray(file.read_bytes())
    raw[raw.index(before["c"].tobytes()) + 9] ^= 1
    file.write_bytes(raw)
    assert differing() == {"c": 1}


def test_a_header_of_odd_length(tmp_path):
    """The library takes numbers that do not lie at multiples of their size, and so are they read. Control: one byte
    further on they are others."""
    values = np.arange(1, 5, dtype=np.float32)
    for more in (b"", b"\0"):
        head = header({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}, odd=True)
        (tmp_path / "model.safetensors").write_bytes(head + (more + values.tobytes())[:16])
        assert len(head) % 2 and (Shards(tmp_path).read("a") == values).all() == (more == b"")


def header(content, odd=False):
    raw = content if isinstance(content, bytes) else json.dumps(content).encode()
    raw += b" " if odd and len(raw) % 2 == 0 else b""
    return struct.pack("<Q", len(raw)) + raw


def entry(shape, stop):
    return {"dtype": "F32", "shape": shape, "data_offsets": [0, stop]}


DAMAGED = {
    "header beyond the file": (struct.pack("<Q", 4000) + b"{}", "header"),
    "header beyond all": (struct.pack("<Q", 2**63) + b"{}", "header"),
    "no header": (b"\0" * 7, "header"),
    "no JSON": (header(b'{"a": '), "header"),
    "lists": (header(b'{"a": ["F32", [4], [0, 16]]}') + bytes(16), "no table"),
    "hole": (header({"a": entry([1], 4)}) + bytes(16), "not fully covered"),
    "beyond the end": (header({"a": entry([4], 16)}) + bytes(12), "not fully covered"),
    "another size": (header({"a": entry([5], 16)}) + bytes(16), "header"),
    "overflow": (header({"a": entry([2**40, 2**40], 16)}) + bytes(16), "overflow"),
    "long and empty": (header({"a": entry([2**63, 0], 0)}), "tensor `a`"),
    "65 dimensions": (header({"a": entry([1] * 65, 4)}) + bytes(4), "tensor `a`"),
    "no tensors": (header({}), "holds no tensors"),
}


@pytest.mark.parametrize("raw, named", DAMAGED.values(), ids=DAMAGED.keys())
def test_damaged_files(tmp_path, raw, named):
    """One line that names the thing. Control: the same file with a header that fits, its notes null, is read."""
    (tmp_path / "model.safetensors").write_bytes(header({"__metadata__": None, "a": entry([4], 16)}) + bytes(16))
    assert Shards(tmp_path).read("a").shape == (4,) and Shards(tmp_path).notes == {}
    (tmp_path / "model.safetensors").write_bytes(raw)
    with pytest.raises(UserError) as caught:
        Shards(tmp_path).read("a")
    assert named in str(caught.value) and "\n" not in str(caught.value)


VALID = header({"__metadata__": {"qsae_jax": "int4"}, "a": entry([2, 3], 24)})


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(0, len(VALID) - 1), st.integers(0, 255)), max_size=3))
def test_any_bytes(tmp_path_factory, flips):
    """Bytes of the header are replaced: the tensors are read or refused, and nothing else is raised."""
    raw = bytearray(VALID + bytes(24))
    for at, byte in flips:
        raw[at] = byte
    folder = tmp_path_factory.getbasetemp()
    (folder / "model.safetensors").write_bytes(raw)
    try:
        opened = Shards(folder)
        assert [opened.read(name).shape for name in opened.names] and opened.notes.get("qsae_jax") != 0
    except UserError as error:
        assert flips and "\n" not in str(error)


@pytest.mark.parametrize("devices", [1, 8])
def test_each_device_asks_for_its_own_piece(facts, tensors, write_folder, monkeypatch, devices):
    """Over 8 devices the 8 heads of q are asked for one by one and cover the weight once, as views of the file.
    Controls: on one device it is asked for whole, as are the 4 heads of k, which 8 devices cannot share; with a piece
    left out the weight is not covered."""
    asked, inner = {Q: [], K: []}, load._piece

    def piece(value, shift, dtype, called):
        of = next((name for name in asked if name in called), None)
        if of:
            assert isinstance(owner(value), mmap.mmap)

        def recorded(index):
            asked.get(of, []).append(index)
            return inner(value, shift, dtype, called)(index)

        return recorded

    monkeypatch.setattr(load, "_piece", piece)
    load.load_lm(str(write_folder(facts, tensors(facts))), mesh=make_mesh(1, devices))

    def covered(indices):
        count = np.zeros((24, 8, 6), int)
        for index in indices:
            count[index] += 1
        return count

    assert len(asked[Q]) == devices and (covered(asked[Q]) == 1).all()
    assert {np.zeros((24, 8, 6))[index].shape for index in asked[Q]} == {(24, 8 // devices, 6)}
    assert {np.zeros((24, 4, 6))[index].shape for index in asked[K]} == {(24, 4, 6)}
    assert not covered(asked[Q][1:]).all()


SLACK = 60
PEAK = """
import os, sys, threading
import numpy as np
from qsae_jax.lm import load

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) / 1024

def watch():
    while not done.wait(5e-4):
        seen.append(anonymous())

small, big, how = sys.argv[1:]
load.load_lm(small)
if how == "all at once":
    fill = load._fill
    def held(config, family, places, read, *rest):
        copies = {place.stored: np.array(read(place.stored)) for place in places}
        return fill(config, family, places, copies.__getitem__, *rest)
    load._fill = held
done, seen = threading.Event(), [anonymous()]
thread = threading.Thread(target=watch)
thread.start()
lm = load.load_lm(big)
done.set()
thread.join()
print(max(seen) - seen[0], anonymous() - seen[0])
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="measures by /proc, which Linux has")
def test_peak_memory(facts, tensors, write_folder):
    """Loading 192 MiB raises memory by no more than the model, its largest tensor and 60 MiB (measured: 30, which the
    allocator keeps). What is measured is RssAnon every half millisecond: pages of the mapped file are the kernel's,
    which drops them when it wants to. Control: with every tensor read before the first is placed, it is twice the
    model."""
    small = str(write_folder(facts, tensors(facts), "small"))
    facts |= {"hidden_size": 512, "head_dim": 64, "num_key_value_heads": 8, "intermediate_size": 2048}
    given = tensors(facts | {"num_hidden_layers": 12})
    big = str(write_folder(facts | {"num_hidden_layers": 12}, given, "big"))
    model, largest = (f(x.nbytes for x in given.values()) / 2**20 for f in (sum, max))
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": os.environ | {"JAX_PLATFORMS": "cpu"}}
    commands = [[sys.executable, "-c", PEAK, small, big, how] for how in ("one by one", "all at once")]
    runs = [subprocess.Popen(command, text=True, **pipes) for command in commands]
    told = [run.communicate() for run in runs]
    assert [run.returncode for run in runs] == [0, 0], told
    (most, after), (control, _) = ([float(x) for x in out.split()] for out, _ in told)
    assert after > 0.9 * model, "the model itself is there"
    assert most < model + largest + SLACK
    assert control > 1.9 * model > model + largest + SLACK
