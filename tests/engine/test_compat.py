"""Contract with vLLM: every private name that is used still exists."""

from __future__ import annotations

import pytest

from sjd_vllm.engine.compat import PRIVATE_NAMES, PrivateName, require_supported_vllm


@pytest.mark.parametrize("private", PRIVATE_NAMES, ids=lambda private: private.name)
def test_private_name_exists(private: PrivateName) -> None:
    assert private.resolve() is not None


def test_a_moved_name_is_named() -> None:
    with pytest.raises(AttributeError, match="_was_moved"):
        PrivateName("vllm.v1.request", "Request._was_moved", "none").resolve()


def test_other_releases_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm

    require_supported_vllm()
    monkeypatch.setattr(vllm, "__version__", "9.33.1")
    with pytest.raises(RuntimeError, match=r"9\.33\.1"):
        require_supported_vllm()
