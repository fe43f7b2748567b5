"""Packaging of effseg; the tools' settings are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_namespace_packages, setup

HERE = Path(__file__).parent


def version() -> str:
    """The version, read as text: importing effseg would need torch at build time."""
    found = re.search(r'__version__ = "([^"]+)"', (HERE / "effseg/version.py").read_text(encoding="utf-8"))
    if found is None:
        raise RuntimeError("effseg/version.py holds no version")
    return found.group(1)


def readme() -> str:
    path = HERE / "README.md"
    return path.read_text(encoding="utf-8") if path.exists() else ""


setup(
    name="effseg",
    version=version(),
    description="3D segmentation networks trained and run on whole CT volumes, in a fraction of the memory",
    long_description=readme(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10,<3.14",
    # effseg/kernels is a link to kernels/, which has no __init__.py: a namespace package inside effseg.
    # The explicit root makes an editable install a plain path entry, which type checkers follow.
    package_dir={"": "."},
    packages=find_namespace_packages(
        include=["effseg", "effseg.*"], exclude=["*.__pycache__", "*.__pycache__.*"]
    ),
    package_data={"effseg": ["py.typed"], "effseg.kernels": ["tuned/*.json"]},
    include_package_data=False,
    entry_points={"console_scripts": ["effseg = effseg.cli:main"]},
    install_requires=[
        "torch>=2.6",
        "triton>=3.2; platform_system == 'Linux' and platform_machine == 'x86_64'",
        "numpy>=1.26",
        "nibabel>=5.2",
        "monai>=1.4",
        "rich>=13.0",
        "matplotlib>=3.8",
        "safetensors>=0.4.3",
        "scipy>=1.11",
        "tensorboardX>=2.6.2",
    ],
    extras_require={
        "nnunet": ["nnunetv2>=2.8"],
        "test": [
            "pytest>=8.0",
            "pytest-benchmark>=4.0",
            "pytest-xdist>=3.5",
            "hypothesis>=6.100",
            "dynamic-network-architectures>=0.4",
            "pyyaml>=6.0",
            "ruff>=0.9",
            "mypy>=1.14",
        ],
    },
    classifiers=[
        "Intended Audience :: Healthcare Industry",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Medical Science Apps.",
        "Typing :: Typed",
    ],
)
