"""Nodes are compared by what is installed on them, and a difference is named."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest

import sjd_vllm
from sjd_vllm.build import BUILD_KEY, OtherBuildError, installed_build, node_name, require_build
from sjd_vllm.demo import checkpoint_path


def test_the_same_build_is_accepted() -> None:
    build = installed_build(checkpoint_path())
    assert build["sjd-vllm"] == sjd_vllm.__version__
    assert build["checkpoint's config.json"] != ""
    require_build(build, checkpoint_path())


@pytest.mark.parametrize("name", list(installed_build("")))
def test_every_difference_names_the_node_and_itself(name: str) -> None:
    expected = {**installed_build(checkpoint_path()), name: "another"}
    with pytest.raises(OtherBuildError, match=re.escape(f"node {node_name()} ")) as refused:
        require_build(expected, checkpoint_path())
    assert f"{name} is " in str(refused.value)
    assert "'another' is expected" in str(refused.value)


def test_a_checkpoint_of_the_same_path_and_other_content_is_seen(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    expected = installed_build(tmp_path)
    (tmp_path / "config.json").write_text('{"a": 1}')
    with pytest.raises(OtherBuildError, match=r"checkpoint's config\.json"):
        require_build(expected, tmp_path)


def test_workers_compare_before_they_start() -> None:
    from sjd_vllm.engine.worker import SJDCPUWorker, SJDGPUWorker

    build = {**installed_build(checkpoint_path()), "vllm": "0.0"}
    config = SimpleNamespace(
        additional_config={BUILD_KEY: build}, model_config=SimpleNamespace(model=str(checkpoint_path()))
    )
    for kind in (SJDCPUWorker, SJDGPUWorker):
        worker = kind.__new__(kind)
        worker.vllm_config = config
        with pytest.raises(OtherBuildError, match="vllm is"):
            worker.init_device()
