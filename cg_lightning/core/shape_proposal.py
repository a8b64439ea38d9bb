"""Which sizes batches should be padded to, from the shapes that were seen."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

MOST_SIZES = 8
"""Maximum number of sizes that are proposed for one dimension."""
FEW_SHAPES = 8
"""Up to this number of shapes, nothing is proposed, because each has a graph of its own."""
MOST_BARS = 12
"""Maximum number of rows of a histogram. Beyond it, sizes are joined to ranges."""
MOST_CANDIDATES = 256
"""Maximum number of sizes that are tried. The time to find the best grows with its square."""
_WIDTH = 40


@dataclasses.dataclass(frozen=True)
class SeenShape:
    """Batches of one shape."""

    paths: tuple[str, ...]
    """The names of the tensors: the keys to each, joined by dots."""
    shapes: tuple[tuple[int, ...], ...]
    """The shapes of the tensors, in the same order."""
    batches: int = 1
    """Number of such batches."""


def propose_sizes(counts: Mapping[int, int], most: int = MOST_SIZES) -> list[int]:
    """Return at most ``most`` sizes to pad to, with the least padding in all.

    Of more than 256 sizes, neighbours are joined first. Then the padding is not quite the least.

    Args:
        counts: Number of batches by size.
        most: Maximum number of sizes.

    Example::

        >>> propose_sizes({3: 1, 5: 10, 6: 10, 8: 40}, most=2)
        [6, 8]
    """
    if not counts:
        return []
    counts = _joined(counts)
    sizes = sorted(counts)
    of_size = torch.tensor(sizes, dtype=torch.float64, device="cpu")
    number = torch.tensor([counts[size] for size in sizes], dtype=torch.float64, device="cpu")
    numbers, elements = _sums(number), _sums(number * of_size)
    # padding[i, j] is that of all sizes from j to i in one group
    padding = of_size[:, None] * (numbers[1:, None] - numbers[:-1])
    padding -= elements[1:, None] - elements[:-1]
    padding += torch.full_like(padding, math.inf).triu(1)
    # best[i] is the least padding for the sizes before i, so far only for none
    best = torch.full_like(numbers, math.inf)
    best[0] = 0
    begins = []  # where the last group begins, for each size as its end
    for _ in range(min(most, len(sizes))):
        paddings = padding + best[:-1]
        begins.append(paddings.argmin(1).tolist())
        best[1:] = paddings.amin(1)
    chosen: list[int] = []
    end = len(sizes)
    for begin in reversed(begins):
        if end:
            chosen.append(sizes[end - 1])
            end = begin[end - 1]
    return sorted(chosen)


def _sums(values: Tensor) -> Tensor:
    """Return the sums of the first 0, 1, 2 ... values."""
    return torch.cat([values.new_zeros(1), values.cumsum(0)])


def _joined(counts: Mapping[int, int]) -> Mapping[int, int]:
    """Return the counts. If there are many, neighbours are joined to the largest of them."""
    if len(counts) <= MOST_CANDIDATES:
        return counts
    sizes, step = sorted(counts), math.ceil(len(counts) / MOST_CANDIDATES)
    groups = [sizes[begin : begin + step] for begin in range(0, len(sizes), step)]
    return {group[-1]: sum(counts[size] for size in group) for group in groups}


class ShapeProposal:
    """The settings with which the shapes of a stage would have run from graphs, and their cost.

    Args:
        seen: The shapes. Those with other tensors than the first one are left out.
    """

    def __init__(self, seen: Sequence[SeenShape]) -> None:
        first = seen[0]
        ranks = [len(shape) for shape in first.shapes]
        self._seen = [
            each
            for each in seen
            if each.paths == first.paths and [len(shape) for shape in each.shapes] == ranks
        ]
        rows: Counter[int] = Counter()
        dims: dict[tuple[str, int], Counter[int]] = {}
        for each in self._seen:
            if _rows(each):
                rows[_rows(each)] += each.batches
            for path, shape in zip(each.paths, each.shapes, strict=True):
                for dim, size in enumerate(shape[1:], 1):
                    dims.setdefault((path, dim), Counter())[size] += each.batches
        self.rows = rows
        """Number of batches by the size of dimension 0."""
        self.dims = {key: counts for key, counts in dims.items() if len(counts) > 1}
        """Number of batches by size, for each leaf and dimension that varies."""
        self.capture_sizes = propose_sizes(rows) if len(rows) > 1 else []
        """The proposed sizes of dimension 0; empty if it does not vary."""
        proposed: dict[tuple[tuple[int, int], ...], list[int]] = {}  # dimensions are often alike
        self._sizes: dict[tuple[str, int], list[int]] = {}
        for key, counts in self.dims.items():
            of_dim = tuple(counts.items())
            if of_dim not in proposed:
                proposed[of_dim] = propose_sizes(counts)
            self._sizes[key] = proposed[of_dim]
        padded = [self._padded(each) for each in self._seen]
        self.graphs = len(set(padded))
        """Number of graphs."""
        self.elements = sum(_elements(each.shapes) * each.batches for each in self._seen)
        """Elements of all batches."""
        self.padded_elements = sum(
            _elements(shapes) * each.batches
            for shapes, each in zip(padded, self._seen, strict=True)
        )
        """Elements of all padded batches."""

    @property
    def pad_dims(self) -> dict[str, dict[int, dict[str, object]]]:
        """The proposed sizes of other dimensions. The value 0 is a guess."""
        found: dict[str, dict[int, dict[str, object]]] = {}
        for (path, dim), sizes in self._sizes.items():
            found.setdefault(path, {})[dim] = {"sizes": sizes, "value": 0}
        return found

    @property
    def arguments(self) -> str:
        """The arguments of the callback, ready to paste; empty if no shape varies."""
        parts = [f"capture_sizes={self.capture_sizes}"] if self.capture_sizes else []
        parts += [f"pad_dims={self.pad_dims}"] if self.pad_dims else []
        return ", ".join([*parts, "verify_tolerance='close'"]) if parts else ""

    @property
    def waste(self) -> float:
        """The share of padding in the elements of padded batches."""
        return 1 - self.elements / self.padded_elements if self.padded_elements else 0.0

    def histograms(self) -> list[str]:
        """Return the histogram of each dimension that varies, as lines."""
        lines: list[str] = []
        groups: dict[tuple[tuple[int, int], ...], list[str]] = {}
        if self.capture_sizes:
            groups[tuple(sorted(self.rows.items()))] = ["dimension 0"]
        for (path, dim), counts in self.dims.items():
            names = groups.setdefault(tuple(sorted(counts.items())), [])
            names.append(f"dimension {dim} of {path!r}")
        for counts_of_group, names in groups.items():
            lines += [", ".join(names), *_bars(dict(counts_of_group))]
        return lines

    def _padded(self, seen: SeenShape) -> tuple[tuple[int, ...], ...]:
        rows = _rows(seen)
        padded_rows = next((size for size in self.capture_sizes if size >= rows), rows)
        found = []
        for path, shape in zip(seen.paths, seen.shapes, strict=True):
            sizes = [padded_rows if size == rows else size for size in shape[:1]]
            for dim, size in enumerate(shape[1:], 1):
                sizes.append(next(s for s in self._sizes.get((path, dim), [size]) if s >= size))
            found.append(tuple(sizes))
        return tuple(found)


def _rows(seen: SeenShape) -> int:
    return next((shape[0] for shape in seen.shapes if shape), 0)


def _elements(shapes: Sequence[Sequence[int]]) -> int:
    return sum(math.prod(shape) for shape in shapes)


def _bars(counts: dict[int, int]) -> list[str]:
    sizes = sorted(counts)
    step = max(1, math.ceil((sizes[-1] - sizes[0] + 1) / MOST_BARS))
    bins: Counter[int] = Counter()
    for size, number in counts.items():
        bins[sizes[0] + (size - sizes[0]) // step * step] += number
    most = max(bins.values())
    rows = []
    for begin in sorted(bins):
        name = str(begin) if step == 1 else f"{begin}-{begin + step - 1}"
        bar = "#" * max(1, round(_WIDTH * bins[begin] / most))
        rows.append(f"  {name:>11} {bins[begin]:>7} {bar}")
    return rows
