"""Files of torch: what torch writes and reads, and what a malicious one asks for."""

import os
import pickle
import zipfile

import ml_dtypes
import numpy as np
import pytest

from qsae_jax.errors import UserError
from qsae_jax.sae.formats import load_stored
from qsae_jax.sae.formats.pickled import read_tensors, write_tensors

from .conftest import K, M, arrays_of, formulas

SEED = np.random.default_rng(3)
ARRAYS = {
    "matrix": SEED.standard_normal((3, 5), np.float32),
    "scalar": np.float64(0.7) + np.zeros(()),
    "half": SEED.standard_normal(4, np.float32).astype(np.float16),
    "brain": SEED.standard_normal((2, 2), np.float32).astype(ml_dtypes.bfloat16),
    "whole": np.asarray([3, -1], np.int64),
    "k": np.asarray(3, np.int32),
    "flags": np.asarray([True, False]),
    "none": np.zeros((0, 3), np.float32),
}


def same(one, other):
    return one.dtype == other.dtype and one.shape == other.shape and np.array_equal(one, other)


def as_arrays(torch, tensors):
    return {k: v.float().numpy().astype(ml_dtypes.bfloat16) if v.dtype == torch.bfloat16 else v.numpy()
            for k, v in tensors.items()}  # fmt: skip


def test_what_we_write_we_and_torch_read(tmp_path, torch):
    """Types, shapes and bits, also with `weights_only`. Control: one bit changed."""
    write_tensors(tmp_path / "ae.pt", ARRAYS)
    ours, theirs = read_tensors(tmp_path / "ae.pt"), as_arrays(torch, torch.load(tmp_path / "ae.pt", weights_only=True))
    assert list(ours) == list(theirs) == list(ARRAYS)
    assert all(same(ours[k], a) and same(theirs[k], a) for k, a in ARRAYS.items())
    assert not same(np.nextafter(ours["matrix"], 9), ARRAYS["matrix"])


@pytest.mark.parametrize("protocol", [2, 4])
def test_what_torch_writes(tmp_path, torch, protocol):
    """Views share a storage and have strides; a parameter; a module's state dict has metadata; texts lie beside."""
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    state = {"turned": base.T, "part": base[1:3, ::2], "base": base, "parameter": torch.nn.Parameter(base + 1)}
    state |= {"name": "TopK", "more": {"k": 3, "on": True, "no": None, "list": [1, 2.5]}}
    state |= {k: torch.tensor(a) for k, a in ARRAYS.items() if a.dtype != ml_dtypes.bfloat16}
    torch.save(state, tmp_path / "a.pt", pickle_protocol=protocol)
    found = read_tensors(tmp_path / "a.pt")
    assert found["name"] == "TopK" and found["more"] == state["more"] and list(found) == list(state)
    for name, value in state.items():
        if isinstance(value, torch.Tensor):
            assert same(found[name], value.detach().numpy()), name
    module = torch.nn.Linear(3, 2)
    torch.save(module.state_dict(), tmp_path / "b.pt", pickle_protocol=protocol)
    assert same(read_tensors(tmp_path / "b.pt")["weight"], module.weight.detach().numpy())


def test_big_endian_files(tmp_path):
    """The record `byteorder` is obeyed. Control: without it the numbers are others."""
    for order, right in ("big", True), ("little", False):
        write_tensors(tmp_path / "a.pt", {"w": ARRAYS["matrix"].byteswap()})
        records = opened(tmp_path / "a.pt")
        closed(tmp_path / "a.pt", records | {"archive/byteorder": order.encode()})
        assert same(read_tensors(tmp_path / "a.pt")["w"], ARRAYS["matrix"]) == right


