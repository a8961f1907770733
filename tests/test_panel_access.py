"""The panel's gate: who gets through, by request, by file and by websocket."""

import asyncio
from http.cookies import SimpleCookie
from urllib.parse import urlsplit

import pytest

pytest.importorskip("starlette")

from ldm4ts_kernels.data import OptionError
from ldm4ts_kernels.panel.access import AccessGate, check_exposure, is_loopback

TOKEN = "correct horse"


async def application(scope, _receive, send):
    if scope["type"] == "websocket":
        await send({"type": "websocket.accept"})
    else:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"inside"})


def ask(gate: AccessGate, path: str = "/", kind: str = "http", **headers: str) -> tuple[str, dict]:
    """Return what the gate answers: a status or a websocket message's type, and the headers."""
    parts = urlsplit(path)
    given = {"host": "127.0.0.1:8080", **headers}
    scope = {
        "type": kind,
        "method": "GET",
        "path": parts.path,
        "query_string": parts.query.encode(),
        "headers": [(name.encode(), value.encode()) for name, value in given.items()],
    }
    sent: list[dict] = []

    async def send(message: dict) -> None:
        sent.append(message)

    async def receive() -> dict:
        return {"type": "http.request"}

    asyncio.run(gate(scope, receive, send))
    found = {name.decode(): value.decode() for name, value in sent[0].get("headers", [])}
    return str(sent[0].get("status", sent[0]["type"])), found


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.8.8.8"])
def test_this_machines_own_addresses_need_no_token(host):
    assert is_loopback(host)
    check_exposure(host, None)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org"])
def test_any_other_address_needs_one(host):
    with pytest.raises(OptionError, match="--token"):
        check_exposure(host, None)
    check_exposure(host, TOKEN)


@pytest.mark.parametrize("token", ["", "short"])
def test_a_token_that_is_soon_guessed_is_refused(token):
    with pytest.raises(OptionError, match="at least 8 characters"):
        check_exposure("0.0.0.0", token)


@pytest.mark.parametrize("kind", ["http", "websocket"])
@pytest.mark.parametrize("path", ["/", "/_nicegui_ws/socket.io/", "/_nicegui/3/static/x.js"])
def test_without_the_token_nothing_is_served(kind, path):
    gate = AccessGate(application, TOKEN, 8080)
    refused = "401" if kind == "http" else "websocket.close"
    for wrong in ("", "?token=wrong", "?token=", "?token=correct%20hors%C3%A9"):
        assert ask(gate, path + wrong, kind)[0] == refused
    for header in ({"cookie": "ldm4ts_panel_8080=guess"}, {"authorization": "Bearer wrong"}):
        assert ask(gate, path, kind, **header)[0] == refused


def test_the_token_becomes_a_cookie_and_leaves_the_address():
    gate = AccessGate(application, TOKEN, 8080)
    status, headers = ask(gate, "/?tab=x&token=correct%20horse")
    assert (status, headers["location"]) == ("303", "/?tab=x")
    (cookie,) = SimpleCookie(headers["set-cookie"]).values()
    assert cookie["httponly"] and cookie["samesite"] == "strict"
    assert TOKEN not in headers["set-cookie"]
    sent_back = f"{cookie.key}={cookie.value}"
    assert ask(gate, "/", cookie=sent_back)[0] == "200"
    assert ask(gate, "/ws", "websocket", cookie=sent_back)[0] == "websocket.accept"
    other = AccessGate(application, TOKEN, 8080)
    assert ask(other, "/", cookie=sent_back)[0] == "401"


def test_a_script_may_send_the_token_as_a_header():
    gate = AccessGate(application, TOKEN, 8080)
    assert ask(gate, "/", authorization=f"Bearer {TOKEN}")[0] == "200"


@pytest.mark.parametrize("token", [None, TOKEN])
@pytest.mark.parametrize("kind", ["http", "websocket"])
def test_another_pages_requests_are_refused(token, kind):
    gate = AccessGate(application, token, 8080)
    header = {"origin": "http://evil.example", "authorization": f"Bearer {TOKEN}"}
    assert ask(gate, "/", kind, **header)[0] in ("403", "websocket.close")


def test_a_name_that_was_rebound_to_this_machine_is_refused():
    gate = AccessGate(application, None, 8080)
    assert ask(gate, "/", host="evil.example:8080")[0] == "403"
    assert ask(gate, "/", host="localhost:8080", origin="http://localhost:8080")[0] == "200"


def test_the_browser_is_told_to_load_nothing_from_elsewhere():
    _, headers = ask(AccessGate(application, None, 8080))
    assert headers["content-security-policy"].startswith("default-src 'self'")
    assert "http" not in headers["content-security-policy"]
