"""An original Emu3 checkpoint by its path alone: vLLM's server starts without the release's code, and paints."""

from __future__ import annotations

import base64
import io
from pathlib import Path

from PIL import Image
from tiny_emu3 import make_original

from live_server import live_server


def test_the_images_api_paints_from_the_original_release(tmp_path: Path) -> None:
    path = make_original(tmp_path / "emu3")
    sjd = ["--speculative-model=[sjd]", "--num-speculative-tokens", "16"]
    limits = ["--enforce-eager", "--dtype", "float32", "--kv-cache-memory-bytes", str(64 << 20), "--max-num-seqs", "4"]
    command = ["vllm", "serve", str(path), *sjd, *limits]
    with live_server(command, tmp_path / "log", {"VLLM_PLUGINS": "sjd_vllm"}) as client:
        body = {"prompt": "a red fox", "size": "40x24", "seed": 7, "n": 2}
        answers = [client.post("/v1/images/generations", json=body).raise_for_status().json() for _ in range(2)]
        refused = client.post("/v1/images/generations", json={**body, "size": "41x24"})
    first, second = ([one["b64_json"] for one in answer["data"]] for answer in answers)
    assert first == second
    assert len(set(first)) == 2
    assert Image.open(io.BytesIO(base64.b64decode(first[0]))).size == (40, 24)
    assert refused.status_code == 400
    assert "32x32, 40x24" in refused.json()["error"]["message"]
