"""What names a dictionary: the hub, offline, in the layout of its cache, and SAELens's list."""

import shutil
import sys
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from qsae_jax.errors import UserError
from qsae_jax.sae.formats import load_stored, sources

GOLDEN = Path(__file__).parents[1] / "goldens" / "topk"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """One repository with two dictionaries in the hub's cache."""
    repository = tmp_path / "hub" / "models--org--saes"
    (repository / "refs").mkdir(parents=True)
    for name in ("main", "v1"):
        (repository / "refs" / name).write_text(COMMIT)
    for place in ("a/layers.3", "b"):
        shutil.copytree(GOLDEN, repository / "snapshots" / COMMIT / place)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.mark.parametrize("source", ["hf:org/saes/a/layers.3", "hf:org/saes@v1/b", f"hf:org/saes@{COMMIT}/b/"])
def test_a_dictionary_in_a_repository_of_the_hub(hub, source):
    assert load_stored(source).metadata["hook_name"] == "blocks.0.hook_resid_post"


REFUSED = {
    "hf:org/saes/c": "no dictionary at `c`",
    "hf:org/saes/a": "holds layers.3; a dictionary's folder has one of",
    "hf:org/saes@v2/b": "v2",
    "hf:org/none/b": "HF_HUB_OFFLINE is set",
    "hf:org": "not of the form hf:ORG/NAME",
    "no/such/folder": "is not there",
}


@pytest.mark.parametrize("source", REFUSED)
def test_what_is_not_there(hub, source):
    with pytest.raises(UserError, match=REFUSED[source]) as caught:
        load_stored(source)
    assert source.split("/")[0] in str(caught.value) and "\n" not in str(caught.value)


def test_only_the_files_of_one_dictionary_are_asked_for(tmp_path, monkeypatch):
    """Never code, nor a whole repository."""
    asked = {}

    def download(name, **how):
        asked.update(how, name=name)
        shutil.copytree(GOLDEN, tmp_path / "layer_3/x", dirs_exist_ok=True)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    load_stored("hf:org/saes@v1/layer_3/x")
    assert (asked["name"], asked["revision"]) == ("org/saes", "v1")
    assert all(pattern.startswith("layer_3/") and "*" not in pattern for pattern in asked["allow_patterns"])


LIST = """
a-release:
  conversion_func: null
  model: gpt2-small
  repo_id: org/saes
  config_overrides: {model_from_pretrained_kwargs: {center_writing_weights: true}}
  saes:
  - {id: blocks.3, path: a/layers.3, norm_scaling_factor: 2.5}
temporal-release:
  conversion_func: temporal
  model: gpt2-small
  repo_id: org/saes
  saes: []
"""


@pytest.fixture
def listed(hub, tmp_path, monkeypatch):
    """A package sae_lens that fails when it is imported, with a list beside it."""
    package = tmp_path / "site" / "sae_lens"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "pretrained_saes.yaml").write_text(LIST)
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site"), *sys.path])
    sources._list.cache_clear()
    yield
    sources._list.cache_clear()


def test_a_name_of_saelens(listed):
    """By release and id, without importing it; what the list says goes into the metadata, beneath the file's own."""
    stored = load_stored("a-release/blocks.3")
    assert stored.metadata["hook_name"] == "blocks.0.hook_resid_post"
    assert stored.metadata["model_from_pretrained_kwargs"] == {"center_writing_weights": True}
    assert sources.find("a-release/blocks.3").told["norm_scaling_factor"] == 2.5


@pytest.mark.parametrize(
    "source, message",
    [
        ("a-releas/x", "no such release; nearest: a-release"),
        ("a-release/blocks.4", "no id `blocks.4`; nearest: blocks.3"),
        ("temporal-release/x", "loader `temporal` are not supported"),
    ],
)
def test_what_saelens_does_not_list(listed, source, message):
    with pytest.raises(UserError, match=message):
        load_stored(source)


def test_without_saelens_the_error_says_so(hub, monkeypatch):
    sources._list.cache_clear()
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="install sae-lens"):
        load_stored("a-release/blocks.3")
    sources._list.cache_clear()
