"""Make a folder of wheels for a machine without network: vLLM without what a dense model does not use, and its needs.

Run it where the package index can be reached. vLLM's wheel holds kernels for quantised and sparse models too; for a
dense one on one GPU it is enough to keep the Python files, `_C_stable_libtorch` and `vllm_flash_attn`. What the machine
has already is told by --have, a file as `pip list --format=freeze` writes it there. Attention's kernels get a wheel of
their own, so that the two can travel apart; they are installed in one go.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

from benchmarks.gpu.install import OURS, VLLM, normal_name, unmet

_CORE, _ATTENTION = "vllm/_C_stable_libtorch", "vllm/vllm_flash_attn/"
# Compiled, or the sources of what is compiled on demand for other models.
_COMPILED = (".so", ".h", ".hpp", ".inl", ".cu", ".cuh")
_ATTENTION_NAME = "vllm_attention_kernels"
_PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (39, 35, 34, 31, 28, 27, 24, 17)] + ["manylinux2014_x86_64"]


def main() -> None:
    """Download, slim, say how large it is."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="to put the wheels into")
    parser.add_argument("--python", default="3.12", help="version on the machine (3.12)")
    parser.add_argument("--have", type=Path, help="what is installed there: lines NAME==VERSION")
    parser.add_argument("--flash-attention", choices=("2", "3", "all"), default="all", help="kernels to keep (all)")
    parser.add_argument("--more", default="", help="further packages, comma-separated, for example xformers")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    have = read_versions(args.have) if args.have else {}
    if not list(args.folder.glob("vllm-*.whl")):
        (whole,) = _download(args.folder / "whole", args.python, VLLM)
        slim(whole, args.folder, args.flash_attention)
        whole.unlink()
        whole.parent.rmdir()
    for name in filter(None, args.more.split(",")):
        _download(args.folder, args.python, name)
    while wanted := needs(args.folder, have, args.python):
        for requirement in wanted:
            _download(args.folder, args.python, requirement)
    sizes = {wheel.name: wheel.stat().st_size for wheel in sorted(args.folder.glob("*.whl"))}
    for name, size in sizes.items():
        print(f"{size / 2**20:8.1f} MiB  {name}")
    print(f"{sum(sizes.values()) / 2**20:8.1f} MiB  in all")


def slim(whole: Path, folder: Path, flash_attention: str = "all") -> None:
    """Write vLLM's wheel without the compiled parts that are not kept, and one with those of attention."""
    dropped = {"2": "_vllm_fa3_C", "3": "_vllm_fa2_C"}.get(flash_attention)
    rest: dict[str, bytes] = {}
    attention: dict[str, bytes] = {}
    with zipfile.ZipFile(whole) as source:
        for name in source.namelist():
            is_compiled = Path(name).suffix in _COMPILED or name == "vllm/vllm-rs"
            if name.endswith("/RECORD") or (is_compiled and dropped is not None and dropped in name):
                continue
            if not is_compiled or name.startswith(_CORE):
                rest[name] = source.read(name)
            elif name.startswith(_ATTENTION):
                attention[name] = source.read(name)
    info = next(name.split("/")[0] for name in rest if name.endswith(".dist-info/METADATA"))
    _write_wheel(folder / whole.name, rest, info)
    version = whole.name.split("-")[1]
    own_info = f"{_ATTENTION_NAME}-{version}.dist-info"
    attention[f"{own_info}/METADATA"] = (
        f"Metadata-Version: 2.1\nName: {_ATTENTION_NAME}\nVersion: {version}\n"
    ).encode()
    attention[f"{own_info}/WHEEL"] = rest[f"{info}/WHEEL"]
    _write_wheel(folder / whole.name.replace("vllm-", f"{_ATTENTION_NAME}-", 1), attention, own_info)


def _write_wheel(file: Path, contents: dict[str, bytes], info: str) -> None:
    records = [f"{info}/RECORD,,"]
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as out:
        for name, content in contents.items():
            out.writestr(name, content)
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
            records.append(f"{name},sha256={digest},{len(content)}")
        out.writestr(f"{info}/RECORD", "\n".join([*records, ""]))


def needs(folder: Path, have: dict[str, str], python: str) -> list[str]:
    """Requirements of the wheels in a folder, and of ours, that neither they nor the machine meet."""
    found, requirements = dict(have), list(OURS)
    for wheel in folder.glob("*.whl"):
        name, version = wheel.name.split("-")[:2]
        found[normal_name(name)] = version
        with zipfile.ZipFile(wheel) as opened:
            metadata = next(entry for entry in opened.namelist() if entry.endswith(".dist-info/METADATA"))
            lines = opened.read(metadata).decode().splitlines()
        requirements += [line.split(": ", 1)[1] for line in lines if line.startswith("Requires-Dist: ")]
    machine = {"python_version": python, "python_full_version": f"{python}.0", "platform_machine": "x86_64"}
    return unmet(requirements, found, {**machine, "sys_platform": "linux", "platform_system": "Linux"})


def read_versions(file: Path) -> dict[str, str]:
    """Version by normalised name."""
    pairs = (line.strip().split("==", 1) for line in file.read_text().splitlines() if "==" in line)
    return {normal_name(name): version for name, version in pairs}


def _download(folder: Path, python: str, requirement: str) -> list[Path]:
    """One package's wheel, without what it needs."""
    before = set(folder.glob("*.whl"))
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["-d", str(folder), "--python-version", python, "--implementation", "cp", "--disable-pip-version-check"]
    for platform in (*_PLATFORMS, "any"):
        command += ["--platform", platform]
    subprocess.run([*command, requirement], check=True)
    return sorted(set(folder.glob("*.whl")) - before)


if __name__ == "__main__":
    main()
