"""The diagnosis of an operation agrees with a real capture."""

from __future__ import annotations

import torch
from torch import nn

from cg_lightning import (
    BatchDescriptor,
    CaptureError,
    CUDAGraphMode,
    CUDAGraphOptions,
    CUDAGraphWrapper,
    diagnose,
    set_forward_context,
)
from tests.operations import MADE_BEFORE, OPERATIONS

# limit for operations that can be captured and that the diagnosis calls unclean
TOO_CAREFUL = 2


class Runs(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(8))  # what a network computes is no host value
        self.name = name

    def forward(self, x):
        return OPERATIONS[self.name](x @ self.weight)


def is_captured(name: str, x: torch.Tensor, backend: str) -> bool:
    step = Runs(name).to(x.device)
    options = CUDAGraphOptions(gc_disable=True)  # the collection takes longer than the test
    wrapper = CUDAGraphWrapper(
        lambda x: (step(x), None)[1], CUDAGraphMode.FULL, options, backend=backend
    )
    with torch.inference_mode():
        step(x)  # the first run makes the handles of libraries
        with set_forward_context(CUDAGraphMode.FULL, BatchDescriptor(batch_size=8)):
            try:
                wrapper(x)
            except CaptureError:
                return False
    return True


def test_the_diagnosis_agrees_with_captures(backend, device, capsys):
    torch.manual_seed(0)
    x = torch.randn(8, 8, device=device)
    # all diagnoses first: a capture that fails inside cuSOLVER leaves a broken handle
    clean = {name: diagnose(Runs(name).to(device), x).capturable() for name in OPERATIONS}
    rows = {name: (clean[name], is_captured(name, x, backend)) for name in OPERATIONS}
    assert len(rows) >= 100
    with capsys.disabled():
        agreed = sum(clean is captured for clean, captured in rows.values())
        print(f"\n{backend}: the diagnosis agrees with {agreed} of {len(rows)} captures")
    called_clean = [name for name, (clean, captured) in rows.items() if clean and not captured]
    called_unclean = [name for name, (clean, captured) in rows.items() if captured and not clean]
    assert called_clean == list(MADE_BEFORE)
    assert len(called_unclean) <= TOO_CAREFUL, called_unclean
