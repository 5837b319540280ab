"""Set up what a machine with a GPU and PyTorch lacks: vLLM and what it needs, in a folder beside the user's packages.

Nothing of the user's environment is changed: packages go to `site` in the work folder, which the parts find by their
PYTHONPATH. PyTorch is never installed. vLLM pins one release of it; its compiled parts use the stable ABI, so another
release is tried as it is (--no-deps), and the check at the end says whether it works.

With --wheels, from a folder of wheels and without network (`wheels.py` makes one); else from the package index. Knows
the standard library and pip alone.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

VLLM = "vllm==0.32.*"
# What our own parts import beside what vLLM needs; pytest and scipy are the tests' harness's, which `correctness` uses.
OURS = ("numba", "numpy", "pillow", "psutil", "pytest", "safetensors", "scipy", "tqdm", "transformers", "tokenizers")
# PyTorch and what comes with it, and packages that a dense model on one GPU does not import.
SKIPPED = ("torch", "torchvision", "torchaudio", "torchcodec", "triton", "xformers", "numba-cuda")
SKIPPED_PREFIXES = (
    *("nvidia-", "cuda-", "flashinfer", "tilelang", "quack-", "tokenspeed", "humming-", "nvtx", "ray"),
    *("pynvvideocodec", "fastsafetensors", "instanttensor"),
)
_ROUNDS = 8
_CHECK = """
import json, sys
found = {"python": sys.version.split()[0]}
import torch
found["torch"] = torch.__version__
found["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
import vllm
found["vllm"] = vllm.__version__
from sjd_vllm.engine.compat import require_supported_vllm
require_supported_vllm()
if found["gpu"]:
    import triton
    found["triton"] = triton.__version__
    import vllm._C_stable_libtorch
    from vllm.vllm_flash_attn import flash_attn_varlen_func
    import sjd_kernels.gumbel_choices
from vllm import LLMEngine
import sjd_vllm.engine.worker, sjd_vllm.images.pipeline
import pytest, scipy
print(json.dumps(found))
"""


class SetupError(RuntimeError):
    """The machine cannot be set up; the message says what is missing."""


def main() -> None:
    """Install what is missing and check that it works."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--site", type=Path, required=True, help="folder to install into")
    parser.add_argument("--wheels", type=Path, nargs="+", help="folders of wheels; the network is not asked then")
    args = parser.parse_args()
    try:
        if args.wheels:
            install_wheels(args.wheels, args.site)
        found = check(args.site)
        if isinstance(found, str) and not args.wheels:
            print("not whole yet; asking the package index", flush=True)
            install_from_index(args.site)
            found = check(args.site)
        if isinstance(found, str):
            raise SetupError(
                f"vLLM cannot be used here:\n{found}\nmissing: {', '.join(missing(args.site)) or 'nothing'}"
            )
    except SetupError as error:
        sys.exit(f"install.py: error: {error}")
    print("  ".join(f"{name} {value}" for name, value in found.items()))


def install_wheels(folders: Sequence[Path], site: Path) -> None:
    """All wheels of some folders, as they are, unless `site` has them. Raises SetupError.

    In one go: a folder of modules that is in several wheels would else be replaced, not filled.
    """
    wheels = [wheel for folder in folders for wheel in sorted(folder.glob("*.whl"))]
    if not wheels:
        raise SetupError(f"there are no wheels in {', '.join(map(str, folders))}")
    done = installed(site, only_site=True)
    # NAME-VERSION-...whl
    if any(done.get(normal_name(wheel.name.split("-")[0])) != wheel.name.split("-")[1] for wheel in wheels):
        _pip(site, "--no-index", "--upgrade", *map(str, wheels))


def install_from_index(site: Path) -> None:
    """vLLM, and all that it and we need and is not there, but for what is skipped. Raises SetupError."""
    if "vllm" not in installed(site):
        _pip(site, VLLM)
    for _ in range(_ROUNDS):  # what is installed has needs of its own
        wanted = missing(site)
        if not wanted:
            return
        _pip(site, "--upgrade", *wanted)
    raise SetupError(f"after {_ROUNDS} rounds there still are unmet needs: {', '.join(missing(site))}")


def installed(site: Path, *, only_site: bool = False) -> dict[str, str]:
    """Version by normalised name, what `site` has before what this Python has."""
    found: dict[str, str] = {}
    for distribution in distributions(path=[str(site), *([] if only_site else sys.path)]):
        found.setdefault(normal_name(distribution.metadata["Name"]), distribution.version)
    return found


def missing(site: Path) -> list[str]:
    """Requirements of what is in `site`, vLLM among it, and of ours, that nothing installed meets."""
    requirements = list(OURS)
    for distribution in distributions(path=[str(site)]):
        requirements += distribution.requires or ()
    return unmet(requirements, installed(site), {})


def unmet(requirements: Iterable[str], found: Mapping[str, str], machine: Mapping[str, str]) -> list[str]:
    """Which requirements, as packages' metadata write them, are neither met nor skipped.

    Args:
        found: version by normalised name.
        machine: variables of markers that differ from this Python's.
    """
    wanted = {}
    for requirement in map(_requirement_class(), requirements):
        name = normal_name(requirement.name)
        is_skipped = name in SKIPPED or name.startswith(SKIPPED_PREFIXES)
        if is_skipped or (requirement.marker is not None and not requirement.marker.evaluate({"extra": "", **machine})):
            continue
        if name not in found or not requirement.specifier.contains(found[name], prereleases=True):
            wanted[name] = f"{requirement.name}{requirement.specifier}"
    return sorted(wanted.values())


def check(site: Path) -> dict[str, str] | str:
    """Versions of what works, or the end of the traceback that says what does not."""
    done = subprocess.run([sys.executable, "-c", _CHECK], env=environment(site), capture_output=True, text=True)
    if done.returncode:
        return "\n".join(done.stderr.strip().splitlines()[-8:])
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return found


def environment(site: Path) -> dict[str, str]:
    """Of the parts' processes: this checkout first, then what was installed, then the user's own."""
    root = Path(__file__).resolve().parents[2]
    paths = [root, root / "kernels", *([site] if site.is_dir() else [])]
    own = os.environ.get("PYTHONPATH")
    return {**os.environ, "PYTHONPATH": os.pathsep.join([*map(str, paths), *([own] if own else [])])}


def _pip(site: Path, *arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--no-compile", "--target", str(site), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SetupError(f"pip failed:\n{done.stderr.strip()[-2000:]}")


def _requirement_class() -> Any:
    try:
        return import_module("packaging.requirements").Requirement
    except ImportError:  # pip has a copy
        return import_module("pip._vendor.packaging.requirements").Requirement


def normal_name(name: str) -> str:
    """As packages are compared."""
    return name.lower().replace("_", "-").replace(".", "-")


if __name__ == "__main__":
    main()
