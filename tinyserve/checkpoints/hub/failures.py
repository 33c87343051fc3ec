"""What goes wrong on the way to the Hub, in one sentence each, with the way out. It downloads nothing."""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

from tinyserve.checkpoints.hub import cache
from tinyserve.errors import HubError, HubUnreachable


def endpoint() -> str:
    """The Hub's address: HF_ENDPOINT, or the public one."""
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def transport_error() -> type[Exception]:
    """What the HTTP client under huggingface_hub (httpx, later httpx2) raises for connections."""
    from huggingface_hub import errors

    return errors.HfHubHTTPError.__mro__[1]


@contextmanager
def in_sentences(repo: str, revision: str, file: str | None) -> Iterator[None]:
    """Turn what huggingface_hub, its HTTP client and the disk raise into one sentence each."""
    try:
        yield
    except HubError:
        raise
    except Exception as error:
        if (explained := _explain(error, repo, revision, file)) is None:
            raise
        raise explained from error


def _explain(error: Exception, repo: str, revision: str, file: str | None) -> HubError | None:
    from huggingface_hub import errors, get_token

    page = f"{endpoint()}/{repo}"
    if isinstance(error, errors.GatedRepoError):
        if get_token() is None:
            return HubError(f"{repo} is gated: accept its licence at {page}, then set HF_TOKEN or run `hf auth login`.")
        return HubError(
            f"{repo} is gated and your token has no access: accept its licence at {page} with the account of "
            "that token, or set HF_TOKEN to another."
        )
    if isinstance(error, errors.LocalEntryNotFoundError):  # huggingface_hub's word for every failed request
        return HubUnreachable(unreachable(reason_of(error)))
    if isinstance(error, errors.RevisionNotFoundError):
        return HubError(f"{repo} has no revision {revision!r}: its branches and commits are listed at {page}.")
    if isinstance(error, errors.EntryNotFoundError):
        return HubError(f"{repo} has no {file or 'such file'} at revision {revision!r}: see {page}.")
    if isinstance(error, errors.RepositoryNotFoundError):
        return HubError(
            f"There is no repository {repo} at {endpoint()}, or it is private: check the spelling, and set "
            "HF_TOKEN or run `hf auth login` if it is yours."
        )
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        if status == 401:
            return HubError("The Hub refuses the token (401): set HF_TOKEN to a valid one, or unset it.")
        if status == 403 and error.response.headers.get("X-Error-Code"):
            return HubError(f"The Hub forbids {repo} (403): set HF_TOKEN to a token that may read it.")
        return HubUnreachable(unreachable(f"HTTP {status}"))
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return HubError(no_room(repo, "more than is free"))
    if isinstance(error, errors.HFValidationError):
        return HubError(f"{repo!r} is no repository id: it is owner/name, as in HuggingFaceTB/SmolLM2-135M-Instruct.")
    if isinstance(error, TimeoutError | ConnectionError | transport_error()):
        return HubUnreachable(unreachable(reason_of(error)))
    if isinstance(error, OSError):
        return HubError(f"{cache.hub_cache()} cannot be written ({reason_of(error)}): set HF_HOME to another folder.")
    if isinstance(error, ValueError):  # no JSON where the Hub answers JSON: a portal, a filter
        return HubUnreachable(unreachable("the answer is not the Hub's"))
    return None


def unreachable(reason: str) -> str:
    return (
        f"The Hugging Face Hub at {endpoint()} cannot be reached ({reason}): check the network, set "
        "HTTPS_PROXY to your proxy or HF_ENDPOINT to a mirror, or give a local folder or .gguf file."
    )


def no_room(repo: str, numbers: str) -> str:
    return (
        f"The disk of {cache.hub_cache()} is full: {repo} needs {numbers}; make room (`tinyserve list`, "
        "`tinyserve rm`), or set HF_HOME to another disk, and run it again."
    )


def reason_of(error: BaseException) -> str:
    """The error in a few words, on one line, without the sentence's own full stop."""
    return re.sub(r"\s+", " ", str(error)).strip().rstrip(".")[:160] or type(error).__name__
