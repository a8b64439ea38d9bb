"""The submodules that the user named."""

from __future__ import annotations

from fnmatch import fnmatchcase

from torch import nn

from cg_lightning.modules.compiled import watchable_modules
from cg_lightning.modules.interception import can_intercept


def match_targets(
    module: nn.Module, patterns: tuple[str, ...]
) -> tuple[dict[str, nn.Module], list[str]]:
    """Return the submodules whose dotted path matches, and the patterns without a match.

    Args:
        module: The module.
        patterns: Patterns of :mod:`fnmatch`.
    """
    paths = {
        path: child for path, child in watchable_modules(module) if path and can_intercept(child)
    }
    matched = {
        path: child for path, child in paths.items() if any(fnmatchcase(path, p) for p in patterns)
    }
    return matched, [
        pattern for pattern in patterns if not any(fnmatchcase(path, pattern) for path in matched)
    ]


def check_targets(module: nn.Module, patterns: tuple[str, ...]) -> None:
    """Check that each pattern matches a submodule.

    Raises:
        ValueError: A pattern matches nothing. The message lists some existing paths.
    """
    _, unmatched = match_targets(module, patterns)
    if unmatched:
        some = ", ".join([path for path, _ in watchable_modules(module) if path][:10]) or "none"
        raise ValueError(
            f"targets={list(patterns)!r}: {unmatched[0]!r} matches no submodule of "
            f"{type(module).__name__}. Patterns are matched against named_modules(); its first "
            f"names are: {some}."
        )
