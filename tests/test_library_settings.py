"""Settings that functions of PyTorch read in Python: graphs freeze them, so guards compare."""

from __future__ import annotations

import os
import resource
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.distributions import Distribution, Exponential, HalfNormal, Laplace, Normal

from tests.harness import assert_same, features, loader, predict
from tests.models import Predictor

MODES = ["FULL", "PIECEWISE", "FULL_AND_PIECEWISE"]


@pytest.fixture(autouse=True)
def fast_path() -> Iterator[None]:
    before = torch.backends.mha.get_fastpath_enabled()
    yield
    torch.backends.mha.set_fastpath_enabled(before)


class Sets(Callback):
    """Calls a function with a value before the first batch, and with another before the sixth."""

    def __init__(self, set_value: Callable[[Any], None], first: Any, then: Any) -> None:
        self._set_value = set_value
        self._values = {0: first, 5: then}

    def on_predict_batch_start(self, trainer, pl_module, batch, batch_idx, *_: Any) -> None:
        if batch_idx in self._values:
            self._set_value(self._values[batch_idx])


class Checks(nn.Module):
    """What PyTorch checks in a submodule."""

    def __init__(self, check: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8, bias=False)
        nn.init.eye_(self.layer.weight)
        self.check = check

    def forward(self, x: Tensor) -> Any:
        return self.check(self.layer(x))


class Calls(Predictor):
    def predict_step(self, batch: Any) -> Any:
        return self.net(batch[0])


class Own(Normal):
    """A distribution of the user's."""

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        return -((value - self.loc) ** 2)


KEPT = Exponential(torch.ones(8))
CHECKS: dict[str, Callable[[Tensor], Any]] = {
    "scale": lambda x: Normal(x, x).log_prob(x),
    "loc": lambda x: Laplace(x.sqrt(), 1.0).log_prob(x),
    "sample": lambda x: Exponential(torch.ones_like(x)).log_prob(x),
    "half": lambda x: HalfNormal(x).log_prob(x.abs()),
    "own": lambda x: Own(x, 1.0).log_prob(x.sqrt()),
}


def outcomes(harness, check: Callable[[Tensor], Any], values: tuple[bool, bool], **settings: Any):
    x = torch.rand(40, 8, generator=torch.Generator().manual_seed(3)) + 0.1
    x[24:28] = -x[24:28]
    found = []
    for extra in ([harness.callback(**settings)], []):
        sets = Sets(Distribution.set_default_validate_args, *values)
        try:
            found.append(predict(loader(x))(harness.trainer(*extra, sets), Calls(Checks(check))))
        except ValueError as error:
            found.append(str(error))
    return found


@pytest.mark.in_turn("verify_replays")
@pytest.mark.parametrize("verify_replays", [0, 2])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("values", [(True, False), (False, True)])
@pytest.mark.parametrize("name", list(CHECKS))
def test_distributions_check_when_eager_does(harness, name, values, mode, verify_replays):
    """The first call of compiled code turns the checks off, for the process."""
    settings = {"mode": mode, "verify_replays": verify_replays}
    with_callback, eager = outcomes(harness, CHECKS[name], values, **settings)
    assert isinstance(eager, str) is values[1]
    assert_same(with_callback, eager)


@pytest.mark.parametrize("values", [(True, False), (False, True)])
def test_a_distribution_that_was_made_before(harness, values):
    if harness.backend == "cuda":
        pytest.skip("its parameters are on the host")
    with_callback, eager = outcomes(harness, lambda x: KEPT.log_prob(x), values, verify_replays=0)
    assert isinstance(eager, str) is values[1]
    assert_same(with_callback, eager)


def test_without_a_change_the_guard_costs_no_graph(harness):
    callback = harness.callback()
    model = Calls(Checks(lambda x: Normal(x, x.exp()).log_prob(x)))
    harness.compare(model, predict(features(32)), callback)
    assert callback.stats.steps["FULL"] == 5, callback.summary()


