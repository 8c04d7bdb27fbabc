"""The loss of classes divided among ranks, against the whole loss."""

from pathlib import Path

import pytest

from tests import ranks

SLICES = ("every_argument", "hard_rows", "confident_rows", "no_rows", "second_derivatives", "wrong_on_one_rank")
DTENSORS = ("dtensors", "loss_parallel_agrees", "parallel_plan", "dtensors_left_to_torch")


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_ranks(world: int, tmp_path: Path) -> None:
    """One start of the ranks for all of it: that is what takes the time."""
    ranks.run(tmp_path, world, ranks.several, SLICES + DTENSORS + ("subgroups",) * (world == 4))


@pytest.mark.slow
def test_kernels_on_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # for the ranks, from before they import Triton
    ranks.run(tmp_path, 2, ranks.kernels)
