"""The manifests of third_party/: found in a checkout and in an installed wheel."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from jaxalign.interop import manifests

ROOT = Path(__file__).parents[2]


def test_checkout_has_them():
    assert manifests.folder().resolve() == ROOT / "third_party"
    assert all(file.name and file.preset for file in manifests.files())


def test_wheel_has_them(tmp_path):
    """pyproject.toml puts them into the package, where `folder` looks first."""
    setuptools = pytest.importorskip("setuptools")
    if int(setuptools.__version__.split(".")[0]) < 77:
        pytest.skip("pyproject.toml asks for setuptools 77")
    source = tmp_path / "source"
    for file in ("pyproject.toml", "README.md", "LICENSE", "jaxalign/__init__.py"):
        (source / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, source / file)
    shutil.copytree(ROOT / "third_party", source / "third_party")
    (source / "jaxalign" / "third_party").symlink_to("../third_party")
    out = str(tmp_path / "out")
    build = f"import setuptools.build_meta as build; build.build_wheel({out!r}); build.build_sdist({out!r})"
    done = subprocess.run([sys.executable, "-c", build], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = (tmp_path / "out").glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    wanted = {path.name for path in manifests.folder().glob("*.toml")}
    assert wanted == {Path(name).name for name in names if name.startswith("jaxalign/third_party/")}
    assert not [name for name in names if name.startswith("third_party")]
    (sdist,) = (tmp_path / "out").glob("*.tar.gz")
    shutil.unpack_archive(sdist, tmp_path / "unpacked")
    assert wanted == {path.name for path in (tmp_path / "unpacked").glob("*/jaxalign/third_party/*.toml")}
