"""The planted bugs fit the source: what each replaces stands there, once or in every place of its kind."""

import pytest

from tests.mutants import MUTANTS, ROOT


@pytest.mark.parametrize("name", MUTANTS)
def test_what_a_planted_bug_replaces_is_there(name: str) -> None:
    file, right, wrong, tests = MUTANTS[name]
    assert right in (ROOT / file).read_text()
    assert right != wrong
    assert all((ROOT / "tests" / f"test_{test}.py").is_file() for test in tests)
