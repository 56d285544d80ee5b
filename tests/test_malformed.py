"""A hundred malformed inputs: each one line on standard error that names the thing, status 2, and nothing written."""

import io
import json
import shutil
import struct
import zipfile

import numpy as np
import pytest
from safetensors.numpy import save

from qsae_jax import save_sae
from qsae_jax.cli import main

SAE_FILE = "sae_weights.safetensors"


@pytest.fixture(scope="module")
def things(tiny_folder, tiny_sae, tmp_path_factory):
    """A model, a dictionary, text and a study, all well; every case spoils a copy of one."""
    folder = tmp_path_factory.mktemp("whole")
    shutil.copytree(tiny_folder, folder / "model")
    save_sae(tiny_sae(), folder / "sae", {"hook_name": "blocks.1.resid_post"})
    (folder / "text.txt").write_text("some words and others " * 60)
    np.save(folder / "ids.npy", np.zeros((4, 16), np.int32))
    return folder


def edit(name, **changes):
    """A JSON file with other values; None takes a key away."""

    def spoil(folder):
        facts = json.loads((folder / name).read_text())
        facts |= changes
        (folder / name).write_text(json.dumps({k: v for k, v in facts.items() if v is not None}))

    return spoil


def write(name, content):
    def spoil(folder):
        data = content if isinstance(content, bytes) else content.encode()
        (folder / name).write_bytes(data)

    return spoil


def cut(name, share):
    def spoil(folder):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(share * len(data))])

    return spoil


def gone(name):
    return lambda folder: (folder / name).unlink()


def tensors(name, **changes):
    """A safetensors file with other tensors; None takes one away."""

    def spoil(folder):
        from safetensors.numpy import load_file

        found = load_file(folder / name) | changes
        (folder / name).write_bytes(save({k: v for k, v in found.items() if v is not None}))

    return spoil


def header(length, text=b""):
    return struct.pack("<Q", length) + text


def archive(**files):
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as zipped:
        for name, content in files.items():
            zipped.writestr(name.replace("__", "/"), content)
    return made.getvalue()


def gguf(magic=b"GGUF", version=3, tensors=0, facts=0, rest=b""):
    return magic + struct.pack("<IQQ", version, tensors, facts) + rest


