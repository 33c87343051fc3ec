"""One file from a package index over HTTP, found where pip and uv would look for it (PEP 503 and 691).

It runs neither of them, since a Python may have neither; it knows no models, and not what is in the file.
"""

import configparser
import hashlib
import html
import os
import re
import ssl
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urldefrag, urljoin, urlsplit

from tinyserve.checkpoints.hub.failures import reason_of
from tinyserve.checkpoints.hub.patience import within
from tinyserve.checkpoints.hub.transfer import append
from tinyserve.errors import TinyserveError

if TYPE_CHECKING:
    from httpx2 import Client

PYPI = "https://pypi.org/simple"
FIRST = ("PIP_INDEX_URL", "UV_DEFAULT_INDEX", "UV_INDEX_URL")  # the index, by the first of these that is set
MORE = ("PIP_EXTRA_INDEX_URL", "UV_INDEX", "UV_EXTRA_INDEX_URL")  # those that are asked after it
FORBIDDEN = ("PIP_NO_INDEX", "UV_NO_INDEX", "UV_OFFLINE")
TIMEOUTS = ("PIP_DEFAULT_TIMEOUT", "PIP_TIMEOUT", "UV_HTTP_TIMEOUT")
CERTIFICATES = ("PIP_CERT", "REQUESTS_CA_BUNDLE")  # SSL_CERT_FILE is read by the HTTP client itself
PATIENCE = 4.5  # seconds an index may take to answer, unless the user's own time-out is longer
STALLED = 15.0  # seconds without a byte
_TYPES = "application/vnd.pypi.simple.v1+json, application/vnd.pypi.simple.v1+html;q=0.2, text/html;q=0.1"


class IndexFailed(TinyserveError):
    """The file could not be had; the message is the reason, without the way out and a full stop."""


class WrongFile(IndexFailed):
    """The index has another file under this name."""


def indexes() -> list[str]:
    """The addresses to ask, in order: what variables say, else pip's configuration, else PyPI; then the extra ones.

    Raises IndexFailed if a variable forbids them all.
    """
    if forbids := [name for name in FORBIDDEN if os.environ.get(name, "").lower() not in {"", "0", "false", "no"}]:
        raise IndexFailed(f"{forbids[0]} forbids the package index")
    configured = _pip_configuration()
    first = next(filter(None, map(os.environ.get, FIRST)), None) or configured.get("index-url") or PYPI
    more = [os.environ.get(name, "") for name in MORE] + [configured.get("extra-index-url", "")]
    # uv's may have a name before them. Folders, which pip takes as extra indexes as well, are not asked.
    urls = [re.sub(r"^[\w.-]+=(?=https?:)", "", url).rstrip("/") for url in [first, *" ".join(more).split()]]
    return list(dict.fromkeys(urls[:1] + [url for url in urls[1:] if url.startswith(("http:", "https:"))]))


def download(project: str, file: str, sha256: str, target: Path, report: Callable[[int], None]) -> None:
    """Bring one file to `target`, behind the bytes that are there already; its name is good when its sha256 is right.

    `report` hears how many bytes are here. Raises IndexFailed, and OSError for the disk.
    """
    reasons = []
    partial = target.with_name(f"{target.name}.incomplete")
    for index in indexes():
        try:
            _bring(index, project, file, partial, report)
        except IndexFailed as error:
            reasons.append(str(error))
            continue
        with partial.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        if digest == sha256:
            partial.replace(target)
            return
        partial.unlink()
        raise WrongFile(f"{file} from {_shown(index)} has sha256 {digest[:12]}, not {sha256[:12]}")
    raise IndexFailed("; ".join(reasons))


def _bring(index: str, project: str, file: str, partial: Path, report: Callable[[int], None]) -> None:
    """The missing bytes of a file from one index, going on after a cut as long as bytes keep coming."""
    import httpx2

    at = _shown(index)
    try:
        with _client() as client:
            try:
                url = within(_patience(), lambda: _find(client, index, project, file))
            except TimeoutError as error:
                raise IndexFailed(f"{at} has not answered in {_patience():g} s") from error
            while True:
                have = _bytes_of(partial)
                try:
                    return _stream(client, url, index, partial, report)
                except httpx2.TransportError as error:
                    if _bytes_of(partial) <= have:
                        reason = f"{file} stopped after {_bytes_of(partial)} bytes ({reason_of(error)})"
                        raise IndexFailed(f"{reason}; the next try goes on from there") from error
    except httpx2.HTTPStatusError as error:
        status = error.response.status_code
        says = {401: "wants a user and a password", 403: "refuses", 404: f"has no {project}"}
        raise IndexFailed(f"{at} {says.get(status, 'fails')} (HTTP {status})") from error
    except httpx2.UnsupportedProtocol as error:
        raise IndexFailed(f"{at} is no address that begins with https:// or http://") from error
    except (httpx2.HTTPError, httpx2.InvalidURL, ValueError) as error:
        raise IndexFailed(f"{at} cannot be reached: {reason_of(error)}") from error


