"""Who may use the panel: this machine alone, or who knows the token; from its own pages.

An ASGI middleware around everything that is served, so that no request, file or websocket goes by.
"""

import hmac
import ipaddress
import secrets
from collections.abc import MutableMapping
from http.cookies import SimpleCookie
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from ldm4ts_kernels.data import OptionError

SHORTEST_TOKEN = 8
# The browser, too, is told to load nothing from elsewhere; Vue compiles its templates by eval.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; "
    "frame-ancestors 'none'"
)


def check_exposure(host: str, token: str | None) -> None:
    """Raise OptionError where host lets other machines in and no token is asked for."""
    if token is not None and len(token) < SHORTEST_TOKEN:
        raise OptionError(f"token: expected at least {SHORTEST_TOKEN} characters, got {len(token)}")
    if token is None and not is_loopback(host):
        raise OptionError(
            f"token: --host {host} lets other machines in; give a --token that they must know"
        )


def is_loopback(host: str) -> bool:
    """Say whether host names this machine only; a name other than localhost is not looked up."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class AccessGate:
    """Lets a request through to the app, or answers it with 401 or 403.

    With a token: it comes once as `?token=...`, is exchanged for a cookie that scripts cannot read,
    and the page is reloaded without it; or as `Authorization: Bearer ...`. Without one, the Host
    header must be this machine's, which keeps out names that were rebound to it. In both cases an
    Origin header must be the panel's own, so that no other page opens a websocket here.
    """

    def __init__(self, app: ASGIApp, token: str | None, port: int) -> None:
        self.app, self.token = app, token
        self.cookie = f"ldm4ts_panel_{port}"  # cookies are shared by the ports of a host
        self.session = secrets.token_urlsafe(32)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        answer = self._answer(scope)
        if answer is None:
            await self.app(scope, receive, _with_policy(send))
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008, "reason": "not allowed"})
        else:
            await answer(scope, receive, _with_policy(send))

    def _answer(self, scope: Scope) -> Response | None:
        """Return None for a request that may pass, else the answer to it."""
        headers = Headers(scope=scope)
        host, origin = headers.get("host", ""), headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != host:
            return PlainTextResponse("The panel answers its own pages only.\n", 403)
        if self.token is None:
            if is_loopback(urlsplit(f"//{host}").hostname or ""):
                return None
            return PlainTextResponse("The panel answers this machine's own names only.\n", 403)
        if self._has_session(headers):
            return None
        query = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
        given = dict(query).get("token")
        if given is None or not _same(given, self.token):
            return PlainTextResponse("Open the panel as http://HOST:PORT/?token=TOKEN\n", 401)
        rest = urlencode([item for item in query if item[0] != "token"])
        answer = RedirectResponse(scope["path"] + (f"?{rest}" if rest else ""), 303)
        answer.set_cookie(self.cookie, self.session, httponly=True, samesite="strict")
        return answer

    def _has_session(self, headers: Headers) -> bool:
        kind, _, bearer = headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer" and _same(bearer, self.token or ""):
            return True
        cookie = SimpleCookie(headers.get("cookie", "")).get(self.cookie)
        return cookie is not None and _same(cookie.value, self.session)


def _same(given: str, expected: str) -> bool:
    """Compare in a time that does not tell how much of it is right."""
    return hmac.compare_digest(given.encode(), expected.encode())


def _with_policy(send: Send) -> Send:
    async def add_headers(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            headers["Content-Security-Policy"] = POLICY
            headers["Referrer-Policy"] = "no-referrer"
            headers["X-Content-Type-Options"] = "nosniff"
        await send(message)

    return add_headers
