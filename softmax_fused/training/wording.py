"""How nouns, numbers and names are written in messages, tables and on the report page."""

from typing import Any

NO_VALUE = "\N{EN DASH}"
HEADINGS = {"lr": "learning rate"}
EXPONENT_FROM = 1e5  # from this magnitude on, decimals of a loss or a weight carry no information


def plural(noun: str, number: int) -> str:
    """Return the noun as it stands after a number.

    Example:
        >>> [f"{number} {plural('process', number)}" for number in (0, 1, 2)]
        ['0 processes', '1 process', '2 processes']
    """
    return noun if number == 1 else f"{noun}es" if noun.endswith("s") else f"{noun}s"


def format_decimal(value: float, digits: int) -> str:
    """Return a number with `digits` decimals, or in exponent form from `EXPONENT_FROM` on.

    Example:
        >>> format_decimal(0.5, 4), format_decimal(123456.0, 4)
        ('0.5000', '1.23e+05')
    """
    return f"{value:.{digits}f}" if abs(value) < EXPONENT_FROM else f"{value:.2e}"


def format_value(value: Any) -> str:
    """Return any value of a run's record as a table cell.

    Example:
        >>> format_value(0.25), format_value(1e-6), format_value(60000), format_value(True)
        ('0.2500', '1.00e-06', '60,000', 'yes')
    """
    if isinstance(value, list):
        return ", ".join(map(format_value, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, (int, float)):
        return NO_VALUE if value is None else str(value)
    if isinstance(value, int) or value == 0:
        return f"{int(value):,}"
    return f"{value:.4f}" if 1e-3 <= abs(value) < EXPONENT_FROM else f"{value:.2e}"


def format_setting(value: Any) -> str:
    """Return a setting the way it is given on the command line.

    Example:
        >>> format_setting(0.1), format_setting("adam")
        ('0.1', 'adam')
    """
    return f"{value:g}" if isinstance(value, float) else format_value(value)


def heading(name: str) -> str:
    """Return a key of a record as a heading.

    Example:
        >>> heading("train_loss"), heading("lr")
        ('Train loss', 'Learning rate')
    """
    words = HEADINGS.get(name, name).replace("_", " ").replace("-", " ")
    return words[:1].upper() + words[1:]
