"""The shapes that a stage has seen, and a hint if most of them came too seldom."""

from __future__ import annotations

from cg_lightning.core.descriptor import is_tensor_key
from cg_lightning.core.shape_proposal import FEW_SHAPES, SeenShape, ShapeProposal
from cg_lightning.core.tree import dotted_structure_paths
from cg_lightning.runtime.session import Session


def hint(session: Session, stage: str) -> str:
    """Return which settings would have caught the shapes of a stage, with their histogram.

    Empty if most batches came in shapes that are captured, or if padding would save few graphs.

    Args:
        session: The runtime state of the module.
        stage: The stage.
    """
    settings = session.settings
    is_refused = any(each.stage == stage and each.reason for each in session.stats.padding)
    if settings.proposes_pad_dims or is_refused:
        return ""
    states = [
        state
        for state in session.target.dispatcher.states()
        if state.descriptor.stage == stage and state.sights and state.without_batch is None
    ]
    seen = [
        SeenShape(*_tensors_of(state.descriptor.structure, state.descriptor.leaves), state.sights)
        for state in states
    ]
    eager = max(settings.warmup_steps, 1)
    batches = sum(each.batches for each in seen)
    warmups = sum(
        min(state.sights, eager)
        for state in states
        if all(variant.padding is None for variant in state.variants)
    )
    if len({each.shapes for each in seen}) <= FEW_SHAPES or 2 * warmups <= batches:
        return ""
    proposal = ShapeProposal(seen)
    if 2 * proposal.graphs > len(seen):
        return ""
    lines = [
        f"CUDAGraphCallback: {batches} batches of stage {stage!r} had {len(seen)} shapes, so most "
        "ran eagerly as warm-ups.",
        *proposal.histograms(),
        f"With {proposal.graphs} graphs and {proposal.waste:.0%} padding, shapes that come again "
        f"would run from graphs: CUDAGraphCallback({proposal.arguments}).",
    ]
    if proposal.pad_dims:
        lines.append("The value 0 of the padding is a guess: set the value that the model ignores.")
    return "\n".join(lines)


def _tensors_of(
    structure: object, leaves: tuple[object, ...]
) -> tuple[tuple[str, ...], tuple[tuple[int, ...], ...]]:
    named = zip(dotted_structure_paths(structure), leaves, strict=True)
    tensors = [(path, tuple(leaf[1])) for path, leaf in named if is_tensor_key(leaf)]
    return tuple(path for path, _ in tensors), tuple(shape for _, shape in tensors)
