"""All options: type, default, meaning, and checks.

The callback builds :class:`Settings` from its arguments, and the schema for Hydra is made of the
same fields.
"""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Mapping, Sequence
from types import NoneType
from typing import Any, Literal, get_args

from cg_lightning.core.modes import CUDAGraphMode
from cg_lightning.core.pad_rules import PROPOSED, PadDims, check_pad_dims, check_sizes
from cg_lightning.core.stages import EVALUATING, STEP_METHODS

ModeName = Literal["NONE", "PIECEWISE", "FULL", "FULL_AND_PIECEWISE"]
StageName = Literal["validate", "test", "predict", "train"]
EvaluatingStageName = Literal["validate", "test", "predict"]
BackendName = Literal["auto", "cuda", "recorder"]
CaptureErrorMode = Literal["global", "thread_local", "relaxed"]
Tolerance = Literal["exact", "close"]

BACKENDS: tuple[str, ...] = get_args(BackendName)
CAPTURE_ERROR_MODES: tuple[str, ...] = get_args(CaptureErrorMode)
COMPILE_ARGUMENTS = ("fullgraph", "dynamic", "backend", "mode", "options")
GRAPHING_COMPILE_MODES = ("reduce-overhead", "max-autotune")
"""Modes of ``torch.compile`` in which the compiler makes CUDA graphs of its own."""
TOLERANCES: tuple[str, ...] = get_args(Tolerance)


def check_names(
    argument: str, value: Sequence[str] | str, choices: Sequence[str] | None
) -> tuple[str, ...]:
    """Return the names as a tuple; a single name may be given as a string.

    Raises:
        ValueError: The value is no sequence of strings, is empty, or has a name that is not among
            ``choices``.
    """
    names = (
        (value,) if isinstance(value, str) else tuple(value) if isinstance(value, Sequence) else ()
    )
    expected = "names" if choices is None else f"some of {', '.join(choices)}"
    if not names:
        raise ValueError(
            f"{argument}={value!r} is no name and no list of names; expected {expected}."
        )
    for name in names:
        if not isinstance(name, str) or (choices is not None and name not in choices):
            choose = "expected names" if choices is None else f"choose from {', '.join(choices)}"
            raise ValueError(f"{argument}={value!r}: {name!r} is unknown; {choose}.")
    return names


def check_at_least(argument: str, value: int, least: int) -> int:
    """Return the number.

    Raises:
        ValueError: The value is no whole number, or it is less than ``least``.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{argument}={value!r} must be a whole number of at least {least}.")
    return value


def check_share(argument: str, value: float) -> float:
    """Return the number.

    Raises:
        ValueError: The value is no number, is less than 0, or is 1 or more.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise ValueError(f"{argument}={value!r} must be a number of at least 0 and less than 1.")
    return value


def check_bool(argument: str, value: bool, expected: str = "True or False") -> bool:
    """Return the value.

    Raises:
        ValueError: The value is neither True nor False.
    """
    if not isinstance(value, bool):
        raise ValueError(f"{argument}={value!r} must be {expected}.")
    return value


def check_name(argument: str, value: str, choices: Sequence[str]) -> str:
    """Return the value.

    Raises:
        ValueError: The value is not among ``choices``.
    """
    if value not in choices:
        raise ValueError(f"{argument}={value!r} is unknown; choose from {', '.join(choices)}.")
    return value


def _check_compile(value: bool | Mapping[str, Any]) -> None:
    """Check the arguments of ``torch.compile``.

    Raises:
        ValueError: The value is neither a bool nor a mapping, names an argument that does not
            exist, gives one a value of another type, or asks for the compiler's own CUDA graphs.
    """
    if isinstance(value, bool):
        return
    if not isinstance(value, Mapping):
        raise ValueError(
            f"compile={value!r} must be True, False or arguments of torch.compile, for example "
            "compile={'dynamic': False}."
        )
    unknown = [name for name in value if name not in COMPILE_ARGUMENTS]
    if unknown:
        raise ValueError(
            f"compile={dict(value)!r}: {unknown[0]!r} is unknown; choose from "
            f"{', '.join(COMPILE_ARGUMENTS)}."
        )
    _check_compile_values(value)
    has_graphs = (value.get("options") or {}).get("triton.cudagraphs")
    is_graphing = (
        value.get("mode") in GRAPHING_COMPILE_MODES or value.get("backend") == "cudagraphs"
    )
    if is_graphing or has_graphs:
        raise ValueError(
            f"compile={dict(value)!r} asks for the compiler's own CUDA graphs, which cannot be "
            "part of ours; choose mode='default' or mode='max-autotune-no-cudagraphs'."
        )
    _check_compile_names(value)