NAN = np.full((32, 16), np.nan, np.float32)
MODEL = {
    "config: empty": write("config.json", ""),
    "config: no JSON": write("config.json", "{model_type: llama}"),
    "config: a list": write("config.json", "[]"),
    "config: not UTF-8": write("config.json", b"\xff\xfe{}"),
    "config: deep": write("config.json", "[" * 100_000),
    "config: gone": gone("config.json"),
    "config: unknown family": edit("config.json", model_type="mamba"),
    "config: no family": edit("config.json", model_type=None),
    "config: width of words": edit("config.json", hidden_size="sixteen"),
    "config: width of nothing": edit("config.json", hidden_size=0),
    "config: negative layers": edit("config.json", num_hidden_layers=-3),
    "config: a million layers": edit("config.json", num_hidden_layers=10**6),
    "config: another width": edit("config.json", hidden_size=18),
    "config: more layers": edit("config.json", num_hidden_layers=4),
    "config: fewer layers": edit("config.json", num_hidden_layers=2),
    "config: heads that do not divide": edit("config.json", num_attention_heads=3),
    "config: unknown activation": edit("config.json", hidden_act="sine"),
    "config: unknown key": edit("config.json", attention_sinks=4),
    "config: smaller vocabulary": edit("config.json", vocab_size=100),
    "config: quantized": edit("config.json", quantization_config={"quant_method": "made_up"}),
    "weights: gone": gone("model.safetensors"),
    "weights: empty": write("model.safetensors", b""),
    "weights: seven bytes": write("model.safetensors", b"\0" * 7),
    "weights: header beyond the file": write("model.safetensors", header(2**40, b"{}")),
    "weights: header is no JSON": write("model.safetensors", header(4, b"what")),
    "weights: cut short": cut("model.safetensors", 0.5),
    "weights: a pickle": write("model.safetensors", b"\x80\x04cposix\nsystem\n"),
    "weights: one lacks": tensors("model.safetensors", **{"model.norm.weight": None}),
    "weights: one too many": tensors("model.safetensors", **{"model.extra": np.zeros(3, np.float32)}),
    "weights: another shape": tensors("model.safetensors", **{"model.norm.weight": np.ones(17, np.float32)}),
    "weights: not finite": tensors("model.safetensors", **{"model.norm.weight": np.full(16, np.inf, np.float32)}),
    "weights: whole numbers": tensors("model.safetensors", **{"model.norm.weight": np.ones(16, np.int64)}),
    "weights: index out of the folder": lambda folder: (
        gone("model.safetensors")(folder),
        write("model.safetensors.index.json", '{"weight_map": {"model.norm.weight": "../../etc/passwd"}}')(folder),
    ),
}
DICTIONARY = {
    "sae: no cfg": gone("cfg.json"),
    "sae: cfg empty": write("cfg.json", ""),
    "sae: cfg no JSON": write("cfg.json", "d_in = 16"),
    "sae: cfg a list": write("cfg.json", "[1]"),
    "sae: cfg a number": write("cfg.json", "7"),
    "sae: unknown architecture": edit("cfg.json", architecture="mystery"),
    "sae: k of words": edit("cfg.json", k="four"),
    "sae: k of 0": edit("cfg.json", k=0),
    "sae: k negative": edit("cfg.json", k=-4),
    "sae: k beyond the latents": edit("cfg.json", k=33),
    "sae: width that is not the weights'": edit("cfg.json", d_in=17),
    "sae: latents that are not the weights'": edit("cfg.json", d_sae=31),
    "sae: unknown normalisation": edit("cfg.json", normalize_activations="whiten"),
    "sae: no weights": gone(SAE_FILE),
    "sae: weights empty": write(SAE_FILE, b""),
    "sae: weights cut": cut(SAE_FILE, 0.6),
    "sae: weights a pickle": write(SAE_FILE, b"\x80\x04\x95"),
    "sae: no encoder": tensors(SAE_FILE, W_enc=None),
    "sae: no decoder": tensors(SAE_FILE, W_dec=None),
    "sae: no b_dec": tensors(SAE_FILE, b_dec=None),
    "sae: decoder on its side": tensors(SAE_FILE, W_dec=np.ones((16, 32), np.float32)),
    "sae: encoder of three dimensions": tensors(SAE_FILE, W_enc=np.ones((1, 16, 32), np.float32)),
    "sae: not a number": tensors(SAE_FILE, W_dec=NAN),
    "sae: bias of another length": tensors(SAE_FILE, b_enc=np.zeros(31, np.float32)),
    "sae: unknown tensor": tensors(SAE_FILE, W_skip_over=np.zeros(3, np.float32)),
}
FILES = {
    "gguf: empty": ("m.gguf", b""),
    "gguf: another magic": ("m.gguf", gguf(b"GGML")),
    "gguf: version 1": ("m.gguf", gguf(version=1)),
    "gguf: version of the future": ("m.gguf", gguf(version=9)),
    "gguf: cut in its head": ("m.gguf", gguf()[:10]),
    "gguf: a trillion facts": ("m.gguf", gguf(facts=10**12)),
    "gguf: a trillion tensors": ("m.gguf", gguf(tensors=10**12)),
    "gguf: a text beyond the file": ("m.gguf", gguf(facts=1, rest=struct.pack("<Q", 2**60))),
    "gguf: no tensors": ("m.gguf", gguf()),
    "gguf: a value of no type": ("m.gguf", gguf(facts=1, rest=struct.pack("<Q", 1) + b"a" + struct.pack("<I", 99))),
}
SAE_FILES = {
    "npz: empty": ("params.npz", b""),
    "npz: no zip": ("params.npz", b"hello"),
    "npz: nothing in it": ("params.npz", archive()),
    "npz: objects": ("params.npz", archive(**{"W_enc.npy": b"\x93NUMPY\x01\x00v\x00{'descr': '|O', 'shape': (1,)}"})),
    "npz: out of the folder": ("params.npz", archive(**{"..__..__W_enc.npy": b"x"})),
    "pt: empty": ("ae.pt", b""),
    "pt: no zip": ("ae.pt", b"\x80\x02cos\nsystem\n(S'true'\ntR."),
    "pt: a zip without a pickle": ("ae.pt", archive(archive__data__0=b"1234")),
    "pt: runs a command": ("ae.pt", archive(**{"archive__data.pkl": b"cos\nsystem\n(S'touch /tmp/pwned'\ntR."})),
    "pt: ends early": ("ae.pt", archive(**{"archive__data.pkl": b"\x80\x02}q\x00("})),
    "pt: stack of nothing": ("ae.pt", archive(**{"archive__data.pkl": b"\x80\x02R."})),
}
HEAD = 'model = "{model}"\npoint = "blocks.1.resid_post"\nschemes = ["int8"]\n'
STUDIES = {
    "toml: empty": "",
    "toml: broken": "model = ",
    "toml: a key twice": HEAD + 'model = "x"\n',
    "toml: unknown key": HEAD + "speed = 3\n",
    "toml: unknown table": HEAD + "[sea]\nk = 3\n",
    "toml: a word for a number": HEAD + '[train]\ntokens = "many"\n',
    "toml: a number for a word": HEAD + "[tokens]\nbos = 3\n",
    "toml: a table for a value": HEAD + "[dtype]\na = 1\n",
    "toml: a value for a table": HEAD + "sae = 4\n",
    "toml: no schemes": HEAD.replace('["int8"]', "[]"),
    "toml: only fp": HEAD.replace("int8", "fp"),
    "toml: unknown point": HEAD.replace("resid_post", "resid"),
    "toml: a layer too many": HEAD.replace("blocks.1", "blocks.7"),
    "toml: negative batch": HEAD + "[train]\nbatch = -1\n",
    "toml: not a number": HEAD + "[sae]\nlr = nan\n",
    "toml: infinite": HEAD + "[sae]\nlr = inf\n",
    "toml: unknown dtype": HEAD + 'dtype = "int4"\n',
    "toml: a mesh of nothing": HEAD + 'mesh = "0x0"\n',
    "toml: a mesh of words": HEAD + 'mesh = "axb"\n',
    "toml: unknown sparsity": HEAD + '[sae]\nsparsity = "l0norm"\n',
    "toml: fp compared": HEAD + 'compare = "fp"\n',
    "toml: not UTF-8": b"model = '\xff'\n",
}  # fmt: skip
SCHEMES = (
    *("", "int", "int1", "int99", "int4-g0", "int4-g-3", "int4-g", "int4-gptq-gptq", "int4-p101", "int4-p", "INT4!"),
    *("int4--", "prune", "prune1.5", "prune-0.1", "noise@", "noise@fp", "noise@int99", "int4[", "int4[9-4]"),
    *("int4[99]", "q9_k", "mxfp5", "nf5", "int8+", "int{4", "int{8..a}", "../int4", "int4\x00", "prune~"),
)
NPY = b"\x93NUMPY\x01\x00"
TOKENS = {
    "npy: empty": b"",
    "npy: text": b"1 2 3",
    "npy: objects": NPY + b"v\x00{'descr': '|O', 'fortran_order': False, 'shape': (1, 2)}",
    "npy: a header cut short": NPY + b"F\x00{'descr': '<i4', 'fortran_order': False, 'shape': (99999999, 99999999)",
    "npy: a shape beyond all": NPY + b"H\x00{'descr': '<i4', 'fortran_order': False, 'shape': (99999999, 99999999)}",
}
ARRAYS = {
    "npy: one dimension": np.zeros(16, np.int32),
    "npy: int64": np.zeros((4, 16), np.int64),
    "npy: floats": np.zeros((4, 16), np.float32),
    "npy: no rows": np.zeros((0, 16), np.int32),
    "npy: rows of one": np.zeros((4, 1), np.int32),
    "npy: an id too many": np.full((4, 16), 300, np.int32),
    "npy: a negative id": np.full((4, 16), -1, np.int32),
    "npy: longer than the context": np.zeros((4, 65), np.int32),
}


