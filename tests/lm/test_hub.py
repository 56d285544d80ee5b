"""The hub as a source, offline: the layout of its own cache, and the errors that its library raises."""

import json
import re
from fnmatch import fnmatch
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants, errors

from qsae_jax.errors import UserError
from qsae_jax.lm.load import load_lm
from qsae_jax.lm.sources import fetch


@pytest.fixture
def hub(facts, tensors, write_folder, tmp_path, monkeypatch):
    """The hub's cache as `huggingface_hub` lays it out, with one model at `main` and at the tag `v1`."""
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


def asked(monkeypatch, folder):
    """What `fetch` asks the hub for, call by call."""
    calls = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **how: calls.append(how) or str(folder))
    assert fetch("hf:org/tiny@v1") == folder
    names = ("x.py", "x.bin", "x.pt", "x.json", "model.safetensors", "m-1.safetensors", "m-2.safetensors", "sub/x.json")

    def matches(name, patterns):
        return any(fnmatch(name, pattern) for pattern in patterns)

    taken = [
        [n for n in names if matches(n, how["allow_patterns"]) and not matches(n, [how["ignore_patterns"]])]
        for how in calls
    ]
    return [how["revision"] for how in calls], taken


def test_only_weights_and_configuration_are_asked_for(monkeypatch, tmp_path):
    """Never code or pickles, and of several files of weights those that the index names, of the commit that the
    configuration is of. Control: without an index the single file."""
    revisions, taken = asked(monkeypatch, tmp_path)
    assert revisions == ["v1", tmp_path.name]
    assert taken == [["x.json"], ["model.safetensors"]]
    weights = {"weight_map": {"a": "m-2.safetensors", "b": "m-1.safetensors", "c": "m-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(weights))
    assert asked(monkeypatch, tmp_path)[1] == [["x.json"], ["m-1.safetensors", "m-2.safetensors"]]


def refusal(kind, status):
    """An error as the hub's library raises it: its cause is on the first line."""
    response: Any = SimpleNamespace(status_code=status, headers={}, request=None)
    return kind(f"{status} Client Error.\n\nPlease log in.", response=response)


class ProxyError(Exception):
    """Of the HTTP library: no kind of OSError, and no error of the hub's."""


def caused(error, cause):
    error.__cause__ = cause
    return error


LOCAL, PART = errors.LocalEntryNotFoundError, errors.IncompleteSnapshotError
REFUSED = refusal(errors.HfHubHTTPError, 403)
HUB_ERRORS = [
    (refusal(errors.GatedRepoError, 403), False, "gated: accept its terms at https://huggingface.co/org/tiny"),
    (refusal(errors.RepositoryNotFoundError, 404), False, "no public repository `org/tiny`.*HF_TOKEN"),
    (refusal(errors.RevisionNotFoundError, 404), False, "no revision `v1`"),
    (refusal(errors.HfHubHTTPError, 401), False, r"refuses access \(401\).*HF_TOKEN"),
    (caused(LOCAL("x"), REFUSED), False, r"refuses access \(403\)"),
    (caused(LOCAL("x"), errors.OfflineModeIsEnabled("x")), False, "HF_HUB_OFFLINE is set.*no copy.*unset it"),
    (LOCAL("x"), True, "HF_HUB_OFFLINE is set.*no copy"),
    (PART("x", snapshot_path="y"), True, "HF_HUB_OFFLINE is set.*only part"),
    (caused(LOCAL("x"), ConnectionError("x")), False, "cannot be reached.*no copy.*network"),
    (PART("x", snapshot_path="y"), False, "cannot be reached.*only part"),
    (errors.HFValidationError("x"), False, "hf:ORG/NAME@REVISION"),
    (ProxyError("407"), False, r"\(407\): check the name, the network"),
    (OSError(28, "No space left on device"), False, "No space left on device.*the free space"),
]


@pytest.mark.parametrize("error, offline, message", HUB_ERRORS)
def test_an_error_of_the_hub_says_what_to_do(monkeypatch, error, offline, message):
    """One line that names the source. Control: no message fits the other errors."""

    def download(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    with pytest.raises(UserError, match=f"`hf:org/tiny@v1`: .*{message}") as caught:
        fetch("hf:org/tiny@v1")
    assert "\n" not in str(caught.value)
    unlike = [m for e, o, m in HUB_ERRORS if type(e) is not type(error) and (type(e), o) != (LOCAL, offline)]
    assert not [m for m in unlike if re.search(m, str(caught.value)) and "refuses" not in m]


def test_the_token_is_never_shown(monkeypatch):
    """An HTTP library may quote the header that it cannot send. Control: the rest of its words is shown."""

    def download(*_, **__):
        raise ValueError("Illegal header value b'Bearer hf_secret'")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(UserError, match="Illegal header value") as caught:
        fetch("hf:org/tiny")
    assert "secret" not in str(caught.value)