@pytest.mark.parametrize("verify_replays", [0, 2])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("values", [(True, False), (False, True)])
def test_the_fast_path_of_attention(harness, values, mode, verify_replays):
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    callback = harness.callback(mode=mode, verify_replays=verify_replays)
    sets = lambda: [Sets(torch.backends.mha.set_fastpath_enabled, *values)]
    data = loader(torch.randn(40, 5, 8, generator=torch.Generator().manual_seed(3)))
    harness.compare(Calls(layer), predict(data), callback, sets)


class Asks(nn.Module):
    """Scales by what code outside of the module tells."""

    def __init__(self, ask: Callable[[], float]) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.ask = ask

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * self.ask()


def divides() -> float:
    try:
        return float(np.isinf(np.float64(1) / np.float64(0)))
    except FloatingPointError:
        return 3.0


def warns() -> float:
    try:
        warnings.warn("this is shown", DeprecationWarning, stacklevel=1)
    except DeprecationWarning:
        return 2.0
    return 1.0


def casts() -> float:
    with torch.autocast("cpu"):
        return 1.0 + (torch.get_autocast_dtype("cpu") is torch.bfloat16)


def starts(is_wanted: bool) -> None:
    """Start a thread, or end it."""
    if is_wanted:
        THREADS.append(threading.Timer(1000, print))
        THREADS[0].daemon = True
        THREADS[0].start()
    elif THREADS:
        thread = THREADS.pop()
        thread.cancel()
        thread.join()


def sets_precision(holder: Any, is_on: bool) -> None:
    """Set one precision, while those of kernels of the device are given."""
    for operation in ("matmul", "conv", "rnn"):
        torch._C._set_fp32_precision_setter("cuda", operation, "ieee")
    holder.fp32_precision = "tf32" if is_on else "ieee"


KERNELS = ("auto", "native")
THREADS: list[threading.Timer] = []
NAMES = {True: "first", False: "another thread"}
MKLDNN = torch.backends.mkldnn
KEPT_OUT_OF_SIGHT: dict[str, tuple[Callable[[], Any], Callable[[bool], Any]]] = {
    "numpy.geterr": (
        lambda: 1.0 + (np.geterr()["over"] == "warn"),
        lambda value: np.seterr(over="warn" if value else "ignore"),
    ),
    "numpy.seterr": (divides, lambda value: np.seterr(divide="raise" if value else "ignore")),
    "numpy.set_printoptions": (
        lambda: float(len(str(np.ones(1) / 3))),
        lambda value: np.set_printoptions(precision=4 if value else 8),
    ),
    "warnings": (
        warns,
        lambda value: warnings.simplefilter("error" if value else "ignore", DeprecationWarning),
    ),
    "umask": (lambda: float(os.umask(0o22)), lambda value: os.umask(0o22 if value else 0o77)),
    "threads": (lambda: float(threading.active_count()), starts),
    "name of the thread": (
        lambda: float(len(threading.current_thread().name)),
        lambda value: setattr(threading.current_thread(), "name", NAMES[value]),
    ),
    "digits": (
        lambda: float(sys.get_int_max_str_digits()),
        lambda value: sys.set_int_max_str_digits(4300 if value else 5000),
    ),
    "resource": (
        lambda: float(resource.getrlimit(resource.RLIMIT_NOFILE)[0]),
        lambda value: resource.setrlimit(
            resource.RLIMIT_NOFILE,
            (FILES[0] - value, resource.getrlimit(resource.RLIMIT_NOFILE)[1]),
        ),
    ),
    "a property of a module": (
        lambda: 1.0 + torch.utils.deterministic.fill_uninitialized_memory,
        lambda value: setattr(torch.utils.deterministic, "fill_uninitialized_memory", value),
    ),
    "torch.backends.mkldnn": (
        lambda: 1.0 + MKLDNN.enabled,
        lambda value: setattr(MKLDNN, "enabled", value),
    ),
    "precision of cuDNN": (
        lambda: 1.0 + (torch.backends.cudnn.fp32_precision == "tf32"),
        lambda value: sets_precision(torch.backends.cudnn, value),
    ),
    "precision of mkldnn": (
        lambda: 1.0 + (MKLDNN.conv.fp32_precision == "tf32"),
        lambda value: sets_precision(MKLDNN.conv, value),
    ),
    "precision of matrix products": (
        lambda: float(len(torch.get_float32_matmul_precision())),
        lambda value: torch.set_float32_matmul_precision("high" if value else "medium"),
    ),
    "cache of autocast": (
        lambda: 1.0 + torch.is_autocast_cache_enabled(),
        torch.set_autocast_cache_enabled,
    ),
    "type of autocast": (
        casts,
        lambda value: torch.set_autocast_dtype("cpu", torch.bfloat16 if value else torch.float16),
    ),
    "sharing of tensors": (
        lambda: float(len(torch.multiprocessing.get_sharing_strategy())),
        lambda value: torch.multiprocessing.set_sharing_strategy(
            "file_system" if value else "file_descriptor"
        ),
    ),
}
HAS_KERNELS = hasattr(torch._C, "_set_cudnn_depthwise_kernel")  # not in older versions
if HAS_KERNELS:
    KEPT_OUT_OF_SIGHT["depthwise_kernel"] = (
        lambda: float(len(torch.backends.cudnn.depthwise_kernel)),
        lambda value: setattr(torch.backends.cudnn, "depthwise_kernel", KERNELS[value]),
    )