@pytest.fixture
def refused(capsys, tmp_path):
    """`refused(argv)`: it ends with status 2 and one line, whose text this gives; nothing was written."""

    def run(*argv):
        out = tmp_path / "out"
        capsys.readouterr()
        assert main([*map(str, argv), *(["--out", str(out)] if argv[0] != "sae" else [])]) == 2
        printed = capsys.readouterr()
        lines = [line for line in printed.err.splitlines() if not line.startswith("tokens: ")]
        assert len(lines) == 1 and lines[0].startswith("qsae: ") and len(lines[0]) > 20, printed.err
        written = {path.name for path in out.rglob("*") if path.is_file()}
        assert written <= ({"run.json"} if argv[0] == "run" else set()), written
        return lines[0]

    return run


@pytest.mark.parametrize("case", MODEL)
def test_models(refused, things, tmp_path, case):
    shutil.copytree(things / "model", tmp_path / "model")
    MODEL[case](tmp_path / "model")
    said = refused("quantize", "--model", tmp_path / "model", "--scheme", "int4")
    assert "model" in said


@pytest.mark.parametrize("case", DICTIONARY)
def test_dictionaries(refused, things, tmp_path, case):
    shutil.copytree(things / "sae", tmp_path / "sae")
    DICTIONARY[case](tmp_path / "sae")
    assert "sae" in refused("sae", "info", tmp_path / "sae")