def opened(path):
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def closed(path, records, how=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", how) as archive:
        for name, data in records.items():
            archive.writestr(name, data)


class Runs:
    """What pickle would do for whoever made the file."""

    def __reduce__(self):
        return os.system, ("touch RAN",)


ATTACKS = {
    "reduce": (pickle.dumps({"w": Runs()}, 2), "names `posix.system`"),
    "reduce, protocol 4": (pickle.dumps({"w": Runs()}, 4), "names `posix.system`"),
    "global": (b"cos\nsystem\n.", "names `os.system`"),
    "global of a known module": (b"ctorch\nload\n.", "names `torch.load`"),
    "global with a dot": (b"\x80\x04\x8c\x05torch\x8c\x10_utils.os.system\x93.", "names `torch._utils.os.system`"),
    "stack global of no text": (b"\x80\x04]]\x93.", "is not run"),
    "builtins": (b"cbuiltins\neval\n(X\x04\x00\x00\x001+1 tR.", "names `builtins.eval`"),
    "inst": (b"(X\x09\x00\x00\x00touch RANios\nsystem\n.", "instruction INST"),
    "obj": (b"(cos\nsystem\nX\x09\x00\x00\x00touch RANo.", "names `os.system`"),
    "obj of a known name": (b"(ccollections\nOrderedDict\no.", "instruction OBJ"),
    "build on a name": (b"ccollections\nOrderedDict\n}b.", "instruction BUILD to Global"),
    "build on a tensor's function": (b"ctorch._utils\n_rebuild_tensor_v2\n}b.", "instruction BUILD to Global"),
    "newobj": (b"\x80\x02ccollections\nOrderedDict\n)\x81.", "instruction NEWOBJ"),
    "newobj ex": (b"\x80\x04ccollections\nOrderedDict\n)}\x92.", "instruction NEWOBJ_EX"),
    "extension": (b"\x80\x02\x82\x01.", "instruction EXT1"),
    "text persistent id": (b"Pos.system\n.", "instruction PERSID"),
    "persistent id of no storage": (b"X\x01\x00\x00\x00xQ.", "no storage of numbers"),
    "call of a text": (b"X\x09\x00\x00\x00os.system)R.", "is not run"),
    "call of a storage": (b"ctorch\nFloatStorage\n)R.", "calls `torch FloatStorage`"),
    "no end": (b"}", "not a readable file"),
    "nothing": (b"", "not a readable file"),
    "empty stack": (b".", "not a readable file"),
    "no memo": (b"h\x07.", "not a readable file"),
    "a list": (b"].", "holds list"),
    "keys that cannot be": (b"}]Ns.", "not a readable file"),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_malicious_file_runs_nothing(tmp_path, monkeypatch, attack):
    """Refused in one line that names what it asks for, and nothing has run. Control: pickle itself would run it."""
    monkeypatch.chdir(tmp_path)
    program, message = ATTACKS[attack]
    closed("ae.pt", {"archive/data.pkl": program})
    with pytest.raises(UserError, match=message) as caught:
        load_stored("ae.pt")
    assert not os.path.exists("RAN") and "\n" not in str(caught.value)
    if attack == "reduce":
        pickle.loads(program)
        assert os.path.exists("RAN")


def test_lies_about_sizes_are_refused(tmp_path):
    """More numbers than the storage has, negative strides and offsets, compressed records. Control: the truth."""
    path = tmp_path / "ae.pt"
    write_tensors(path, {"w": np.ones(6, np.float32)})
    records, truth = opened(path), b"\x8a\x08" + (6).to_bytes(8, "little")
    read_tensors(path)
    program = records["archive/data.pkl"]
    assert program.count(truth) == 2  # the storage's numbers and the tensor's
    for lie in (7, 1 << 40, -6):
        told = b"\x8a\x08" + lie.to_bytes(8, "little", signed=True)
        head, _, tail = program.rpartition(truth)
        for changed in (program.replace(truth, told, 1), head + told + tail, program.replace(truth, told)):
            closed(path, records | {"archive/data.pkl": changed})
            with pytest.raises(UserError, match="save it again"):
                read_tensors(path)
    closed(path, records | {"archive/data/0": bytes(1 << 20)}, zipfile.ZIP_DEFLATED)
    with pytest.raises(UserError, match=r"records of more than|compressed"):
        read_tensors(path)


def test_other_files_of_torch(tmp_path, torch):
    """Those of torch before 1.6 and its TorchScript archives are refused with what to do."""
    torch.save({"w": torch.ones(2)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match="load and save it with a new torch"):
        read_tensors(tmp_path / "old.pt")
    closed(tmp_path / "other.pt", {"a/b": b""})
    with pytest.raises(UserError, match=r"without the data\.pkl"):
        read_tensors(tmp_path / "other.pt")
    with pytest.raises(UserError, match="nowhere"):
        load_stored(tmp_path / "nowhere.pt")


@pytest.mark.parametrize("act", ["TopK", "ReLU"])
def test_the_files_of_openai(tmp_path, torch, x, act):
    """Codes and reconstruction to 1e-5 of the formulas. Controls: the norm left out, pre_bias not taken off."""
    a = arrays_of()
    state = {"pre_bias": a["b_dec"], "latent_bias": a["b_enc"], "encoder.weight": a["W_enc"].T}
    state |= {"decoder.weight": a["W_dec"].T, "stats_last_nonzero": np.zeros(M, np.int64)}
    state = {name: torch.tensor(np.ascontiguousarray(value)) for name, value in state.items()} | {"activation": act}
    if act == "TopK":
        state["activation_state_dict"] = {"k": K, "postact_fn": "ReLU"}
    torch.save(state, tmp_path / "32768.pt")
    sae = load_stored(tmp_path / "32768.pt").sae
    how = {"act": act.lower(), "norm": "layer_norm" if act == "TopK" else None}
    codes, out = formulas(a, x, **how)
    np.testing.assert_allclose(sae.encode(x), codes, rtol=1e-5, atol=2e-5)
    np.testing.assert_allclose(sae(x), out, rtol=1e-5, atol=2e-5)
    for wrong in {"norm": "constant_norm_rescale"}, {"centred": False}:
        assert not np.allclose(formulas(a, x, **how | wrong)[0], codes, atol=1e-3)
    state["activation"] = "Identity"
    torch.save(state, tmp_path / "32768.pt")
    with pytest.raises(UserError, match="activation `Identity`"):
        load_stored(tmp_path / "32768.pt")