KEPT_OUT_OF_SIGHT["torch.backends.opt_einsum"] = (
    lambda: 1.0 + bool(torch.backends.opt_einsum.enabled),
    lambda value: setattr(OPT_EINSUM, "enabled", value),
)
OPT_EINSUM = vars(torch.backends.opt_einsum)["m"]
"""Its own setter refuses without another package."""
WAS_ENABLED = OPT_EINSUM.enabled
FILES = resource.getrlimit(resource.RLIMIT_NOFILE)


PRECISIONS = [
    *(("generic", "all"), ("cuda", "all"), ("mkldnn", "all")),
    *((backend, kind) for backend in ("cuda", "mkldnn") for kind in ("matmul", "conv", "rnn")),
]


@pytest.fixture
def kept_settings() -> Iterator[None]:
    precisions = [torch._C._get_fp32_precision_getter(*each) for each in PRECISIONS]
    name = threading.current_thread().name
    digits, strategy = sys.get_int_max_str_digits(), torch.multiprocessing.get_sharing_strategy()
    umask = os.umask(0o22)
    with np.errstate(), np.printoptions(), warnings.catch_warnings():
        yield
    starts(False)
    os.umask(umask)
    threading.current_thread().name = name
    sys.set_int_max_str_digits(digits)
    torch.multiprocessing.set_sharing_strategy(strategy)
    resource.setrlimit(resource.RLIMIT_NOFILE, FILES)
    MKLDNN.enabled = True
    if HAS_KERNELS:
        torch.backends.cudnn.depthwise_kernel = "auto"
    for each, precision in zip(PRECISIONS, precisions, strict=True):
        torch._C._set_fp32_precision_setter(*each, precision)
    OPT_EINSUM.enabled = WAS_ENABLED
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.set_autocast_cache_enabled(True)
    torch.set_autocast_dtype("cpu", torch.bfloat16)


@pytest.mark.in_turn("mode")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("values", [(True, False), (False, True)])
@pytest.mark.parametrize("name", KEPT_OUT_OF_SIGHT)
def test_what_no_name_in_python_refers_to(harness, kept_settings, name, values, mode):
    ask, set_value = KEPT_OUT_OF_SIGHT[name]
    results = []
    for value in values:
        set_value(value)
        results.append(ask())
    assert results[0] != results[1], "a difference would not be seen"
    callback = harness.callback(mode=mode, verify_replays=0)
    harness.compare(
        Calls(Asks(ask)), predict(features(40)), callback, lambda: [Sets(set_value, *values)]
    )


