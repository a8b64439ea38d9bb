"""The syntax of ``capture_sizes`` and ``pad_dims``, and its checks."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

POWERS_OF_TWO = "pow2"
PROPOSED = "auto"
"""Given as ``pad_dims``: the sizes are proposed from the batches."""
_EXAMPLE = "pad_dims={'input_ids': {1: {'sizes': 'pow2', 'value': 0}}}"
_KEYS = ("sizes", "value")


@dataclasses.dataclass(frozen=True)
class PadRule:
    """How one dimension of one leaf of a batch is padded."""

    sizes: tuple[int, ...] = ()
    """The sizes that are captured, increasing. Empty: powers of two."""
    value: bool | int | float = 0
    """The value of the padding."""

    def size_for(self, size: int) -> int:
        """Return the size to pad to; the size itself if none is large enough."""
        if not self.sizes:
            return 1 << max(size - 1, 0).bit_length()
        return next((each for each in self.sizes if each >= size), size)


PadDims = dict[str, dict[int, PadRule]]


def check_sizes(argument: str, sizes: Any) -> tuple[int, ...]:
    """Return the sizes as a tuple.

    Raises:
        ValueError: They are no list of positive, increasing whole numbers.
    """
    is_list = isinstance(sizes, Sequence) and not isinstance(sizes, str) and len(sizes) > 0
    if not is_list or any(isinstance(size, bool) or not isinstance(size, int) for size in sizes):
        raise ValueError(
            f"{argument}={sizes!r} must be a list of whole numbers, for example [1, 2, 4, 8]."
        )
    if sizes[0] < 1:
        raise ValueError(f"{argument}={sizes!r}: {sizes[0]} is not positive; sizes begin at 1.")
    for one, other in itertools.pairwise(sizes):
        if other <= one:
            raise ValueError(
                f"{argument}={sizes!r} must increase, but {other} comes after {one}; "
                f"set {sorted(set(sizes))}."
            )
    return tuple(sizes)


def check_pad_dims(given: Any) -> PadDims:
    """Return the rules by path of the leaf and dimension.

    Raises:
        ValueError: It is no mapping from paths to dimensions to ``sizes`` and ``value``.
    """
    if not isinstance(given, Mapping) or not given:
        raise ValueError(
            f"pad_dims={given!r} must be {PROPOSED!r}, or map leaves of the batch to dimensions, "
            f"for example {_EXAMPLE}."
        )
    return {str(path): _check_dims(path, dims) for path, dims in given.items()}


def _check_dims(path: Any, dims: Any) -> dict[int, PadRule]:
    where = f"pad_dims[{path!r}]"
    if not isinstance(path, (str, int)) or not isinstance(dims, Mapping) or not dims:
        raise ValueError(
            f"{where}={dims!r} must map dimensions to sizes and a value, for example {_EXAMPLE}."
        )
    rules = {}
    for dim, rule in dims.items():
        if isinstance(dim, bool) or not isinstance(dim, int) or dim < 1:
            raise ValueError(
                f"{where}: dimension {dim!r} must be a whole number of at least 1; for dimension "
                "0, the batch, set capture_sizes."
            )
        rules[dim] = _check_rule(f"{where}[{dim}]", rule)
    return rules


def _check_rule(where: str, rule: Any) -> PadRule:
    if not isinstance(rule, Mapping) or "sizes" not in rule or set(rule) - set(_KEYS):
        raise ValueError(
            f"{where}={rule!r} must have 'sizes' and may have 'value', for example {_EXAMPLE}."
        )
    value = rule.get("value", 0)
    if not isinstance(value, (bool, int, float)):
        raise ValueError(f"{where}['value']={value!r} must be a number, True or False.")
    sizes = rule["sizes"]
    if sizes == POWERS_OF_TWO:
        return PadRule((), value)
    if isinstance(sizes, str):
        raise ValueError(
            f"{where}['sizes']={sizes!r} is unknown; choose 'pow2' or a list of sizes."
        )
    return PadRule(check_sizes(f"{where}['sizes']", sizes), value)