@pytest.mark.parametrize("case", FILES)
def test_gguf_files(refused, tmp_path, case):
    name, content = FILES[case]
    (tmp_path / name).write_bytes(content)
    assert name in refused("quantize", "--model", tmp_path / name, "--scheme", "int4")


@pytest.mark.parametrize("case", SAE_FILES)
def test_other_dictionaries(refused, tmp_path, case):
    name, content = SAE_FILES[case]
    (tmp_path / name).write_bytes(content)
    assert name in refused("sae", "info", tmp_path / name)


@pytest.mark.parametrize("case", STUDIES)
def test_studies(refused, things, tmp_path, case):
    text = STUDIES[case]
    text = text if isinstance(text, bytes) else text.replace("{model}", str(things / "model")).encode()
    (tmp_path / "s.toml").write_bytes(text)
    refused("run", tmp_path / "s.toml", "--set", "tokens.seq=16", "--set", f"tokens.source=text:{things}/text.txt")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_schemes(refused, things, scheme):
    refused("quantize", "--model", things / "model", "--scheme", scheme)


@pytest.mark.parametrize("case", [*TOKENS, *ARRAYS])
def test_token_files(refused, things, tmp_path, case):
    if case in TOKENS:
        (tmp_path / "ids.npy").write_bytes(TOKENS[case])
    else:
        np.save(tmp_path / "ids.npy", ARRAYS[case])
    refused("audit", "--model", things / "model", "--sae", things / "sae", "--tokens", f"npy:{tmp_path}/ids.npy",
            "--schemes", "int4")  # fmt: skip


def test_there_are_a_hundred():
    assert sum(map(len, (MODEL, DICTIONARY, FILES, SAE_FILES, STUDIES, SCHEMES, TOKENS, ARRAYS))) >= 100
