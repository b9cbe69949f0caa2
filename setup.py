"""Stops the build of a checkout without symbolic links; everything else is in pyproject.toml."""

import runpy
from pathlib import Path

from setuptools import setup

package_directory = Path(__file__).parent / "acs_triton"
# By path: importing acs_triton would import torch, which a build environment does not have.
check_symlinks = runpy.run_path(str(package_directory / "_layout.py"))["check_symlinks"]
try:
    check_symlinks(package_directory)
except ImportError as error:
    raise SystemExit(str(error)) from None

setup()
