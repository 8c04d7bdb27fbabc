"""Tile tables from the command line, their alternatives, and how they are written in the table of tile sizes.

A table of `Tables` is a number, or rows: up to which size of a row of logits a tile serves, then what the tile is made
of. Nothing else here knows the tables, so one that is added to `Tables` is read and swept like the others.
"""

import contextlib
import math
from argparse import ArgumentParser
from collections.abc import Iterator, Sequence
from itertools import pairwise, product
from typing import Any

from softmax_fused.backends.triton import tiles as module

WARPS = 32  # the most that a program may have
SYNTAX = "TABLE=NUMBER, or TABLE=UP_TO:WARPS:VECTORS,...,inf:WARPS:VECTORS"


def tables() -> Any:
    """The tables in use."""
    return module.tables


def parse(text: str) -> tuple[str, Any]:
    """A table's name and value, from `target_programs=1024` or `one_pass=4096:1:1,8192:1:2,inf:4:2`.

    Raises:
        ValueError: no table has this name, or the value is none that it can have.
    """
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"a tile table is given as {SYNTAX}; got {text!r}")
    if name not in tables()._fields:
        raise ValueError(f"no tile table is called {name!r}; there are {', '.join(tables()._fields)}")
    current = getattr(tables(), name)
    if isinstance(current, int):
        return name, positive(name, value)
    return name, parse_rows(name, value, type(current[0]))


def positive(name: str, text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise ValueError(f"{name} takes whole numbers from 1 on; got {text!r}")
    return int(text)


def power_of_2(name: str, text: str) -> int:
    """What a tile is made of: Triton's blocks and programs have no other sizes."""
    number = positive(name, text)
    if number & (number - 1) or ("warps" in name and number > WARPS):
        raise ValueError(f"{name} takes powers of 2{f' up to {WARPS}' * ('warps' in name)}; got {text!r}")
    return number


def parse_rows(name: str, text: str, kind: Any) -> tuple[Any, ...]:
    """Rows in ascending order, the last of which serves all the rest."""
    rows = []
    for entry in text.split(","):
        limit, *sizes = entry.split(":")
        if len(sizes) != len(kind._fields) - 1:
            raise ValueError(f"a row of {name} is {':'.join(kind._fields)}, as in 4096:1:2; got {entry!r}")
        up_to = math.inf if limit == "inf" else positive(name, limit)
        named = zip(kind._fields[1:], sizes, strict=True)
        rows.append(kind(up_to, *(power_of_2(f"{field} of {name}", size) for field, size in named)))
    if rows[-1][0] != math.inf or any(before[0] >= after[0] for before, after in pairwise(rows)):
        raise ValueError(f"the rows of {name} must ascend up to inf; got {text!r}")
    return tuple(rows)


def check(texts: Sequence[str], parser: ArgumentParser) -> None:
    """Have a command line end with what is wrong about the tables given."""
    try:
        for text in texts:
            parse(text)
    except ValueError as problem:
        parser.error(str(problem))


@contextlib.contextmanager
def override(texts: Sequence[str]) -> Iterator[None]:
    """Use the tables given within the block."""
    with module.override(**dict(map(parse, texts))):
        yield


def replaced(name: str, row: int | None, value: Any) -> dict[str, Any]:
    """What `Tables` calls it if one row of a table, or a table that is a number, has another value."""
    current = getattr(tables(), name)
    return {name: value if row is None else (*current[:row], value, *current[row + 1 :])}


@contextlib.contextmanager
def using(name: str, row: int | None, value: Any) -> Iterator[None]:
    """Use another value within the block."""
    with module.override(**replaced(name, row, value)):
        yield


def alternatives(value: Any) -> list[Any]:
    """Halves, doubles, quarters and fourfolds of a number, or of what a row is made of; the nearest come first."""
    if isinstance(value, int):
        return [it for it in (value // 2, value * 2, value // 4, value * 4) if it]
    limit, *sizes = value
    found = []
    for steps in sorted(product((0, 1, -1, 2, -2), repeat=len(sizes)), key=lambda steps: sum(map(abs, steps))):
        row = type(value)(limit, *(int(size * 2.0**step) for size, step in zip(sizes, steps, strict=True)))
        if 0 < sum(map(abs, steps)) <= 2 and all(row[1:]) and getattr(row, "warps", 1) <= WARPS:
            found.append(row)
    return found


@contextlib.contextmanager
def fields_read(found: set[str]) -> Iterator[None]:
    """Note which tables are looked at within the block."""

    class Watched(type(tables())):  # type: ignore[misc]
        def __getattribute__(self, name: str) -> Any:
            if name in type(self)._fields:
                found.add(name)
            return super().__getattribute__(name)

    with module.override():  # forget what was chosen before
        module.tables = Watched(*module.tables)
        yield


def literal(value: Any) -> str:
    """As it stands in the source."""
    if not isinstance(value, tuple):
        return str(value)
    return f"{type(value).__name__}({', '.join('math.inf' if it == math.inf else str(it) for it in value)})"


def source(name: str, value: Any, remarks: Sequence[str]) -> str:
    """A field of `Tables` with a remark for each of its rows, to be pasted."""
    comments = [f"  # {remark}" if remark else "" for remark in remarks]
    if isinstance(value, int):
        return f"    {name}: int = {value}{comments[0]}"
    rows = [f"        {literal(row)},{comment}" for row, comment in zip(value, comments, strict=True)]
    return "\n".join([f"    {name}: tuple[{type(value[0]).__name__}, ...] = (", *rows, "    )"])
