"""The package as users get it: sdist, then a wheel from it, in a clean environment."""

import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(*command: str | Path, **environment: str) -> str:
    finished = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | environment, timeout=600, cwd="/"
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an sdist and the wheel that `python -m build` makes from it."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--outdir", folder, ROOT)
    return folder


@pytest.mark.slow
def test_wheel_from_the_sdist(built: Path, tmp_path: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    (wheel,) = built.glob("*.whl")
    with tarfile.open(sdist) as archive:
        names = [name.partition("/")[2] for name in archive.getnames()]
    assert {"kernels/rows.py", "kernels/cross_entropy.py", "LICENSE", "README.md"} <= set(names)
    assert not [name for name in names if name.startswith("tests/test_")], "tests that miss their helpers"
    files = zipfile.ZipFile(wheel).namelist()
    assert {"softmax_fused/kernels/rows.py", "softmax_fused/py.typed"} <= set(files)
    assert {str(path.relative_to(ROOT)) for path in (ROOT / "softmax_fused").rglob("*.py")} <= set(files)
    assert "softmax_fused/training/report/templates/report.html" in files
    tops = {name.partition("/")[0] for name in files}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"softmax_fused"}

    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", wheel)
    # torch and triton come from this environment's folder, the package only from the wheel
    libraries = sysconfig.get_path("purelib")
    found = run(
        python,
        "-c",
        "import importlib.util as u, softmax_fused, torch\n"
        "import softmax_fused.kernels.rows\n"
        "print(softmax_fused.cross_entropy(torch.zeros(2, 4), torch.tensor([0, 1]), backend='torch').item())\n"
        "print(softmax_fused.__file__)\n"
        "kernels = u.find_spec('kernels')\n"  # a library of that name may be installed
        "print(kernels and kernels.origin)",
        PYTHONPATH=libraries,
    ).split("\n")
    assert float(found[0]) == pytest.approx(1.3862944)
    assert found[1].startswith(str(tmp_path))
    assert not found[2].startswith(str(tmp_path))
