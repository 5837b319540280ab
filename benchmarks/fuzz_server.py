"""Bad input on `sjd-vllm serve`: thousands of odd requests, then schemathesis over the routes that OpenAPI describes.

Promises, each checked; the exit code is 1 if one is broken: no answer of 500 or above; every request is answered or its
connection closed in time; after each batch a good request gives the same picture as before; and at the end no
request, KV block, open file or thread is left, and the server holds no more memory. A row goes to
results/fuzz_server.csv.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
from fuzz_inputs import FuzzInput, fuzz_input
from live import LiveServer, live_server

from sjd_vllm.images.flags import Parser
from sjd_vllm.images.machine import provenance
from sjd_vllm.images.rows import append_rows, rounded

RESULTS = Path(__file__).parent / "results" / "fuzz_server.csv"
ROUTE = "/v1/images/generations"
NUM_AT_ONCE = 16
BATCH = 500  # inputs between two good requests
MAX_SECONDS = 60  # for one input; the server gives up on half a body sooner
CLIENT_SECONDS = 5  # of the server's patience
MAX_GROWTH = 0.1  # of the memory, from a fifth of the inputs to the end


class Fuzzer:
    """Sends inputs and keeps what is wrong."""

    def __init__(self, server: LiveServer, http: httpx.AsyncClient) -> None:
        self._server = server
        self._http = http
        self.statuses: Counter[str] = Counter()
        self.faults: list[str] = []

    async def good_picture(self) -> str:
        """What a good request is answered, always the same."""
        answer = await self._http.post(ROUTE, json={"prompt": "a calm lake", "seed": 7})
        answer.raise_for_status()
        picture: str = answer.json()["data"][0]["b64_json"]
        return picture

    async def send_all(self, seeds: range) -> None:
        """The inputs of the seeds, some at a time."""
        waiting = iter(seeds)

        async def worker() -> None:
            for seed in waiting:
                await self._send(seed)

        await asyncio.gather(*(worker() for _ in range(NUM_AT_ONCE)))

    async def _send(self, seed: int) -> None:
        given = fuzz_input(seed)
        try:
            async with asyncio.timeout(MAX_SECONDS):
                status = await (self._send_raw(given) if given.is_raw else self._post(given))
        except TimeoutError:
            status = "hangs"
        self.statuses[status] += 1
        if status == "hangs" or status.startswith("5"):
            self.faults.append(f"input {seed} ({given.kind}): {status}: {given.body[:300]!r}")

    async def _post(self, given: FuzzInput) -> str:
        headers = {"content-type": given.content_type}
        async with self._http.stream("POST", ROUTE, content=given.body, headers=headers) as answer:
            received = 0
            last = b""
            async for chunk in answer.aiter_bytes():
                received += len(chunk)
                last = (last + chunk)[-2000:]
                if given.abort_after is not None and received >= given.abort_after:
                    return "aborted"
            if b"event: error" in last:
                return "500 in a stream"
            return str(answer.status_code)

    async def _send_raw(self, given: FuzzInput) -> str:
        """Broken HTTP over a bare socket; the client then says that it sends no more."""
        address = httpx.URL(self._server.url)
        reader, writer = await asyncio.open_connection(address.host, address.port)
        try:
            writer.write(given.body)
            await writer.drain()
            writer.write_eof()
            line = (await reader.readline()).decode("latin-1").split()
            return line[1] if len(line) > 1 else "closed"
        except ConnectionError:
            return "closed"
        finally:
            writer.close()


async def fuzz(server: LiveServer, num_inputs: int, first_seed: int) -> dict[str, Any]:
    """Send them; returns counts, what is wrong, and memory, open files and threads before and after."""
    limits = httpx.Limits(max_connections=NUM_AT_ONCE)
    async with httpx.AsyncClient(base_url=server.url, timeout=2 * MAX_SECONDS, limits=limits) as http:
        fuzzer = Fuzzer(server, http)
        good = await fuzzer.good_picture()
        memory: list[int] = []
        handles: list[int] = []
        for start in range(0, num_inputs, BATCH):
            seeds = range(first_seed + start, first_seed + min(start + BATCH, num_inputs))
            await fuzzer.send_all(seeds)
            if await fuzzer.good_picture() != good:
                fuzzer.faults.append(f"another picture after input {seeds[-1]}")
            memory.append(server.resident_bytes())
            handles.append(server.num_handles())
            print(start + len(seeds), dict(fuzzer.statuses), f"{memory[-1] >> 20} MB", flush=True)
    return {"statuses": fuzzer.statuses, "faults": fuzzer.faults, "memory": memory, "handles": handles}


def schemathesis(server: LiveServer, num_examples: int) -> tuple[int, str]:
    """Exit code and output of schemathesis over our routes."""
    command = [Path(sys.executable).parent / "schemathesis", "run", f"{server.url}/openapi.json", "--no-color"]
    settings = {
        "include-path-regex": "^/v1/images/",
        "checks": "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance",
        "max-examples": num_examples,
        "request-timeout": MAX_SECONDS,
        "suppress-health-check": "all",
        "seed": 0,
        "mode": "all",
    }
    flags = [f"--{name}={value}" for name, value in settings.items()]
    done = subprocess.run([*command, *flags], capture_output=True, text=True, timeout=1800)
    return done.returncode, done.stdout + done.stderr


def main() -> int:
    """Run, check, append a row."""
    args = _parse_args()
    taken_on = provenance()
    log = Path(tempfile.mkdtemp()) / "server.log"
    with live_server(["--client-timeout", str(CLIENT_SECONDS)], log) as server:
        seen = asyncio.run(fuzz(server, args.inputs, args.seed))
        code, told = schemathesis(server, args.examples)
        left = server.left_after(30)
        is_alive = httpx.get(server.url + "/health").status_code == 200
    memory, handles = seen["memory"], seen["handles"]
    early = len(memory) // 5
    growth = memory[-1] / memory[early] - 1
    row = {
        **taken_on,
        "inputs": args.inputs,
        "first_seed": args.seed,
        "answers": json.dumps(dict(sorted(seen["statuses"].items()))),
        "faults": len(seen["faults"]),
        "schemathesis_examples": args.examples,
        "schemathesis_exit_code": code,
        "memory_mb_at_fifth": memory[early] >> 20,
        "memory_mb_at_end": memory[-1] >> 20,
        "memory_growth": rounded(growth),
        "handles_at_fifth": handles[early],
        "handles_at_end": handles[-1],
        "left": sum(left.values()),
    }
    append_rows(args.output, [row])
    print(json.dumps(row, indent=2))
    broken = seen["faults"][:20]
    if code:
        broken.append(f"schemathesis ended with {code}:\n{told[-6000:]}")
    if any(left.values()) or not is_alive:
        broken.append(f"left at the end: {left}, healthy: {is_alive}")
    if growth > MAX_GROWTH or handles[-1] > handles[early] + NUM_AT_ONCE:
        broken.append(f"memory grew by {growth:.1%}, open files and threads from {handles[early]} to {handles[-1]}")
    print("\n".join(broken) or "every promise was kept", f"\nserver's log: {log}")
    return 1 if broken else 0


def _parse_args() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0, help="of the first input; the next ones count on")
    parser.add_argument("--examples", type=int, default=50, help="of schemathesis, for each route and phase")
    parser.add_argument("--output", type=Path, default=RESULTS, help="CSV file to append to")
    args: argparse.Namespace = parser.parse_args()
    return args


if __name__ == "__main__":
    sys.exit(main())
