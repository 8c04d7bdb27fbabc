"""docs/chapter-in-commands.md: what it prints is what comes out."""

import doctest
from pathlib import Path

CHAPTER = Path(__file__).parents[1] / "docs/chapter-in-commands.md"


def test_the_examples_print_what_they_say() -> None:
    failed, tried = doctest.testfile(str(CHAPTER), module_relative=False)
    assert tried >= 9
    assert failed == 0
