"""Bad requests: bodies with odd values, broken bytes, broken HTTP; most are nearly good. The same for a seed."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from typing import Any

GOOD_BODY: dict[str, Any] = {
    "prompt": "a calm lake",
    "n": 1,
    "size": "auto",
    "seed": 7,
    "guidance_scale": 2.0,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 0.9,
    "negative_prompt": "night",
    "output_format": "jpeg",
    "output_compression": 90,
    "stream": False,
    "partial_images": 0,
    "response_format": "b64_json",
    "background": "opaque",
    "quality": "auto",
    "moderation": "low",
    "user": "me",
    "sjd": {"method": "sjd", "num_speculative_tokens": 8, "redraft": "gumbel", "first_guess": "uniform"},
}
_CONTENT_TYPES = ("application/json", "application/json; charset=utf-16", "text/plain", "", "multipart/form-data")
_ODD_VALUES: tuple[Any, ...] = (
    None,
    True,
    0,
    -1,
    3,
    2**31,
    2**63,
    -(2**63) - 1,
    10**400,
    0.0,
    -0.5,
    1e-320,
    1e308,
    float("inf"),
    float("-inf"),
    float("nan"),
    "",
    " ",
    "7",
    "\0",
    "\ud800",
    "é🏔️" * 50,
    "a" * 40_000,
    "/etc/passwd",
    "file:///etc/passwd",
    "http://127.0.0.1:1/picture.png",
    "../../../etc/passwd",
    "96x96",
    "0x0",
    "99999999999x1",
    "coupled",
    "reuse",
    [],
    [1, 2],
    {},
    {"a": {"b": []}},
    "\r\nx-injected: 1",
)


@dataclass(frozen=True)
class FuzzInput:
    """One request.

    Attributes:
        kind: which of the generators made it.
        content_type, body: as sent.
        is_raw: the body is everything that goes to the socket, the request line included.
        abort_after: bytes of the answer after which the client goes away, or None.
    """

    kind: str
    content_type: str
    body: bytes
    is_raw: bool = False
    abort_after: int | None = None


def fuzz_input(seed: int) -> FuzzInput:
    """The input of a seed."""
    choose = random.Random(seed)
    kind = choose.choices(("values", "fields", "bytes", "nested", "stream", "http"), (40, 15, 25, 5, 5, 10))[0]
    if kind == "http":
        return FuzzInput(kind, "", _broken_http(choose), is_raw=True)
    content_type = choose.choice(_CONTENT_TYPES) if choose.random() < 0.05 else _CONTENT_TYPES[0]
    abort_after = None
    if kind == "stream":
        body = {"prompt": "a lake", "seed": seed, "stream": True, "partial_images": choose.randrange(4)}
        abort_after = choose.choice([0, 1, 100, 10_000, None])
        data = json.dumps(body).encode()
    elif kind == "nested":
        depth = choose.choice([10, 1000, 100_000])
        data = choose.choice([b"[" * depth, b'{"prompt":' * depth, b"[" * depth + b"]" * depth])
    else:
        body = dict(GOOD_BODY)
        if kind == "fields":
            _odd_fields(choose, body)
        elif kind == "values":
            _odd_values(choose, body)
        # surrogates and NaN are written as JSON's grammar or Python's leniency has it
        data = json.dumps(body, ensure_ascii=True).encode()
        if kind == "bytes":
            data = _broken_bytes(choose, data)
    return FuzzInput(kind, content_type, data, abort_after=abort_after)


def _odd_values(choose: random.Random, body: dict[str, Any]) -> None:
    for name in choose.sample(list(body), choose.randint(1, 3)):
        if name == "sjd" and choose.random() < 0.8:
            body["sjd"] = {**body["sjd"], choose.choice(list(body["sjd"])): choose.choice(_ODD_VALUES)}
        else:
            body[name] = choose.choice(_ODD_VALUES)


def _odd_fields(choose: random.Random, body: dict[str, Any]) -> None:
    for name in choose.sample(list(body), choose.randint(0, len(body))):
        del body[name]
    for name in ("image", "mask", "image_url", "model", "style", "__class__", "", "prompt_token_ids", "\ud800", "svg"):
        if choose.random() < 0.2:
            body[name] = choose.choice(_ODD_VALUES)


def _broken_bytes(choose: random.Random, data: bytes) -> bytes:
    broken = bytearray(data)
    for _ in range(choose.choice([1, 2, 5, 50])):
        at = choose.randrange(len(broken))
        change = choose.randrange(4)
        if change == 0:
            broken[at] ^= 1 << choose.randrange(8)
        elif change == 1:
            del broken[at : at + choose.randint(1, 20)]
        elif change == 2:
            broken[at:at] = choose.randbytes(choose.randint(1, 20))
        else:
            broken[at:at] = broken[max(0, at - 30) : at]
        if not broken:
            break
    return bytes(broken)


def _broken_http(choose: random.Random) -> bytes:
    body = json.dumps({**GOOD_BODY, "n": -1}).encode()
    length = choose.choice([str(len(body)), "0", "-1", "abc", "99999999999", str(len(body) + 5), ""])
    headers = {
        "host": "127.0.0.1",
        "content-type": "application/json",
        "content-length": length,
        "connection": choose.choice(["close", "keep-alive", "upgrade"]),
    }
    if choose.random() < 0.3:
        headers["transfer-encoding"] = choose.choice(["chunked", "gzip", "chunked, chunked"])
    if choose.random() < 0.3:
        headers[choose.choice(["x" * 1000, "x-odd", "expect", "authorization"])] = choose.choice(["100-continue", "\0"])
    method = choose.choice(["POST"] * 6 + ["GET", "PUT", "post", "", "\0"])
    path = choose.choice(["/v1/images/generations"] * 6 + ["/v1/images/../../etc/passwd", "/v1/images/%00", "//"])
    head = f"{method} {path} HTTP/1.1\r\n" + "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    data = head.encode("latin-1") + b"\r\n" + body
    return _broken_bytes(choose, data) if choose.random() < 0.5 else data
