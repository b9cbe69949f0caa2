"""The guard against a checkout in which `kernels` and `reference` are text files instead of symbolic links."""

from pathlib import Path


def check_symlinks(package_directory: Path) -> None:
    """Raise ImportError unless `kernels` and `reference` in `package_directory` are directories or links to them.

    `setup.py` runs this where nothing is installed yet: standard library only.
    """
    missing = [name for name in ("kernels", "reference") if not (package_directory / name).is_dir()]
    if missing:
        raise ImportError(
            f"acs_triton: expected a directory or a symbolic link to one at "
            f"{' and '.join(str(package_directory / name) for name in missing)}, as in a checkout with symbolic links: "
            "clone again with `git clone -c core.symlinks=true <repository>` (on Windows, in Developer Mode)."
        )