def _check_compile_values(given: Mapping[str, Any]) -> None:
    """Check the types of the arguments of ``torch.compile``.

    Raises:
        ValueError: A value has another type, or a mode and options are given.
    """
    for name, kinds, expected in (
        ("fullgraph", bool, "True or False"),
        ("dynamic", (bool, NoneType), "True, False or None"),
        ("mode", (str, NoneType), "the name of a mode"),
        ("options", (Mapping, NoneType), "a dictionary of options"),
    ):
        if name in given and not isinstance(given[name], kinds):
            raise ValueError(f"compile={dict(given)!r}: {name}={given[name]!r} must be {expected}.")
    if "backend" in given and not (isinstance(given["backend"], str) or callable(given["backend"])):
        raise ValueError(
            f"compile={dict(given)!r}: backend={given['backend']!r} must be a name or a function."
        )
    if given.get("mode") is not None and given.get("options") is not None:
        raise ValueError(
            f"compile={dict(given)!r}: torch.compile takes a mode or options, not both; leave one "
            "out."
        )


def _check_compile_names(given: Mapping[str, Any]) -> None:
    """Let ``torch.compile`` check its modes, backends and options. It compiles nothing yet.

    Raises:
        ValueError: It does not know one of them.
    """
    if not any(given.get(name) for name in ("mode", "backend", "options")):
        return
    import torch  # it takes seconds, and this module is also imported for the command's help

    try:
        torch.compile(lambda: None, **given)
    except Exception as error:
        backends = ", ".join(sorted({*torch.compiler.list_backends()} - {"cudagraphs"}))
        known = f" Backends are {backends}." if "backend" in given else ""
        words = textwrap.shorten(str(error), 400, placeholder=" ...")
        raise ValueError(
            f"compile={dict(given)!r} is refused by torch.compile: {words}{known}"
        ) from error


