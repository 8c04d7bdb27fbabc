"""Nouns beside numbers."""


def plural(noun: str, number: int) -> str:
    """Return the noun as it stands after a number.

    Example:
        >>> [f"{number} {plural('process', number)}" for number in (0, 1, 2)]
        ['0 processes', '1 process', '2 processes']
    """
    return noun if number == 1 else f"{noun}es" if noun.endswith("s") else f"{noun}s"
