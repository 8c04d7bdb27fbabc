"""The package as hub/build.py writes it."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

HUB = Path(__file__).parents[1] / "hub"

spec = importlib.util.spec_from_file_location("hub_build", HUB / "build.py")
assert spec is not None
assert spec.loader is not None
builder = importlib.util.module_from_spec(spec)
sys.modules["hub_build"] = builder
spec.loader.exec_module(builder)


def build_hub(folder: Path) -> Path:
    """Write every build variant below a folder and return their parent."""
    made: Path = builder.build(folder / "build")[0].parent
    return made