@dataclasses.dataclass(frozen=True)
class CUDAGraphOptions:
    """How graphs are captured; the first three options are vLLM's.

    Example::

        >>> from cg_lightning import CUDAGraphOptions
        >>> CUDAGraphOptions(check_addresses=True).capture_error_mode
        'thread_local'

    Raises:
        ValueError: A value has another type, or ``capture_error_mode`` is unknown. The message
            names the option.
    """

    debug_log_enable: bool = True
    """Log each capture at level DEBUG."""
    gc_disable: bool = False
    """Do not collect garbage before a capture. During a capture the collector never runs."""
    weak_ref_output: bool = True
    """Hold outputs weakly, so that later captures may use their memory.

    Read or copy them before the next replay.
    """
    check_addresses: bool | None = None
    """Compare input addresses before each replay.

    None: if the ``cg_lightning`` logger is at level DEBUG.
    """
    capture_error_mode: CaptureErrorMode = "thread_local"
    """``global``, ``thread_local`` or ``relaxed``, as in ``torch.cuda.graph``."""

    def __post_init__(self) -> None:
        for name in ("debug_log_enable", "gc_disable", "weak_ref_output"):
            check_bool(f"CUDAGraphOptions.{name}", getattr(self, name))
        if self.check_addresses is not None:
            check_bool(
                "CUDAGraphOptions.check_addresses", self.check_addresses, "True, False or None"
            )
        check_name(
            "CUDAGraphOptions.capture_error_mode", self.capture_error_mode, CAPTURE_ERROR_MODES
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The options of :class:`~cg_lightning.CUDAGraphCallback`, checked.

    Raises:
        ValueError: A value is out of its range. The message names the option, the value and the
            choices.
    """

    mode: CUDAGraphMode | ModeName = "FULL_AND_PIECEWISE"
    """NONE, PIECEWISE, FULL or FULL_AND_PIECEWISE."""
    stages: Sequence[StageName] = ("validate", "test", "predict")
    """The stages that run from graphs."""
    targets: Sequence[str] | None = None
    """Name patterns of submodules for PIECEWISE. None: diagnosis finds them."""
    warmup_steps: int = 3
    """Eager runs of a key before its capture. The first one is watched, so 0 means 1."""
    verify_replays: int = 2
    """Number of first replays of each graph that are compared with eager."""
    verify_every: int = 0
    """After those, compare every n-th replay; 0: none."""
    verify_tolerance: Tolerance = "exact"
    """``exact`` or ``close``."""
    sync_free_metrics: bool = True
    """In captures of whole steps, replace torchmetrics functions and PyTorch checks that wait."""
    compile: bool | Mapping[str, Any] = False
    """Compile the networks, and graph the result; or the arguments of ``torch.compile``."""
    copy_outputs: bool = True
    """Copy outputs out of graph memory."""
    overlap_copies: bool = True
    """Copy batches to the device, and predictions to the host, while the device computes."""
    capture_sizes: Sequence[int] | None = None
    """Pad batches along dimension 0 up to the next of these sizes. None: not at all."""
    pad_dims: Mapping[str, Any] | Literal["auto"] | None = None
    """Pad other dimensions: for each leaf and dimension, sizes and a value; or ``auto``: as the
    batches propose. None: not at all."""
    min_saving: float = 0.03
    """Share of a step's time that its graph must save, or else it is dropped; 0: keep every graph.
    """
    max_graphs: int = 64
    """Maximum number of graphs. The least recently used is dropped, but none that is in use."""
    max_graph_bytes: int | None = None
    """Maximum memory of all graphs, in bytes; the least recently used is dropped first. None: any.
    """
    strict: bool = False
    """Raise if a step past its warm-up runs in a lower mode than asked."""
    backend: BackendName = "auto"
    """``cuda``, ``recorder`` or ``auto``."""
    report: bool = True
    """Print the summary when the Trainer is done, or interrupted by Ctrl-C."""
    capture_ahead: bool = False
    """Capture the shapes of each dataloader after the first batch, before later ones come."""
    log_stats: bool = False
    """Send the statistics of each stage to the loggers of the Trainer."""
    options: CUDAGraphOptions | None = None
    """How graphs are captured."""

    def __post_init__(self) -> None:
        options = CUDAGraphOptions() if self.options is None else self.options
        if not isinstance(options, CUDAGraphOptions):
            raise ValueError(
                f"options={options!r} must be CUDAGraphOptions(...), not a "
                f"{type(options).__name__}; "
                "for example options=CUDAGraphOptions(check_addresses=True)."
            )
        targets = None if self.targets is None else check_names("targets", self.targets, None)
        checked: dict[str, Any] = {
            "mode": CUDAGraphMode.parse(self.mode),
            "stages": check_names("stages", self.stages, tuple(STEP_METHODS)),
            "targets": targets,
            "options": options,
        }
        _check_compile(self.compile)
        check_name("verify_tolerance", self.verify_tolerance, TOLERANCES)
        check_name("backend", self.backend, BACKENDS)
        for name, least in (("warmup_steps", 0), ("verify_replays", 0), ("verify_every", 0)):
            check_at_least(name, getattr(self, name), least)
        check_at_least("max_graphs", self.max_graphs, 1)
        if self.max_graph_bytes is not None:
            check_at_least("max_graph_bytes", self.max_graph_bytes, 1)
        check_share("min_saving", self.min_saving)
        for name in (
            "sync_free_metrics",
            "copy_outputs",
            "overlap_copies",
            "strict",
            "report",
            "log_stats",
            "capture_ahead",
        ):
            check_bool(name, getattr(self, name))
        if self.capture_ahead and not checked["mode"].has_full_cudagraphs():
            raise ValueError(
                f"capture_ahead=True captures whole steps, and mode={checked['mode'].name!r} has "
                "none; set mode='FULL' or 'FULL_AND_PIECEWISE', or capture_ahead=False."
            )
        if targets is not None and not checked["mode"].has_piecewise_cudagraphs():
            raise ValueError(
                f"targets={list(targets)!r} are submodules for PIECEWISE, and "
                f"mode={checked['mode'].name!r} has none; set mode='PIECEWISE' or "
                "'FULL_AND_PIECEWISE', or leave targets out."
            )
        if self.capture_sizes is not None:
            checked["capture_sizes"] = check_sizes("capture_sizes", self.capture_sizes)
        if self.pad_dims is not None and not self.proposes_pad_dims:
            check_pad_dims(self.pad_dims)
        self._check_tolerance_of_padding()
        self._check_use_of_stages(checked["mode"], checked["stages"])
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def _check_tolerance_of_padding(self) -> None:
        for name in ("capture_sizes", "pad_dims"):
            if getattr(self, name) is not None and self.verify_tolerance == "exact":
                raise ValueError(
                    f"{name}={getattr(self, name)!r} pads batches, and other shapes run other "
                    "kernels, so the last bits differ; set verify_tolerance='close', or "
                    f"{name}=None."
                )

    def _check_use_of_stages(self, mode: CUDAGraphMode, stages: tuple[str, ...]) -> None:
        """Refuse an option of evaluation that no stage would use."""
        is_given = {
            "targets": self.targets is not None,
            "capture_sizes": self.capture_sizes is not None,
            "pad_dims": self.pad_dims is not None,
            "capture_ahead": self.capture_ahead,
            "compile": self.compile_arguments is not None,
        }
        name = next((name for name, given in is_given.items() if given), None)
        if name is None:
            return
        given = f"{name}={getattr(self, name)!r}"
        if mode is CUDAGraphMode.NONE:
            raise ValueError(
                f"{given} is for graphs, and mode='NONE' has none; choose another mode, or leave "
                f"{name} out."
            )
        if not set(stages) & set(EVALUATING):
            raise ValueError(
                f"{given} is for {', '.join(EVALUATING)}, and stages={list(stages)!r} has "
                f"none of them; add one, or leave {name} out."
            )
        if self.pads and not mode.has_piecewise_cudagraphs() and "predict" not in stages:
            raise ValueError(
                f"{given} pads submodules in {', '.join(stages)}, and mode={mode.name!r} has no "
                f"graphs of these; set mode='FULL_AND_PIECEWISE', or leave {name} out."
            )

    @property
    def pads(self) -> bool:
        """Whether batches are padded."""
        return self.capture_sizes is not None or self.pad_dims is not None

    @property
    def proposes_pad_dims(self) -> bool:
        """Whether the batches propose how other dimensions are padded."""
        return self.pad_dims == PROPOSED

    @property
    def pad_rules(self) -> PadDims:
        """:attr:`pad_dims` as rules; empty for None and for ``auto``."""
        if self.pad_dims is None or self.proposes_pad_dims:
            return {}
        return check_pad_dims(self.pad_dims)

    @property
    def runtime_policy(self) -> CUDAGraphMode:
        """:attr:`mode` as a member."""
        assert isinstance(self.mode, CUDAGraphMode)
        return self.mode

    @property
    def compile_arguments(self) -> Mapping[str, Any] | None:
        """The arguments of ``torch.compile``. None: nothing is compiled."""
        if isinstance(self.compile, bool):
            return {} if self.compile else None
        return self.compile

    @property
    def capture_options(self) -> CUDAGraphOptions:
        """:attr:`options`, never None."""
        assert self.options is not None
        return self.options

    def for_training(self) -> Settings:
        """Return the options for closures of training: whole, as written, with copied gradients.

        Their batches are not padded, since a loss reduces over its batch.

        A part of the closure runs after the replay, so times cannot be compared.
        """
        return dataclasses.replace(
            self,
            mode=CUDAGraphMode.FULL,
            targets=None,
            compile=False,
            copy_outputs=True,
            min_saving=0,
            capture_ahead=False,
            capture_sizes=None,
            pad_dims=None,
        )

    def next_verification(self, replays: int) -> int:
        """Return the number of replays after which the next one is compared with eager.

        Args:
            replays: Replays of the graph so far.

        Returns:
            A number that is at least ``replays``; -1: no later replay is compared.
        """
        if replays < self.verify_replays:
            return replays
        if not self.verify_every:
            return -1
        since = replays - self.verify_replays + 1
        return replays + -since % self.verify_every
