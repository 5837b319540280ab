"""Which of vLLM's plugins `sjd-vllm serve` lets it load."""

from __future__ import annotations

import os
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from sjd_vllm.images.serve_command import ServerSettings


def allowed() -> list[str]:
    ServerSettings().vllm_arguments()
    return os.environ["VLLM_PLUGINS"].split(",")


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "to be restored")


def test_ours_beside_all_that_vllm_would_load_by_itself(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A platform from elsewhere, for one; but no routes that the user did not ask for."""
    info = tmp_path / "elsewhere-0.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: elsewhere\nVersion: 0.0\n")
    (info / "entry_points.txt").write_text(
        "[vllm.platform_plugins]\nnew_platform = a:b\n[vllm.endpoint_plugins]\nnew_routes = a:b\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delenv("VLLM_PLUGINS")
    found = allowed()
    assert {"sjd_vllm", "new_platform"} <= set(found)
    assert {entry.name for entry in entry_points(group="vllm.general_plugins")} <= set(found)
    assert "new_routes" not in found


@pytest.mark.parametrize(("named", "expected"), [("", ["sjd_vllm"]), ("other", ["other", "sjd_vllm"])])
def test_those_that_the_user_named_and_ours(monkeypatch: pytest.MonkeyPatch, named: str, expected: list[str]) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", named)
    assert allowed() == expected
