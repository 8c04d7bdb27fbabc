"""The loss of classes divided among ranks, and of DTensors, against the whole loss."""

from pathlib import Path

import pytest

from tests import dtensors_on_ranks, slices_on_ranks
from tests.ranks import run, several


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_ranks(world: int, tmp_path: Path) -> None:
    """One start of the ranks for all of it: that is what takes the time."""
    works = slices_on_ranks.ALL + dtensors_on_ranks.ALL
    run(tmp_path, world, several, works if world == 2 else (*works, slices_on_ranks.subgroups))


@pytest.mark.slow
def test_kernels_on_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # for the ranks, from before they import Triton
    run(tmp_path, 2, slices_on_ranks.kernels)
