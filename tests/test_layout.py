import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINKS = ("kernels", "reference")
CURE = "git clone -c core.symlinks=true"
HOOK = "import setuptools.build_meta as backend, sys; print(getattr(backend, sys.argv[1])(sys.argv[2]))"
SITE_PACKAGES = "import sysconfig; print(sysconfig.get_path('purelib'))"
SHOW_FILES = "import acs_triton.kernels as k, acs_triton.reference as r; print(k.__file__, r.__file__, sep='\\n')"

# By path, because importing acs_triton runs the check on the checkout that holds this file.
check_symlinks = runpy.run_path(str(ROOT / "acs_triton" / "_layout.py"))["check_symlinks"]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what a build reads, links kept as links."""
    copy = tmp_path / "checkout"
    copy.mkdir()
    for name in ("acs_triton", *LINKS):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    return copy


@pytest.fixture
def checkout_without_links(checkout: Path) -> Path:
    """The same as git writes it with core.symlinks=false: the target of each link as text."""
    for name in LINKS:
        link = checkout / "acs_triton" / name
        link.unlink()
        link.write_text(f"../{name}")
    return checkout


def run(directory: Path, *arguments: str, python: Path = Path(sys.executable)) -> subprocess.CompletedProcess[str]:
    # PYTHONPATH would put the real package before the copy.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [str(python), *arguments]
    return subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, check=False)


def build(directory: Path, hook: str, output: Path) -> Path:
    output.mkdir()
    result = run(directory, "-c", HOOK, hook, str(output))
    assert result.returncode == 0, result.stderr
    return output / result.stdout.splitlines()[-1]


def test_links_and_directories_pass(checkout: Path) -> None:
    check_symlinks(checkout / "acs_triton")
    for name in LINKS:
        (checkout / "acs_triton" / name).unlink()
        (checkout / name).rename(checkout / "acs_triton" / name)
    check_symlinks(checkout / "acs_triton")


def test_text_files_and_dangling_links_are_refused(checkout_without_links: Path) -> None:
    package = checkout_without_links / "acs_triton"
    with pytest.raises(ImportError, match=CURE) as raised:
        check_symlinks(package)
    assert all(str(package / name) in str(raised.value) for name in LINKS)

    for name in LINKS:
        (package / name).unlink()
    with pytest.raises(ImportError, match=CURE):
        check_symlinks(package)

    (package / "kernels").symlink_to("../kernels")
    (package / "reference").symlink_to("../nowhere")
    with pytest.raises(ImportError, match=CURE) as raised:
        check_symlinks(package)
    assert str(package / "kernels") not in str(raised.value)


def test_import_stops_with_one_sentence(checkout_without_links: Path) -> None:
    result = run(checkout_without_links, "-c", "import acs_triton")
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("ImportError: acs_triton: expected")
    assert CURE in result.stderr.splitlines()[-1]


@pytest.mark.parametrize("hook", ["build_wheel", "build_sdist", "build_editable"])
def test_build_stops_with_one_sentence(checkout_without_links: Path, tmp_path: Path, hook: str) -> None:
    output = tmp_path / "dist"
    output.mkdir()
    result = run(checkout_without_links, "-c", HOOK, hook, str(output))
    assert result.returncode == 1
    assert CURE in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert list(output.iterdir()) == []


def test_wheel_and_sdist_hold_kernels_and_reference(checkout: Path, tmp_path: Path) -> None:
    expected = {f"acs_triton/{path.name}" for path in (checkout / "acs_triton").glob("*.py")}
    for name in LINKS:
        expected |= {f"acs_triton/{path.relative_to(checkout)}" for path in (checkout / name).rglob("*.py")}
    expected.add("acs_triton/kernels/measured.json")
    assert {f"acs_triton/{name}/__init__.py" for name in LINKS} <= expected

    archive = build(checkout, "build_sdist", tmp_path / "sdist")
    with tarfile.open(archive) as file:
        file.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    for source, output in ((checkout, "wheel"), (unpacked, "wheel-from-sdist")):
        wheel = build(source, "build_wheel", tmp_path / output)
        held = {name for name in zipfile.ZipFile(wheel).namelist() if name.endswith((".py", ".json"))}
        assert expected <= held
        assert {name.partition("/")[0] for name in held} == {"acs_triton"}


@pytest.mark.slow
@pytest.mark.parametrize("form", ["wheel", "sdist", "editable"])
def test_installed_package_imports_kernels_and_reference(checkout: Path, tmp_path: Path, form: str) -> None:
    environment = tmp_path / "environment"
    venv.create(environment, symlinks=True)
    python = environment / "bin" / "python"
    packages = Path(run(tmp_path, "-c", SITE_PACKAGES, python=python).stdout.strip())
    # The dependencies come from the running environment; its own .pth files are not read, so not its acs_triton.
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))

    if form == "editable":
        source = ["--editable", str(checkout)]
    else:
        source = [str(build(checkout, f"build_{form}", tmp_path / "dist"))]
    options = ("--quiet", "--no-index", "--no-deps", "--no-build-isolation")
    result = run(tmp_path, "-m", "pip", "--python", str(python), "install", *options, *source)
    assert result.returncode == 0, result.stderr

    result = run(tmp_path, "-c", SHOW_FILES, python=python)
    assert result.returncode == 0, result.stderr
    home = checkout if form == "editable" else packages
    assert result.stdout.splitlines() == [str(home / "acs_triton" / name / "__init__.py") for name in LINKS]


def test_what_the_readme_links_to_is_there() -> None:
    text = (ROOT / "README.md").read_text()
    links = re.findall(r"\]\(([^)#]+)\)", text)
    assert links
    assert not [link for link in links if "://" not in link and not (ROOT / link).exists()]
