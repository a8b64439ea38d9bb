"""Operations that PyTorch computes in another way while a dispatch mode is on: a watch has one."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from cg_lightning.backends.dispatch_mode import EagerDispatchMode
from tests.harness import features, predict
from tests.models import Body, Predictor

SETTINGS = [{}, {"verify_replays": 0}, {"verify_replays": 3, "mode": "FULL"}]


def twisted(x: Tensor) -> Tensor:
    """A complex matrix ``(4, 8)``."""
    return torch.complex(x, x.flip(1))


CONJUGATES: dict[str, Callable[[Tensor], Tensor]] = {
    "hfft": lambda x: torch.fft.hfft(twisted(x)),
    "hfft2": lambda x: torch.fft.hfft2(twisted(x)),
    "hfft2 of real numbers": torch.fft.hfft2,
    "hfftn": lambda x: torch.fft.hfftn(twisted(x)),
    "ihfft": lambda x: torch.fft.ihfft(x).abs(),
    "pinv": lambda x: torch.linalg.pinv(twisted(x)).abs(),
    "einsum": lambda x: torch.einsum("ij,kj->ik", twisted(x).conj(), twisted(x)).imag,
    "matmul": lambda x: (twisted(x) @ twisted(x).mH).imag,
    "vdot": lambda x: torch.linalg.vecdot(twisted(x), twisted(x)).real,
    "negative": lambda x: torch.einsum("ij,kj->ik", twisted(x).conj().imag, x),
    "stft": lambda x: torch.stft(x, 4, window=torch.ones_like(x[0, :4]), return_complex=True).imag,
}


class Computes(Predictor):
    """Computes with what its network returns."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__(Body())
        self.function = function

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        output = self.net(batch[0])
        return output, self.function(output)


@pytest.mark.in_turn("settings")
@pytest.mark.parametrize("inference_mode", [True, False])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("name", CONJUGATES)
def test_lazy_conjugates_and_negatives(harness, name, settings, inference_mode):
    """A kernel must not read ``x.conj()`` as if it were ``x``."""
    harness.compare(
        Computes(CONJUGATES[name]),
        predict(features(40)),
        harness.callback(**settings),
        inference_mode=inference_mode,
    )


SPECTRA: dict[str, Callable[[Tensor], Tensor]] = {
    "svdvals": lambda x: torch.linalg.svdvals(x),
    "eigvalsh": lambda x: torch.linalg.eigvalsh(x @ x.mT),
    "cond": lambda x: torch.linalg.cond(x),
    "matrix_norm": lambda x: torch.linalg.matrix_norm(x, "nuc"),
    "norm of a matrix": lambda x: torch.linalg.norm(x, 2),
    "matrix_rank": lambda x: torch.linalg.matrix_rank(x * 1e-3, hermitian=False),
    "torch.norm": lambda x: torch.norm(x, "nuc"),
    "Tensor.norm": lambda x: x.norm("nuc"),
    "norm of vectors": lambda x: torch.linalg.norm(x, 2, dim=1),
    "norm of vectors, by a tuple": lambda x: torch.linalg.norm(x, 2, dim=(1,)),
    "Frobenius norm": lambda x: torch.linalg.matrix_norm(x),
}


@pytest.mark.in_turn("settings")
@pytest.mark.parametrize("inference_mode", [True, False])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("name", SPECTRA)
def test_singular_values_and_eigenvalues(harness, name, settings, inference_mode):
    callback = harness.callback(**settings)
    model = Computes(SPECTRA[name])
    harness.compare(model, predict(features(40)), callback, inference_mode=inference_mode)
    if "norm of vectors" in name or name == "Frobenius norm":
        assert callback.stats.steps_of("predict")["FULL"] >= 5, callback.summary()


class Watches(EagerDispatchMode):
    def dispatch(self, function: Any, args: Any, kwargs: Any) -> Any:
        return self.call(function, args, kwargs)


def test_what_a_mode_sees_of_singular_values():
    """Without such a difference, ``detectors/mode_dependent.py`` does not need ``torch.linalg``."""
    x = torch.randn(8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        eager = torch.linalg.svdvals(x)
        with Watches("cpu").watching():
            assert not torch.equal(torch.linalg.svdvals(x), eager)


OTHERWISE = {
    *("linalg.svdvals", "linalg.eigvalsh", "linalg.cond", "linalg.matrix_norm", "norm"),
    *("linalg.norm", "linalg.matrix_rank"),
}
"""What ``ModeDependent`` computes without a mode."""
UNDEFINED = {
    *("empty", "empty_like", "empty_permuted", "empty_strided", "new_empty", "new_empty_strided"),
    "linalg.lstsq",  # residuals of some drivers do not repeat themselves
}


def copies(values: Any) -> Any:
    return tree_map(lambda x: x.detach().clone() if isinstance(x, Tensor) else x, values)


def results(operation: Any, sample: Any, is_watched: bool, is_inference: bool) -> list[Tensor]:
    torch.manual_seed(0)
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode() if is_inference else torch.no_grad())
        given, args, kwargs = copies((sample.input, sample.args, sample.kwargs))
        if is_watched:
            stack.enter_context(Watches("cpu").watching())
        output = operation(given, *args, **kwargs)
    return [x.resolve_conj().resolve_neg() for x in tree_leaves(output) if isinstance(x, Tensor)]


def are_same(ones: list[Tensor], others: list[Tensor]) -> bool:
    pairs = zip(ones, others, strict=True)
    return all(
        one.dtype == other.dtype and torch.equal(one.nan_to_num(), other.nan_to_num())
        for one, other in pairs
        if one.layout is torch.strided and one.dtype is not torch.complex32
    )


@pytest.mark.exhaustive
@pytest.mark.parametrize("is_inference", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=str)
def test_all_operations_that_pytorch_has_samples_of(dtype, is_inference):
    """A watched operation gives the bits of eager."""
    with warnings.catch_warnings():  # it wants test libraries that are not needed here
        warnings.simplefilter("ignore")
        from torch.testing._internal.common_methods_invocations import op_db
    number, differ = 0, set()
    for operation in op_db:
        if operation.name in OTHERWISE | UNDEFINED or dtype not in operation.supported_dtypes(
            "cpu"
        ):
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for sample in list(operation.sample_inputs("cpu", dtype))[:8]:
                try:
                    eager, again = [results(operation, sample, False, is_inference) for _ in "12"]
                except (RuntimeError, NotImplementedError, AssertionError):  # not here
                    continue
                if not are_same(eager, again):
                    continue
                number += 1
                if not are_same(eager, results(operation, sample, True, is_inference)):
                    differ.add(operation.name)
    assert number > 1000
    assert not differ
