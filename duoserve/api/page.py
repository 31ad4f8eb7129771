"""The web page's files, read once and served from memory by exact name: no path of a request ever reaches the disk. Knows
files and their headers; knows nothing of models.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response

WEB = Path(__file__).parent.parent / "web"
TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
POLICY = (
    "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; object-src 'none'; "
    "require-trusted-types-for 'script'"
)


class Asset(NamedTuple):
    body: bytes
    media_type: str
    tag: str


def assets() -> dict[str, Asset]:
    """By path; the page itself is "/"."""
    found = {}
    for file in sorted(WEB.iterdir()):
        if file.suffix in TYPES:
            body = file.read_bytes()
            path = "/" if file.name == "index.html" else f"/{file.name}"
            found[path] = Asset(body, TYPES[file.suffix], f'"{hashlib.sha256(body).hexdigest()[:32]}"')
    return found


def add_page(app: Starlette) -> frozenset[str]:
    """Serve the page; returns its paths, which hold no secret and need no key."""
    found = assets()

    async def serve(request: Request) -> Response:
        asset = found[request.url.path]
        headers = {
            "Content-Security-Policy": POLICY,
            "Cache-Control": "no-cache",
            "ETag": asset.tag,
        }
        if request.headers.get("if-none-match") == asset.tag:
            return Response(status_code=304, headers=headers)
        return Response(asset.body, media_type=asset.media_type, headers=headers)

    for path in found:
        app.add_route(path, serve, methods=["GET", "HEAD"], include_in_schema=False)
    return frozenset(found)
