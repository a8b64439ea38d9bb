"""The texts of PyTorch that decide something are written by PyTorch here, and in one file only."""

from __future__ import annotations

import ast
import warnings
from pathlib import Path

import pytest
import torch

from cg_lightning.backends.texts_of_pytorch import (
    is_of_cusolver,
    is_sync_warning,
    needs_compilation,
)

PACKAGE = Path(__file__).parent.parent / "cg_lightning"


@pytest.mark.parametrize("is_compiled_before", [False, True])
def test_the_stance_that_forbids_to_compile(is_compiled_before):
    compiled = torch.compile(lambda x: x + 1, backend="eager")
    if is_compiled_before:
        compiled(torch.ones(2))
    stance = torch.compiler.set_stance("fail_on_recompile")
    with stance, pytest.raises(RuntimeError) as caught:
        compiled(torch.ones(2, 3, dtype=torch.float64))
    assert needs_compilation(caught.value)
    assert not needs_compilation(RuntimeError("another error"))


@pytest.mark.gpu
def test_the_sync_debug_mode():
    x = torch.ones(2, device="cuda")
    mode = torch.cuda.get_sync_debug_mode()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            x.sum().item()
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    assert [each for each in caught if is_sync_warning(each.message)]


@pytest.mark.gpu
def test_cusolver_in_a_capture():
    from cg_lightning import CaptureError
    from cg_lightning.backends import resolve_backend

    x = torch.eye(3, device="cuda")
    torch.linalg.eigh(x)
    with pytest.raises(CaptureError) as caught:
        resolve_backend("cuda").capture(
            lambda: torch.linalg.eigh(x), collect_garbage=False, capture_error_mode="thread_local"
        )
    error = caught.value.__cause__
    assert is_of_cusolver(error), repr(error)
    assert torch.linalg.eigh(x).eigenvalues.tolist() == [1.0, 1.0, 1.0]  # the handle is repaired


def files_that_look_into_texts() -> list[str]:
    """Files that compare a part of ``str(error)``."""
    return [
        path.name
        for path in PACKAGE.rglob("*.py")
        if any(
            isinstance(node, ast.Compare)
            and any(isinstance(each, (ast.In, ast.NotIn, ast.Eq, ast.NotEq)) for each in node.ops)
            and any(
                isinstance(side, ast.Call)
                and isinstance(side.func, ast.Name)
                and side.func.id == "str"
                for side in (node.left, *node.comparators)
            )
            for node in ast.walk(ast.parse(path.read_text()))
        )
    ]


def test_no_other_file_decides_by_texts():
    assert files_that_look_into_texts() == ["texts_of_pytorch.py"]