def _client() -> "Client":
    """An HTTP client with the user's proxies, certificates and time-out."""
    import httpx2

    bundle = next(filter(None, map(os.environ.get, CERTIFICATES)), None)
    try:
        verify = True if bundle is None else _trusting(Path(bundle))
        timeout = max(STALLED, _patience())
        return httpx2.Client(verify=verify, timeout=httpx2.Timeout(timeout, connect=_patience()), follow_redirects=True)
    except OSError as error:
        raise IndexFailed(f"the certificates in {bundle or 'SSL_CERT_FILE'} cannot be read") from error
    except ValueError as error:  # a proxy that is none
        raise IndexFailed(f"{reason_of(error)}: see HTTPS_PROXY") from error


def _trusting(bundle: Path) -> ssl.SSLContext:
    """TLS with the certificates in a file or folder."""
    if bundle.is_dir():
        return ssl.create_default_context(capath=bundle)
    return ssl.create_default_context(cafile=bundle)


def _find(client: "Client", index: str, project: str, file: str) -> str:
    """The address of a file, out of the index's page about its project."""
    answer = client.get(f"{index}/{project}/", headers={"Accept": _TYPES}, auth=_password(index, index))
    answer.raise_for_status()
    links: list[str] = []
    if "json" in answer.headers.get("Content-Type", ""):
        with suppress(ValueError, KeyError, TypeError):
            links = [entry["url"] for entry in answer.json()["files"]]
    else:
        links = [html.unescape(link) for link in re.findall(r"""<a\s[^>]*?href=["']([^"']+)""", answer.text, re.I)]
    for link in links:
        url = urldefrag(urljoin(str(answer.url), link)).url
        if unquote(urlsplit(url).path).rpartition("/")[2] == file:
            return url
    raise IndexFailed(f"{_shown(index)} has no {file}")


def _stream(client: "Client", url: str, index: str, partial: Path, report: Callable[[int], None]) -> None:
    """One GET of the bytes that are missing; a server that ignores the range starts the file over."""
    have = _bytes_of(partial)
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    with client.stream("GET", url, headers=headers, auth=_password(url, index)) as answer:
        if answer.status_code == 416:  # nothing is missing; the hash tells whether too much is here
            return
        answer.raise_for_status()
        append(answer, partial, have, report)


def _password(url: str, index: str) -> tuple[str, str] | None:
    """User and password out of an index's address, for its own host alone."""
    wanted, known = urlsplit(url), urlsplit(index)
    is_its_own = (wanted.scheme, wanted.hostname, wanted.port) == (known.scheme, known.hostname, known.port)
    return (unquote(known.username), unquote(known.password or "")) if is_its_own and known.username else None


def _pip_configuration() -> dict[str, str]:
    """The section [global] of pip's configuration files, of which the later ones win."""
    from platformdirs import site_config_path, user_config_path

    if (own := os.environ.get("PIP_CONFIG_FILE")) == os.devnull:
        return {}
    name = "pip.ini" if os.name == "nt" else "pip.conf"
    folders = [site_config_path("pip", appauthor=False), Path("/etc"), Path.home() / ".pip"]
    folders += [Path.home() / ".config/pip", user_config_path("pip", appauthor=False, roaming=True), Path(sys.prefix)]
    parser = configparser.ConfigParser(interpolation=None)
    for path in [*(folder / name for folder in folders), *([Path(own)] if own else [])]:
        with suppress(configparser.Error, OSError, ValueError):
            parser.read(path, encoding="utf-8")
    return dict(parser["global"]) if parser.has_section("global") else {}


def _patience() -> float:
    """Seconds for an index to answer: ours, or a longer time-out that the user has told pip or uv."""
    told = next(filter(None, map(os.environ.get, TIMEOUTS)), "")
    with suppress(ValueError):
        return max(PATIENCE, float(told))
    return PATIENCE


def _bytes_of(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _shown(url: str) -> str:
    """An address without the password that it may carry."""
    return re.sub(r"//[^/@]*@", "//", url)
