"""The dashboard's page and its files, served from `static/dashboard`, and who gets the page instead of JSON.

Files are kept in memory as they are and compressed, and read anew when they change on the disk. Nothing of another host
is ever asked for: the policy in the page's head forbids it to the browser as well.
May import `config`.
"""

from __future__ import annotations

import gzip
import hashlib
import mimetypes
import re
from dataclasses import dataclass
from pathlib import Path

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from config import PROJECT_DIR

FOLDER = PROJECT_DIR / "static" / "dashboard"
ADDRESS = "/static/dashboard"
INDEX = "index.html"
# No scripts, styles or connections but this server's own, nothing inline, in nobody's frame.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; font-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_NAME = re.compile(r"(?:[A-Za-z0-9_-][A-Za-z0-9._-]*/)*[A-Za-z0-9_-][A-Za-z0-9._-]*\Z")  # no `..`, no hidden file
_REFERENCE = re.compile(rb'"/static/dashboard/([A-Za-z0-9._/-]+)(?:\?v=[^"]*)?"')
_COMPRESSIBLE = ("text/", "application/json", "image/svg+xml")
_TYPES = {".js": "text/javascript", ".mjs": "text/javascript", ".svg": "image/svg+xml", ".woff2": "font/woff2"}


@dataclass(frozen=True)
class _File:
    body: bytes
    compressed: bytes | None  # None where that would save nothing
    digest: str
    media_type: str


class Files:
    """The files below a folder."""

    def __init__(self, folder: Path = FOLDER) -> None:
        self._folder = folder
        self._kept: dict[str, tuple[tuple[int, int], _File]] = {}
        self._index: tuple[tuple[str, ...], _File] | None = None
        for path in sorted(folder.rglob("*")):  # compressed now, not while the first browser waits
            if path.is_file():
                self.get(path.relative_to(folder).as_posix())

    def get(self, name: str) -> _File | None:
        """The file, or None when there is none of that name."""
        if not _NAME.match(name):
            return None
        path = self._folder / name
        try:
            if not path.is_file():
                return None
            found = path.stat()
            version = (found.st_mtime_ns, found.st_size)
            kept = self._kept.get(name)
            if kept is None or kept[0] != version:
                kept = self._kept[name] = (version, _file(path.read_bytes(), name))
        except OSError:
            return None
        return kept[1]

    def index(self) -> _File | None:
        """The page, each file it refers to with that file's version, so that a browser may keep those for ever."""
        page = self.get(INDEX)
        if page is None:
            return None
        versions = {name: found for name in _REFERENCE.findall(page.body) if (found := self.get(name.decode()))}
        key = (page.digest, *(found.digest for found in versions.values()))
        if self._index is None or self._index[0] != key:

            def versioned(match: re.Match[bytes]) -> bytes:
                found = versions.get(match[1])
                return b'"/static/dashboard/%s?v=%s"' % (match[1], found.digest.encode()) if found else match[0]

            self._index = key, _file(_REFERENCE.sub(versioned, page.body), INDEX)
        return self._index[1]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI, mounted at `ADDRESS`."""
        if scope["method"] not in ("GET", "HEAD"):
            raise HTTPException(405, headers={"Allow": "GET, HEAD"})
        name = scope["path"].removeprefix(scope.get("root_path", "")).removeprefix("/")
        found = self.get(name)
        if found is None:
            raise HTTPException(404)
        versioned = f"v={found.digest}" in scope["query_string"].decode("latin-1").split("&")
        response = _response(found, Headers(scope=scope), for_ever=versioned)
        await response(scope, receive, send)


def wants_page(accept: str) -> bool:
    """Whether the Accept header names HTML: browsers do, programs ask for JSON or for anything."""
    for part in accept.split(","):
        kind, *parameters = (word.strip().lower() for word in part.split(";"))
        if kind in ("text/html", "application/xhtml+xml"):
            return not any(re.fullmatch(r"q\s*=\s*0(\.0*)?", parameter) for parameter in parameters)
    return False


def page(files: Files, headers: Headers) -> Response | None:
    """The dashboard's page, or None when it is not installed."""
    found = files.index()
    if found is None:
        return None
    response = _response(found, headers, for_ever=False)
    response.headers["Vary"] = "Accept, Accept-Encoding"
    return response


def _response(found: _File, headers: Headers, *, for_ever: bool) -> Response:
    squeezed = found.compressed if "gzip" in headers.get("accept-encoding", "") else None
    etag = f'"{found.digest}{"-gz" if squeezed is not None else ""}"'
    head = {
        "ETag": etag,
        "Cache-Control": "public, max-age=31536000, immutable" if for_ever else "no-cache",
        "Vary": "Accept-Encoding",
    }
    if found.media_type.startswith("text/html"):
        head |= {"Content-Security-Policy": POLICY, "Cross-Origin-Opener-Policy": "same-origin"}
    if etag in (word.strip().removeprefix("W/") for word in headers.get("if-none-match", "").split(",")):
        return Response(status_code=304, headers=head)
    if squeezed is not None:
        head["Content-Encoding"] = "gzip"
    return Response(squeezed or found.body, media_type=found.media_type, headers=head)


def _file(body: bytes, name: str) -> _File:
    kind = _TYPES.get(Path(name).suffix) or mimetypes.guess_type(name)[0] or "application/octet-stream"
    squeezed = gzip.compress(body, 9, mtime=0) if kind.startswith(_COMPRESSIBLE) else body
    media_type = f"{kind}; charset=utf-8" if kind.startswith(("text/", "application/json")) else kind
    digest = hashlib.sha256(body).hexdigest()[:16]
    return _File(body, squeezed if len(squeezed) < len(body) else None, digest, media_type)
