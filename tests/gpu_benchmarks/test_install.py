"""The set-up: what is missing, from a folder of wheels, and how such a folder is made."""

from __future__ import annotations

import base64
import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from benchmarks.gpu.install import SetupError, environment, install_wheels, installed, unmet
from benchmarks.gpu.wheels import needs, read_versions, slim


def make_wheel(folder: Path, name: str, files: dict[str, str], requires: tuple[str, ...] = ()) -> Path:
    """A wheel of version 1.0."""
    info = f"{name}-1.0.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"
    metadata += "".join(f"Requires-Dist: {requirement}\n" for requirement in requires)
    files = {
        **files,
        f"{info}/METADATA": metadata,
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    wheel = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as out:
        for path, content in files.items():
            out.writestr(path, content)
        out.writestr(f"{info}/RECORD", "".join(f"{path},,\n" for path in [*files, f"{info}/RECORD"]))
    return wheel


def test_what_is_unmet() -> None:
    found = {"numpy": "2.0", "old": "1.0"}
    requirements = ["numpy>=1", "old>=2", "Gone_Pack.age", "torch==2.13.0", "flashinfer-python", 'odd; extra == "x"']
    requirements.append('windows-only; sys_platform == "win32"')
    assert unmet(requirements, found, {"sys_platform": "linux"}) == ["Gone_Pack.age", "old>=2"]


def test_wheels_are_installed_beside(tmp_path: Path) -> None:
    wheels, site = tmp_path / "wheels", tmp_path / "site"
    wheels.mkdir()
    # its need is not there, and is not asked for
    make_wheel(wheels, "sjd_made_up", {"sjd_made_up.py": "VALUE = 7\n"}, ("surely-not-there==9",))
    install_wheels([wheels], site)
    assert installed(site, only_site=True) == {"sjd-made-up": "1.0"}
    code = "import sjd_made_up; print(sjd_made_up.VALUE)"
    done = subprocess.run([sys.executable, "-c", code], env=environment(site), capture_output=True, text=True)
    assert done.stdout == "7\n", done.stderr
    written = (site / "sjd_made_up.py").stat().st_mtime_ns
    install_wheels([wheels], site)
    assert (site / "sjd_made_up.py").stat().st_mtime_ns == written


def test_an_empty_folder_is_told(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="there are no wheels"):
        install_wheels([tmp_path], tmp_path / "site")


def test_slim_wheels_have_what_a_dense_model_uses(tmp_path: Path) -> None:
    kept = {
        "vllm/__init__.py": "",
        "vllm/_C_stable_libtorch.abi3.so": "kept",
        "vllm/vllm_flash_attn/__init__.py": "",
        "vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so": "for Hopper",
    }
    dropped = {
        "vllm/_moe_C.abi3.so": "",
        "vllm/vllm-rs": "",
        "vllm/third_party/deep_gemm/include/cute.hpp": "",
        "vllm/vllm_flash_attn/_vllm_fa2_C.abi3.so": "for older GPUs",
    }
    whole = make_wheel(tmp_path, "vllm", {**kept, **dropped})
    folder, site = tmp_path / "slim", tmp_path / "site"
    folder.mkdir()
    slim(whole, folder, flash_attention="3")
    with zipfile.ZipFile(folder / whole.name) as opened:
        record = opened.read("vllm-1.0.dist-info/RECORD").decode().splitlines()
    digest = base64.urlsafe_b64encode(hashlib.sha256(b"kept").digest()).rstrip(b"=").decode()
    assert f"vllm/_C_stable_libtorch.abi3.so,sha256={digest},4" in record
    install_wheels([folder], site)
    assert installed(site, only_site=True) == {"vllm": "1.0", "vllm-attention-kernels": "1.0"}
    found = {str(path.relative_to(site)): path.read_text() for path in (site / "vllm").rglob("*") if path.is_file()}
    assert found == kept


def test_needs_of_a_folder(tmp_path: Path) -> None:
    make_wheel(tmp_path, "vllm", {"vllm/__init__.py": ""}, ("blake3", "numpy", 'tomli; python_version < "3.11"'))
    freeze = tmp_path / "freeze.txt"
    freeze.write_text("numpy==2.5.2\nPillow==12.3\n")
    wanted = needs(tmp_path, read_versions(freeze), "3.12")
    assert "blake3" in wanted
    assert not {"numpy", "pillow", "tomli"} & set(wanted)
