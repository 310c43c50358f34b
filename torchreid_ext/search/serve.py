"""A page on this machine that looks up a photo, or a part of it, in a gallery. No photo is written to disk."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from html import escape
from itertools import islice
from pathlib import Path
from typing import Annotated

import anyio.from_thread
import uvicorn
from fastapi import Depends, FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.trustedhost import TrustedHostMiddleware
from fastapi.responses import HTMLResponse, PlainTextResponse
from torch import Tensor

from pml_drsl.checks import InputError
from pml_drsl.console import say
from torchreid_ext.evaluation.page import filled, sections, whole
from torchreid_ext.images import Row, in_name
from torchreid_ext.pixels import read_image
from torchreid_ext.search.gallery import Match
from torchreid_ext.search.searcher import Searcher, caption, rankings
from torchreid_ext.search.sources import shown

MEGABYTES, MEGAPIXELS = 20, 50  # A larger photo is refused before it is read whole, or decoded.
MOST = 500  # results on one page at most: each is a picture in it
_HEADERS = {"Cache-Control": "no-store"}  # Photos and faces stay out of the browser's cache too.


def application(searcher: Searcher, rerank: bool = False, top: int = 10, hosts: Sequence[str] = ("*",)) -> FastAPI:
    """The page (``GET /``) and its search (``POST /search``, with the photo's file as the body).

    The gallery's cameras and folders are read once, here. The page asks for ``top`` results, >= 1, at first. ``hosts``
    are the names of this server that a browser may use; all others are refused."""
    entries = searcher.gallery.entries
    cameras = {_printable(camera): camera for camera in sorted({entry.camera for entry in entries} - {""})}
    of_images = sorted({os.path.dirname(row.path) for row in entries} - {""})
    folders = {_printable(shown(folder)): os.path.join(folder, "") for folder in of_images}
    limits = {"MEGABYTES": [str(MEGABYTES)], "MOST": [str(MOST)], "TOP": [str(min(top, MOST))]}
    choices = [_choice("Camera", "camera", cameras), _choice("Folder, with those in it", "folder", folders)]
    form = b"".join(filled("search/serve.html", {**limits, "CHOICES": choices})).decode()
    policy = {"POLICY": [" blob:; connect-src 'self'"], "HEAD": [form], "BODY": []}
    page = b"".join(whole("Search by photo", caption(searcher, rerank), policy))
    alone = threading.Lock()  # One photo is decoded at a time, which bounds the memory.

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    # Another site cannot make its own name stand for this machine, and read the gallery with its visitor's browser.
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts), www_redirect=False)

    @app.exception_handler(InputError)
    async def refused(_: Request, error: InputError) -> PlainTextResponse:
        return PlainTextResponse(_printable(str(error)), 400, _HEADERS)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> PlainTextResponse:
        first = error.errors()[0]
        return PlainTextResponse(f"{first['loc'][-1]}: {first['msg']}", 400, _HEADERS)

    @app.get("/")
    async def home() -> HTMLResponse:
        return HTMLResponse(page, headers=_HEADERS)

    @app.post("/search")
    def search(
        request: Request,
        photo: Annotated[bytes, Depends(_received)],
        name: str = "photo",
        top: Annotated[int, Query(ge=1, le=MOST)] = 10,
        crop: Annotated[list[int] | None, Query(min_length=4, max_length=4)] = None,
        camera: str = "",
        folder: str = "",
        others: bool = False,
    ) -> HTMLResponse:
        for given, known in ((camera, cameras), (folder, folders)):
            if given and given not in known:
                raise InputError(f"no image of the gallery is of {given!r}")

        def wanted(match: Match) -> bool:
            return (
                (not camera or match.camera == cameras[camera])
                and (not folder or match.name.startswith(folders[folder]))
                and not (others and _holds(match.name, photo))
            )

        with alone:
            if anyio.from_thread.run(request.is_disconnected):  # The page asks anew at every drag of the box.
                raise InputError("the browser waits for another search")
            image = read_image(photo, MEGAPIXELS)
            box = (crop[0], crop[1], crop[2], crop[3]) if crop else None
            matches = _nearest(searcher, searcher.extract(image, box), top, rerank, wanted)
            (row,) = rankings([Row(name, *(in_name(searcher.names, name) or ()))], box, [matches])
            found = "".join(sections([replace(row, query=replace(row.query, image=image))]))
        return HTMLResponse(_printable(found), headers=_HEADERS)

    return app


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens at a port, 0 for a free one; InputError where that cannot be."""
    try:
        if not 0 <= port <= 65535:
            raise OSError(0, "a port is from 0 to 65535")
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family)
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        cure = "give another port, or --serve 0 for a free one, and a --host of this machine"
        raise InputError(f"cannot listen at port {port} of {host!r} ({reason}): {cure}") from error


def serve(listener: socket.socket, searcher: Searcher, rerank: bool = False, top: int = 10) -> None:
    """Serves :func:`application` at a socket of :func:`listen` until Ctrl-C, and says where on stdout."""
    address, port = listener.getsockname()[:2]
    # Before version 1, starlette took the address [::1]:7861 for the name "[".
    hosts = ["localhost", address, f"[{address}]", "["]
    if not ipaddress.ip_address(address).is_loopback:
        hosts = ["*"]
        say("Anyone in the network can search this gallery and see its pictures", sys.stderr)
    app = application(searcher, rerank, top, hosts)
    say(f"Search at http://{f'[{address}]' if ':' in address else address}:{port} (Ctrl-C ends)")
    sys.stdout.flush()
    config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=1)
    with contextlib.suppress(KeyboardInterrupt):
        uvicorn.Server(config).run([listener])


async def _received(request: Request) -> bytes:
    data = bytearray()
    try:
        async for part in request.stream():
            data += part
            if len(data) > MEGABYTES * 1e6:
                raise InputError(f"the photo has more than {MEGABYTES} megabytes: make it smaller")
    except InputError:
        raise
    except Exception as error:  # The browser has gone, for which starlette has an error that fastapi does not export.
        raise InputError("the photo was not sent whole: send it again") from error
    return bytes(data)


def _nearest(
    searcher: Searcher, feature: Tensor, top: int, rerank: bool, wanted: Callable[[Match], bool]
) -> list[Match]:
    """The nearest ``top`` images that are wanted, ranked among themselves; InputError if there is none."""
    # The first few are enough, unless a choice leaves most of the gallery out.
    for count in [len(searcher)] if rerank else [2 * top, len(searcher)]:
        matches = searcher.search_features(feature, max(count, 1), rerank)[0]
        chosen = list(islice(filter(wanted, matches), top))
        if len(chosen) == top:
            break
    if not chosen:
        raise InputError("no other image of the gallery is of this camera and folder")
    return [replace(match, rank=rank) for rank, match in enumerate(chosen, 1)]


def _holds(path: str, data: bytes) -> bool:
    try:
        return os.path.getsize(path) == len(data) and Path(path).read_bytes() == data
    except OSError:  # An index may outlive its images, and a name given in Python is no file.
        return False


def _printable(text: str) -> str:
    """The text as a page of UTF-8 shows it: a name may hold bytes that are none."""
    return text.encode("utf-8", "backslashreplace").decode()


def _choice(label: str, name: str, values: Iterable[str]) -> str:
    options = [f'<option value="{escape(value)}">{escape(value)}</option>' for value in values]
    every = '<option value="">all</option>'
    return f'<label>{label} <select name="{name}">{every}{"".join(options)}</select></label>' if options else ""
