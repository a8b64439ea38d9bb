"""What users may give: each check names the argument, what was given, and what was expected."""

from __future__ import annotations

from collections.abc import Sequence


def check_names(
    argument: str, value: Sequence[str] | str, choices: Sequence[str] | None
) -> tuple[str, ...]:
    """Gives the names; one name may be given as it is.

    Raises:
        ValueError: One is no string, or none of ``choices``.
    """
    names = (value,) if isinstance(value, str) else tuple(value)
    for name in names:
        if not isinstance(name, str) or (choices is not None and name not in choices):
            expected = (
                f"choose from {', '.join(choices)}" if choices is not None else "expected names"
            )
            raise ValueError(f"{argument}={value!r}: {name!r} is unknown; {expected}.")
    return names


def check_at_least(argument: str, value: int, least: int) -> int:
    """Gives the number.

    Raises:
        ValueError: It is no whole number, or less than ``least``.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{argument}={value!r} must be a whole number of at least {least}.")
    return value
