"""What mypy tells users: the code is right, but for the lines that ignore an error of theirs.

Under ``strict``, an ignored error that mypy does not find is an error itself.
"""

import torch
from lightning.pytorch import Trainer

from cg_lightning import (
    BatchDescriptor,
    CaptureError,
    CUDAGraphCallback,
    CUDAGraphMode,
    CUDAGraphWrapper,
    Diagnosis,
    diagnose,
    graphed,
    set_forward_context,
    weak_ref_tensors,
)

callback = CUDAGraphCallback(mode="FULL", stages=("validate",), verify_every=100)
trainer = Trainer(callbacks=[callback])
replays: int = callback.stats.replays
steps: dict[str, int] = callback.stats.steps
text: str = callback.summary()
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


def double(x: torch.Tensor, times: int = 2) -> torch.Tensor:
    """Return the tensor, ``times`` times."""
    return x * times


with graphed(net, mode="FULL", warmup_steps=1, compile={"dynamic": False}, targets=["0"]) as run:
    run(torch.ones(4, 3))
doubled: torch.Tensor = graphed(double, module=net)(torch.ones(2), times=3)
number: str = graphed(double, module=net)(torch.ones(2))  # type: ignore[assignment]
graphed(double, module=net)(4)  # type: ignore[arg-type]
graphed(net, mode="FAST")  # type: ignore[arg-type]
graphed(net, warmup_steps="3")  # type: ignore[arg-type]
graphed(net, stages=["test"])  # type: ignore[call-arg]

weak: torch.Tensor = weak_ref_tensors(doubled)
wrapper = CUDAGraphWrapper(double, CUDAGraphMode.FULL)
with set_forward_context(CUDAGraphMode.FULL, BatchDescriptor(batch_size=4)):
    again: torch.Tensor = wrapper(torch.ones(4, 3), times=3)
    wrapper("ones")  # type: ignore[arg-type]
layer: torch.Tensor = CUDAGraphWrapper(net, CUDAGraphMode.FULL)(torch.ones(4, 3))