@pytest.mark.parametrize("use", [divides, warns, casts], ids=lambda use: use.__name__)
def test_without_a_change_these_guards_cost_no_graph(harness, kept_settings, use):
    np.seterr(divide="ignore")
    warnings.simplefilter("ignore", DeprecationWarning)
    callback = harness.callback()
    harness.compare(Calls(Asks(use)), predict(features(32)), callback)
    assert callback.stats.steps["FULL"] == 5, callback.summary()


class Contracts(Predictor):
    def predict_step(self, batch: Any) -> Tensor:
        x = self.net(batch[0])
        return torch.einsum("ab,ac,ad->bcd", x, x, x)


def prefers(name: str, value: str) -> Callable[[Any], Any]:
    def change(is_on: bool) -> None:
        getattr(torch._C, f"_set_{name}_preferred_backend")(
            getattr(
                getattr(torch._C, f"_{name.capitalize()}Backend"), value if is_on else "Default"
            )
        )

    return change


CHANGES: dict[str, tuple[Callable[[bool], Any], str]] = {
    "blas": (prefers("blas", "Cublaslt"), "torch.backends.cuda.preferred_blas_library"),
    "linalg": (prefers("linalg", "Magma"), "torch.backends.cuda.preferred_linalg_library"),
    "filled": (
        lambda value: setattr(torch.utils.deterministic, "fill_uninitialized_memory", not value),
        "torch.utils.deterministic.fill_uninitialized_memory",
    ),
    "depthwise": (
        lambda value: setattr(torch.backends.cudnn, "depthwise_kernel", KERNELS[value]),
        "torch.backends.cudnn.depthwise_kernel",
    ),
    "einsum": (
        lambda value: setattr(OPT_EINSUM, "enabled", value),
        "torch.backends.opt_einsum.enabled",
    ),
}


@pytest.fixture
def kept_preferences() -> Iterator[None]:
    before = torch._C._get_blas_preferred_backend(), torch._C._get_linalg_preferred_backend()
    yield
    torch._C._set_blas_preferred_backend(before[0])
    torch._C._set_linalg_preferred_backend(before[1])


CAN_PREFER = ["blas", "linalg"] if torch.version.cuda else []
"""Without CUDA, PyTorch refuses to set these."""


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", [*CAN_PREFER, "filled", *["depthwise"] * HAS_KERNELS, "einsum"])
def test_what_kernels_ask_for(harness, kept_settings, kept_preferences, name, mode):
    """No key has these, and no name in Python is read; a graph holds what was chosen before."""
    change, path = CHANGES[name]
    if name == "einsum" and mode == "PIECEWISE":
        mode = "FULL"  # it is not in a submodule
    callback = harness.callback(mode=mode, verify_replays=0, warmup_steps=1)
    names = ["_set_blas_preferred_backend", "_set_linalg_preferred_backend"]
    setters = [getattr(torch._C, each) for each in names]
    harness.compare(
        Contracts(Checks(lambda x: x)),
        predict(features(48)),
        callback,
        lambda: [Sets(change, False, True)],
    )
    assert [getattr(torch._C, each) for each in names] == setters
    entries = callback.stats.to_dict()["entries"]
    assert sum(entry["captures"] for entry in entries) == 2, callback.summary()
    if mode != "PIECEWISE":
        assert any(path in str(entry["why_again"]) for entry in entries), callback.summary()


def test_a_preference_that_changes_between_two_stages(harness, kept_settings):
    change, path = CHANGES["filled"]
    change(False)

    class Changes(Callback):
        def on_validation_end(self, trainer, pl_module) -> None:
            change(True)

    class Validates(Contracts):
        def validation_step(self, batch: Any) -> Tensor:
            return self.net(batch[0])

        def training_step(self, batch: Any) -> Tensor:
            return self.net(batch[0]).mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.1)

    callback = harness.callback(verify_replays=0, warmup_steps=1)
    trainer = harness.trainer(callback, Changes(), max_epochs=2, num_sanity_val_steps=0)
    trainer.fit(Validates(Checks(lambda x: x)), features(8), features(48))
    again = [str(entry["why_again"]) for entry in callback.stats.to_dict()["entries"]]
    assert any(path in each for each in again), callback.summary()
