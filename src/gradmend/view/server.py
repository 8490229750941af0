"""The server of the live view: on this machine only, for who knows the address, and for reading only."""

from __future__ import annotations

import json
import re
import secrets
import socket
import webbrowser
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Final

import uvicorn
from plotly.offline import get_plotlyjs
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from gradmend.errors import GradmendError
from gradmend.report.page import content, render
from gradmend.view.live import Live

HOST: Final = "127.0.0.1"
_HERE: Final = Path(__file__).parent
_PLOTLY: Final = f"plotly-{version('plotly')}.js"

_HEADERS: Final = {
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}
_POLICY: Final = (
    "default-src 'none'; script-src 'self' 'nonce-{nonce}'; style-src 'self' 'nonce-{nonce}'; "
    "style-src-attr 'unsafe-inline'; connect-src 'self'; img-src data: blob:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
"""Scripts and style sheets are ours only; plotly places what it draws by attributes of style."""

_OWN: Final = '<link rel="stylesheet" href="live.css">'

_EXPENSIVE: Final = 5.0
"""The page asks again after so many times as long as its content took to make, and a second at least."""


def run(paths: Sequence[Path], port: int, browse: bool, told: Callable[[str], None]) -> None:
    """As `gradmend.view.serve`, which says what to install where this cannot be imported."""
    live, token = Live(paths), secrets.token_urlsafe(24)
    with _listening(port) as listening:
        port = listening.getsockname()[1]
        address = f"http://{HOST}:{port}/{token}/"
        told(f"{address} shows {', '.join(map(str, paths))}. Ctrl-C ends it.")
        if browse:
            webbrowser.open(address)
        config = uvicorn.Config(
            application(live, token, port), log_level="critical", access_log=False, server_header=False,
            lifespan="off", timeout_graceful_shutdown=1,
        )  # fmt: skip
        with suppress(KeyboardInterrupt):
            uvicorn.Server(config).run([listening])
    live.close()


def application(live: Live, token: str, port: int) -> Starlette:
    """What answers requests.

    Args:
        live: makes the content.
        token: that addresses begin with; without it there is nothing.
        port: that is listened on: requests that were sent to another name are of no page of ours.
    """
    hosts = {f"{name}:{port}" for name in (HOST, "localhost")}
    found: dict[str, Callable[[Request], Response]] = {
        "": lambda _: _page(live),
        "content": lambda request: _content(live, request),
        _PLOTLY: lambda _: _file(get_plotlyjs(), "text/javascript", forever=True),
        "live.css": lambda _: _file((_HERE / "live.css").read_text("utf-8"), "text/css"),
    }

    def answer(request: Request) -> Response:
        given, slash, name = request.path_params["path"].partition("/")
        known = secrets.compare_digest(given.encode(), token.encode()) and slash
        if request.headers.get("host") not in hosts or not known or name not in found:
            return Response("There is nothing here.", 404, _HEADERS)
        if request.method != "GET":
            return Response("This can only be read.", 405, {**_HEADERS, "Allow": "GET"})
        return found[name](request)

    methods = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"]
    return Starlette(routes=[Route("/{path:path}", answer, methods=methods)])


def _page(live: Live) -> Response:
    """The page as it is now, and the script that keeps it so."""
    nonce = secrets.token_urlsafe(16)
    made = live.content()
    script = (_HERE / "live.js").read_text("utf-8")
    sheets = "".join(f'<style id="{id}" nonce="{nonce}"></style>' for id in _sheets())
    html = render(made.page, plotly=_PLOTLY, nonce=nonce, more=script, head=f"{sheets}{_OWN}")
    policy = {"Content-Security-Policy": _POLICY.format(nonce=nonce)}
    return Response(html, 200, _HEADERS | policy, "text/html")


@cache
def _sheets() -> tuple[str, ...]:
    """The style sheets that plotly makes unless there are any of these ids; it may not make some itself."""
    return ("plotly.js-style-global", *re.findall(r'getElementById\("([0-9a-f]{64})"\)', get_plotlyjs()))


def _content(live: Live, request: Request) -> Response:
    """What is shown, unless the browser has it."""
    begun = perf_counter()
    made = live.content([key for key in request.query_params.get("runs", "").split(",") if key])
    headers = {**_HEADERS, "Cache-Control": "no-cache", "ETag": f'"{made.tag}"'}
    if request.headers.get("if-none-match") == headers["ETag"]:
        return Response(None, 304, headers)
    told = {**content(made.page), **made.about}
    told["rest"] = max(1.0, _EXPENSIVE * (perf_counter() - begun))
    return Response(json.dumps(told), 200, headers, "application/json")


def _file(text: str, kind: str, forever: bool = False) -> Response:
    kept = {"Cache-Control": "private, max-age=31536000, immutable"} if forever else {}
    return Response(text, 200, _HEADERS | kept, kind)


def _listening(port: int) -> socket.socket:
    try:
        return socket.create_server((HOST, port))
    except OSError as error:
        raise GradmendError(
            f"Port {port} of {HOST} cannot be used: {error}. Name another one, or none."
        ) from None
