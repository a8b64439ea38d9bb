"""The modes and their names."""

import pytest

from cg_lightning import CUDAGraphMode


@pytest.mark.parametrize(
    ("mode", "runtime", "full", "piecewise"),
    [
        ("NONE", True, False, False),
        ("piecewise", True, False, True),
        ("Full", True, True, False),
        ("full_and_piecewise", False, True, True),
    ],
)
def test_questions_one_asks_of_a_mode(mode, runtime, full, piecewise):
    parsed = CUDAGraphMode.parse(mode)
    assert parsed.is_valid_runtime_mode() is runtime
    assert parsed.has_full_cudagraphs() is full
    assert parsed.has_piecewise_cudagraphs() is piecewise
    assert CUDAGraphMode.parse(parsed) is parsed


@pytest.mark.parametrize("mode", ["fast", "", None, 2])
def test_unknown_mode_lists_the_choices(mode):
    with pytest.raises(ValueError, match="NONE, PIECEWISE, FULL, FULL_AND_PIECEWISE") as caught:
        CUDAGraphMode.parse(mode)
    assert repr(mode) in str(caught.value)
