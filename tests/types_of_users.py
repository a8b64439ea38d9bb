"""What mypy tells users: the code is right, but for the lines that ignore an error of theirs.

Under ``strict``, an ignored error that mypy does not find is an error itself.
"""

import torch
from lightning.pytorch import Trainer
from matplotlib.figure import Figure

from cg_lightning import (
    BatchDescriptor,
    CaptureError,
    CUDAGraphCallback,
    CUDAGraphDispatcher,
    CUDAGraphEntry,
    CUDAGraphError,
    CUDAGraphMode,
    CUDAGraphOptions,
    CUDAGraphWrapper,
    Diagnosis,
    ForwardContext,
    Graphed,
    IllegalOperationError,
    UnkeyableBatchError,
    VerificationError,
    __version__,
    compilation_counter,
    diagnose,
    get_forward_context,
    graphed,
    is_forward_context_available,
    override_forward_context,
    set_cudagraph_capturing_enabled,
    set_forward_context,
    validate_cudagraph_capturing_enabled,
    weak_ref_tensors,
)

callback = CUDAGraphCallback(mode="FULL", stages=("validate",), verify_every=100)
trainer = Trainer(callbacks=[callback])
version: str = __version__
replays: int = callback.stats.replays
steps: dict[str, int] = callback.stats.steps
text: str = callback.summary()
figure: Figure = callback.stats.plot("validate")
sizes: list[int] = [graph.num_bytes for graph in callback.graphs("FULL")]
CUDAGraphCallback(options=CUDAGraphOptions(gc_disable=True))
CUDAGraphOptions(gc_disable="yes")  # type: ignore[arg-type]
CUDAGraphCallback(mode="FAST")  # type: ignore[arg-type]
CUDAGraphCallback(stages=["validation"])  # type: ignore[list-item]
CUDAGraphCallback(warmup=3)  # type: ignore[call-arg]

net = torch.nn.Linear(3, 2)
found: Diagnosis = diagnose(net, torch.ones(4, 3))
remedies: list[str] = [finding.remedy for finding in found.findings]
diagnose(net, torch.ones(4, 3), stage="validation")  # type: ignore[arg-type]


def cause_of(error: CaptureError) -> str:
    """Return what an error says."""
    return "" if error.diagnosis is None else error.diagnosis.findings[0].remedy


def sentence_of(error: CUDAGraphError) -> str:
    """Return what an error says."""
    if isinstance(error, UnkeyableBatchError):
        return error.path
    known = isinstance(error, (IllegalOperationError, VerificationError))
    return str(error) if known else ""


def double(x: torch.Tensor, times: int = 2) -> torch.Tensor:
    """Return the tensor, ``times`` times."""
    return x * times


with graphed(
    net, mode="PIECEWISE", warmup_steps=1, compile={"dynamic": False}, targets=["0"]
) as run:
    run(torch.ones(4, 3))
doubled: torch.Tensor = graphed(double, module=net)(torch.ones(2), times=3)
number: str = graphed(double, module=net)(torch.ones(2))  # type: ignore[assignment]
graphed(double, module=net)(4)  # type: ignore[arg-type]
graphed(net, mode="FAST")  # type: ignore[arg-type]
graphed(net, warmup_steps="3")  # type: ignore[arg-type]
graphed(net, stages=["test"])  # type: ignore[call-arg]

bound: Graphed[[torch.Tensor], torch.Tensor] = graphed(net.forward)
logits: torch.Tensor = bound(torch.ones(4, 3))

weak: torch.Tensor = weak_ref_tensors(doubled)
wrapper = CUDAGraphWrapper(double, CUDAGraphMode.FULL)
with set_forward_context(CUDAGraphMode.FULL, BatchDescriptor(batch_size=4)):
    again: torch.Tensor = wrapper(torch.ones(4, 3), times=3)
    wrapper("ones")  # type: ignore[arg-type]
    context: ForwardContext = get_forward_context()
    key: BatchDescriptor | None = context.batch_descriptor
    with override_forward_context(None):
        is_there: bool = is_forward_context_available()
entries: dict[BatchDescriptor, CUDAGraphEntry] = wrapper.concrete_cudagraph_entries
captures: int = compilation_counter.num_cudagraph_captured
set_cudagraph_capturing_enabled(True)
validate_cudagraph_capturing_enabled()
dispatcher = CUDAGraphDispatcher(CUDAGraphMode.FULL)
dispatcher.add_cudagraph_key("FULL", BatchDescriptor())  # type: ignore[arg-type]
mode: CUDAGraphMode = dispatcher.dispatch(BatchDescriptor(batch_size=8)).runtime_mode
layer: torch.Tensor = CUDAGraphWrapper(net, CUDAGraphMode.FULL)(torch.ones(4, 3))
