"""The planted bugs fit the source: what each replaces stands there, in one place."""

import pytest

from tests.mutants import MUTANTS, ROOT


@pytest.mark.parametrize("name", MUTANTS)
def test_what_a_planted_bug_replaces_is_found_exactly_once(name: str) -> None:
    file, right, wrong, tests, _ = MUTANTS[name]
    assert (ROOT / file).read_text().count(right) == 1
    assert right != wrong
    assert all((ROOT / "tests" / f"test_{test}.py").is_file() for test in tests)
