"""Writes the package in the form that the `kernels` package of Hugging Face loads: ``make hub``.

    python hub/build.py [FOLDER]    # default: build

FOLDER gets a subfolder for each backend of build.toml (`torch-cuda`, ...), which is what `kernels` prefers, and
`torch-universal`, which it takes for every other device. Each holds the modules of softmax_fused but for the lab, the
command line and patch(), and those of torch-ext. Two builds can be loaded into one process: imports become relative,
and the operators that torch.compile sees get a namespace of their own, which is the `id` in metadata.json and holds a
digest of the sources. Nothing but Python is needed.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
HUB = ROOT / "hub"
NAME = "softmax_fused"
LEFT_OUT = ("__init__.py", "__main__.py", "cli.py", "information.py", "patching.py", "training")

IMPORT = re.compile(rf"^(\s*)from {NAME}((?:\.\w+)*) import ", re.MULTILINE)
ABSOLUTE = re.compile(rf"^\s*(?:from|import) {NAME}\b.*", re.MULTILINE)


def settings() -> dict[str, str | list[str]]:
    """Return what build.toml says in [general]. Python 3.10 has no tomllib; the values there are JSON's, too."""
    general = (HUB / "build.toml").read_text().partition("[general]\n")[2].partition("\n[")[0]
    return {name: json.loads(value) for name, value in re.findall(r"^([\w-]+) = (.+)$", general, re.MULTILINE)}


def sources() -> dict[str, str]:
    """Return the text of each module by its path within the kernel."""
    package = {path.relative_to(ROOT / NAME): path for path in (ROOT / NAME).glob("**/*.py")}
    package |= {Path("kernels", path.name): path for path in (ROOT / "kernels").glob("*.py")}
    kept = {name: path for name, path in package.items() if name.parts[0] not in LEFT_OUT}
    kept |= {path.relative_to(HUB / "torch-ext" / NAME): path for path in (HUB / "torch-ext" / NAME).glob("*.py")}
    return {name.as_posix(): path.read_text() for name, path in sorted(kept.items())}


def relative(name: str, text: str) -> str:
    """Make the imports of a module relative.

    Raises:
        ValueError: If one has another form than ``from softmax_fused.module import ...``.
    """
    dots = "." * (name.count("/") + 1)
    made = IMPORT.sub(lambda found: f"{found[1]}from {dots}{found[2][1:]} import ", text)
    left = ABSOLUTE.search(made)
    if left:
        raise ValueError(f"{name}: write `from {NAME}... import ...` instead of `{left[0].strip()}`")
    return made


def namespaced(text: str, identifier: str) -> str:
    """Give a module's operators the kernel's own namespace."""
    return text.replace(f"{NAME}::", f"{identifier}::").replace(f"torch.ops.{NAME}.", f"torch.ops.{identifier}.")


def write_variant(folder: Path, modules: dict[str, str], backend: str, identifier: str) -> None:
    """Write one build variant, in the place of what is there."""
    shutil.rmtree(folder, ignore_errors=True)
    general = settings()
    files = {name: namespaced(text, identifier) for name, text in modules.items()}
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    digests = {
        name: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for name, text in sorted(files.items())
    }
    metadata = {
        "name": general["name"],
        "id": identifier,
        "version": general["version"],
        "license": general["license"],
        "python-depends": [],
        "backend": {"type": backend},
        "digest": {"algorithm": "sha256", "files": digests},
    }
    (folder / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")


def build(folder: Path) -> list[Path]:
    """Write every build variant into `folder` and return their folders."""
    modules = {name: relative(name, text) for name, text in sources().items()}
    digest = hashlib.sha256(json.dumps(modules).encode()).hexdigest()[:8]
    variants = []
    for variant in (*settings()["backends"], "universal"):
        # A build names one backend. torch-universal serves those that have no build of their own, as the CPU's does.
        backend = "cpu" if variant == "universal" else variant
        variants.append(folder / f"torch-{variant}")
        write_variant(variants[-1], modules, backend, f"_{NAME}_{variant}_{digest}")
    return variants


if __name__ == "__main__":
    for variant in build(Path(sys.argv[1] if len(sys.argv) > 1 else "build")):
        print(variant)
