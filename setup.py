"""Build of sjd-vllm.

torch and vLLM are no plain requirements: a machine has either vLLM's GPU build (the extra ``gpu``) or its CPU
distribution (requirements/cpu.lock), and naming one here would pull it over the other.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def _version() -> str:
    text = (ROOT / "sjd_vllm" / "__init__.py").read_text()
    match = re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE)
    if match is None:
        raise RuntimeError("sjd_vllm/__init__.py does not say __version__")
    return match.group(1)


setup(
    name="sjd-vllm",
    version=_version(),
    description="Exact speculative Jacobi decoding of image tokens on stock vLLM, with classifier-free guidance",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=[*find_packages(include=["sjd_vllm", "sjd_vllm.*"]), *find_packages("kernels")],
    package_dir={"sjd_kernels": "kernels/sjd_kernels"},
    package_data={
        "sjd_vllm": ["py.typed"],
        "sjd_vllm.demo": ["checkpoint/**"],
        "sjd_vllm.images": ["playground_page/*"],
        "sjd_vllm.models.llamagen": ["imagenet_classes.txt"],
    },
    install_requires=["numba", "numpy", "pillow>=12", "psutil", "safetensors", "tqdm", "transformers>=5.16,<6"],
    extras_require={
        "gpu": ["vllm==0.32.*"],
        "server": ["fastapi", "python-multipart", "uvicorn"],
        "llamagen": ["beautifulsoup4", "ftfy"],
        "ray": ["ray[serve]>=2.60"],
        "eval": ["matplotlib", "torchmetrics", "torch-fidelity"],
        "xformers": ["xformers>=0.0.35; sys_platform == 'linux'"],
        "dev": [
            "build",
            "hypothesis",
            "matplotlib",
            "mkdocs-material",
            "mypy",
            "playwright",
            "pytest",
            "pytest-timeout",
            "ruff",
            "schemathesis",
            "scipy",
            "torchmetrics",
            "wheel",
        ],
    },
    entry_points={
        "console_scripts": ["sjd-vllm = sjd_vllm.cli:main"],
        # Other packages may bring families of checkpoints: group "sjd_vllm.families", see docs/add-a-model.md.
        "vllm.general_plugins": ["sjd_vllm = sjd_vllm.plugin:register"],
        # The same name: VLLM_PLUGINS lists the names that are allowed, in all groups.
        "vllm.endpoint_plugins": ["sjd_vllm = sjd_vllm.images.api_server:ImagesEndpoint"],
    },
)
