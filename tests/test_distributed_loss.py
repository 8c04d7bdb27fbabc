"""The loss of classes divided among ranks, and of DTensors, against the whole loss."""

from pathlib import Path

import pytest

from tests import dtensors_on_ranks, mesh_on_ranks, rows_on_ranks, slices_on_ranks
from tests.lab import real_data
from tests.ranks import run, several


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])  # four ranks share two cores
def test_ranks(world: int, tmp_path: Path) -> None:
    """One start of the ranks for all of it: that is what takes the time."""
    extra = {
        2: (slices_on_ranks.under_compile, rows_on_ranks.rows_under_compile),
        4: (slices_on_ranks.subgroups, mesh_on_ranks.guide, mesh_on_ranks.softmax_model_on_a_mesh),
    }
    run(tmp_path, world, several, slices_on_ranks.ALL + dtensors_on_ranks.ALL + rows_on_ranks.ALL + extra[world])


@pytest.mark.slow
@real_data
def test_training_on_a_mesh_with_the_real_data(tmp_path: Path) -> None:
    run(tmp_path, 4, mesh_on_ranks.softmax_model_on_a_mesh_with_real_data)


@pytest.mark.slow
def test_kernels_on_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # for the ranks, from before they import Triton
    run(tmp_path, 2, slices_on_ranks.kernels)
