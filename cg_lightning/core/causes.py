"""Causes: why a step cannot run from a graph, with a remedy for each."""

from __future__ import annotations

import enum


class Cause(enum.Enum):
    """Why a step or a submodule cannot run from a graph. Users read the values."""

    HOST_SYNC = "host sync"
    CROSS_DEVICE_COPY = "copy across devices"
    TENSOR_FROM_PYTHON = "tensor made from Python values"
    DATA_DEPENDENT_SHAPE = "data-dependent shape"
    HOST_CHECKED_LINEAR_ALGEBRA = "linear algebra checked on the host"
    COLLECTIVE = "collective"
    INPUT_MUTATED = "input mutated in place"
    FORWARD_HOOK = "forward hook"
    PROFILER_HOOK = "hooks of a profiler"
    METRIC_UPDATED = "metric updated"
    LOGGED = "self.log called"
    STATE_REBOUND = "module state rebound"
    OPAQUE = "opaque object used"
    BATCH_INDEX_USED = "batch_idx used"
    TRAINER_READ = "Trainer read"
    PRINTED = "logger or print used"
    WORLD = "files, processes or sockets used"
    HOST_RANDOMNESS = "randomness drawn on the host"
    GRADIENTS = "gradients enabled"
    ROWS_NOT_INDEPENDENT = "rows not independent"
    POSITIONS_NOT_INDEPENDENT = "positions not independent"
    PADDING_TOO_LARGE = "no memory for the padded batch"
    BACKWARD = "backward outside the graph"
    GRAPHED_ALREADY = "CUDA graphs of its own"

    @property
    def remedy(self) -> str:
        """The remedy, in the user's code."""
        return _REMEDIES[self]


_REMEDIES = {
    Cause.HOST_SYNC: "log or append the tensor itself, read it after the epoch",
    Cause.CROSS_DEVICE_COPY: "move it before the step, or register it as a buffer",
    Cause.TENSOR_FROM_PYTHON: "make the tensor once, as a buffer",
    Cause.DATA_DEPENDENT_SHAPE: (
        "use an operation with a fixed shape: torch.where, masked_fill, a known length"
    ),
    Cause.HOST_CHECKED_LINEAR_ALGEBRA: (
        "use the variant with the suffix _ex, which checks nothing on the host"
    ),
    Cause.COLLECTIVE: "gather after the step",
    Cause.INPUT_MUTATED: "work on a copy of the input",
    Cause.FORWARD_HOOK: (
        "make it a function or a method of the module that keeps nothing itself; no graph of a "
        "submodule holds a hook"
    ),
    Cause.PROFILER_HOOK: "profile without module names: PyTorchProfiler(record_module_names=False)",
    Cause.METRIC_UPDATED: (
        "update it in the step, not in a submodule, and log the metric, not its value; "
        "use a metric that keeps tensors and nothing in Python"
    ),
    Cause.LOGGED: "log in the step, not in a submodule",
    Cause.STATE_REBOUND: (
        "append to it, add to it or set it, and read it in a hook; write buffers in place"
    ),
    Cause.OPAQUE: "use it in a hook, and give the step the value: in an attribute or in the batch",
    Cause.BATCH_INDEX_USED: "put what depends on the batch's number into the batch, or into a hook",
    Cause.TRAINER_READ: (
        "in a hook, log it, or write what the step needs into a buffer in place, and read that"
    ),
    Cause.PRINTED: "print and log in a hook",
    Cause.WORLD: "read and write in a hook",
    Cause.HOST_RANDOMNESS: "draw on the device: torch.rand(..., device=x.device)",
    Cause.GRADIENTS: "compute gradients outside what should be graphed",
    Cause.ROWS_NOT_INDEPENDENT: (
        "leave capture_sizes out, or compute values of the whole batch outside the step"
    ),
    Cause.POSITIONS_NOT_INDEPENDENT: (
        "give the step a mask of the padding and pad it with the value that hides a position"
    ),
    Cause.PADDING_TOO_LARGE: "pad to smaller sizes",
    Cause.BACKWARD: (
        "return a loss that depends on parameters of the module alone; read gradients in a hook"
    ),
    Cause.GRAPHED_ALREADY: (
        "leave graphs to the callback, or compile with mode='default' or "
        "'max-autotune-no-cudagraphs'"
    ),
}


KEPT_STATES = "a checkpoint that keeps random states"
"""What activation checkpointing does with ``preserve_rng_state``."""
NO_SUBMODULE = "a metric that is no submodule"
"""What is updated: a metric in a closure, a global or a class."""
REMEDIES_OF_OPERATIONS = {
    NO_SUBMODULE: "make it an attribute of the module, or keep it in an object, list or dict there",
    KEPT_STATES: "checkpoint(..., preserve_rng_state=False), if nothing in it draws",
    "Tensor.cpu": "read the copy after the epoch, or compute on the device",
    "Tensor.tolist": "append the tensor and read it after the epoch, or put the list in the batch",
    "aten::is_nonzero": "compare on the device (torch.where, torch.minimum), or after the epoch",
    "aten::ctc_loss": "return its arguments, and compute it in on_validation_batch_end",
    "aten::_nested_tensor_from_mask_left_aligned": (
        "make the nn.TransformerEncoder with enable_nested_tensor=False"
    ),
    "aten::_pack_padded_sequence": "mask the padding, and do not pack the sequences",
    "aten::one_hot": "give num_classes",
    "aten::repeat_interleave": "give output_size",
    "aten::bincount": "count with a fixed length: one_hot(x, num_classes).sum(0)",
    "aten::_unique2": "loop over range(num_classes) instead of unique()",
    "aten::unique_consecutive": "compare neighbours: x[1:] != x[:-1]",
    "aten::masked_select": "use torch.where(mask, x, 0) and mask.sum()",
    "aten::index": "use torch.where(mask, x, 0) and mask.sum()",
    "aten::nonzero": "use the mask itself, or torch.nonzero_static(x, size=...)",
}
"""What the user can do about one operation, if that is more than the remedy of its cause."""
