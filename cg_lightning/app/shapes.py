"""``task=shapes``: the shapes of a dataloader, and sizes to pad its batches to. No step runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from hydra.utils import instantiate
from lightning.pytorch import LightningDataModule, seed_everything
from omegaconf import DictConfig
from torch import Tensor

from cg_lightning.app.jobs import JobResult
from cg_lightning.core.shape_proposal import SeenShape, ShapeProposal
from cg_lightning.core.tree import dotted_paths, flatten


def show_shapes(config: DictConfig) -> JobResult:
    """Read the dataloader of ``stage``, and print a histogram and proposed settings.

    Args:
        config: The composed config.
    """
    seed_everything(config.seed, workers=True, verbose=False)
    data: LightningDataModule = instantiate(config.data, _convert_="all")
    data.prepare_data()
    data.setup(config.stage.name)
    name = f"{'val' if config.stage.name == 'validate' else config.stage.name}_dataloader"
    if getattr(type(data), name) is getattr(LightningDataModule, name):
        return JobResult(f"{type(data).__name__} has no {name}; set stage= to one that it has.")
    seen = count_shapes(_batches(getattr(data, name)()))
    if not seen:
        return JobResult(f"The batches of {type(data).__name__}.{name} have no tensors.")
    proposal = ShapeProposal(seen)
    batches = sum(each.batches for each in seen)
    print(f"{batches} batches of {len(seen)} shape{'' if len(seen) == 1 else 's'}")
    if not proposal.arguments:
        print("No dimension varies: nothing is to be padded.")
        return JobResult()
    print("\n".join(proposal.histograms()))
    print(
        f"\n{proposal.graphs} graphs, and {proposal.waste:.1%} of all elements would be padding:\n"
        f"CUDAGraphCallback({proposal.arguments})"
    )
    if proposal.pad_dims:
        print("The value 0 of the padding is a guess: set the value that the model ignores.")
    return JobResult()


def count_shapes(batches: Iterator[Any]) -> list[SeenShape]:
    """Return the shapes of batches, the most frequent one first."""
    counts: Counter[SeenShape] = Counter()
    for batch in batches:
        named = zip(dotted_paths(batch), flatten(batch)[0], strict=True)
        tensors = [(path, tuple(leaf.shape)) for path, leaf in named if isinstance(leaf, Tensor)]
        if tensors:
            paths, shapes = zip(*tensors, strict=True)
            counts[SeenShape(paths, shapes)] += 1
    return [SeenShape(seen.paths, seen.shapes, number) for seen, number in counts.most_common()]


def _batches(loaders: Any) -> Iterator[Any]:
    for loader in loaders if isinstance(loaders, (list, tuple)) else [loaders]:
        yield from loader
