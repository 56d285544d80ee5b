"""Files of the hub, into its own cache, and its errors told in one line."""

import re
from collections.abc import Callable
from pathlib import Path

from qsae_jax.errors import UserError


def from_hub(source: str, name: str, revision: str, ask: Callable[[], Path]) -> Path:
    """What `ask` downloads of a repository; `source` is what the user typed."""
    try:
        return ask()
    except Exception as error:  # besides its own errors, those of its HTTP library, which has been changed before
        raise UserError(f"`{source}`: {_said(name, revision, error)}") from error


def _said(name: str, revision: str, error: Exception) -> str:
    """What is wrong and what to do; never the token, which some HTTP errors quote."""
    from huggingface_hub import constants, errors

    cause = error.__cause__ if isinstance(error, errors.LocalEntryNotFoundError) else error
    if isinstance(error, errors.GatedRepoError):
        return f"the repository is gated: accept its terms at https://huggingface.co/{name} and set HF_TOKEN"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"the hub has no public repository `{name}`: check the name, or set HF_TOKEN if it is private"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"the repository has no revision `{revision}`: check the tag, or leave @REV out for its main branch"
    if isinstance(cause, errors.HfHubHTTPError) and cause.response.status_code in (401, 403):
        return f"the hub refuses access ({cause.response.status_code}): check HF_TOKEN and what it may read"
    if isinstance(error, errors.LocalEntryNotFoundError):
        what = "only part of it" if type(error).__name__ == "IncompleteSnapshotError" else "no copy of it"
        if constants.HF_HUB_OFFLINE or isinstance(cause, errors.OfflineModeIsEnabled):
            return f"HF_HUB_OFFLINE is set and the hub's cache holds {what}: unset it and fetch once while online"
        return f"the hub cannot be reached and its cache holds {what}: check the network and proxy, and try again"
    if isinstance(error, errors.HFValidationError):
        return "this is not the name of a repository: write hf:ORG/NAME or hf:ORG/NAME@REVISION"
    reason = re.sub(r"hf_\w+", "hf_...", (str(error).splitlines() or [""])[0]) or type(error).__name__
    return f"it cannot be had from the hub ({reason}): check the name, the network, the free space, or HF_TOKEN"
