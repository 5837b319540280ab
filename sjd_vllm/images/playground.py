"""GET /playground: one page to make pictures with, which calls the images API as any other client does.

The page holds no secret, so it is open; what it calls is under /v1 and takes the key that the user types into it.
"""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from importlib.resources import files

from fastapi import Request
from fastapi.responses import HTMLResponse

PAGE_ROUTE = "/playground"
# Joined in this order into one script.
_SCRIPTS = ("format.js", "settings.js", "api.js", "map.js", "cards.js", "player.js", "page.js")


async def playground_page(_: Request) -> HTMLResponse:
    """The page. Its policy allows the script and the style in it, pictures in data, and calls to this server."""
    html, policy = _page()
    headers = {
        "content-security-policy": policy,
        "cache-control": "no-cache",
        "referrer-policy": "no-referrer",
        "x-content-type-options": "nosniff",
    }
    return HTMLResponse(html, headers=headers)


@cache
def _page() -> tuple[str, str]:
    """The whole page and its content security policy."""
    folder = files("sjd_vllm.images") / "playground_page"
    style = (folder / "page.css").read_text(encoding="utf-8")
    script = "\n".join((folder / name).read_text(encoding="utf-8") for name in _SCRIPTS)
    html = (folder / "page.html").read_text(encoding="utf-8")
    html = html.replace("/* STYLE */", style).replace("/* SCRIPT */", script)
    policy = (
        f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; img-src data: blob:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return html, policy


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
