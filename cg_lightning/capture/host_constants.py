"""Constants that a call makes of Python values, at fixed addresses outside the graph.

What is hard here:

- A graph cannot contain a copy from the host. So each constant is made before the capture, and the
  graph clones it, because steps may write to tensors that they have made.
- A constant needs memory from outside the capture: other graphs of the pool, and earlier kernels of
  this graph, may write to memory that a capture has allocated. But only a capture shows the
  constants. So a call with constants is captured twice, and the first graph is dropped.
- The second capture must ask for the same constants in the same order. Otherwise it would freeze a
  value that changes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from cg_lightning.backends.host_indices import answered_indices
from cg_lightning.backends.tensor_makers import MakerCall, answered_makers, beside_the_step
from cg_lightning.capture.answered_copies import AnsweredCopies
from cg_lightning.core.equality import same_leaf
from cg_lightning.core.errors import CaptureError


class HostConstants:
    """The constants that one call makes, in order.

    Args:
        device: The device of the graphs.
        with_copies: Whether the call also copies constants by itself: tensors of the host, and
            lists that index a tensor.
    """

    def __init__(self, device: torch.device, with_copies: bool = False) -> None:
        self._device = device
        self._with_copies = with_copies
        self._asked_for: list[Tensor] = []
        """What the call that is being captured has asked for."""
        self._made_of: list[Tensor] = []
        self.tensors: list[Tensor] = []
        """The constants on the device. A graph that clones them does not keep them alive."""

    def are_made(self, asked_for: list[Tensor]) -> bool:
        """Return True if all constants that a capture has asked for are made."""
        return len(asked_for) <= len(self.tensors)

    def make(self, asked_for: list[Tensor]) -> None:
        """Make the constants that a capture has asked for. Call it outside a capture."""
        with torch.inference_mode(False):
            self._made_of = asked_for
            self.tensors = [tensor.to(self._device, copy=True) for tensor in asked_for]

    @contextlib.contextmanager
    def answered(self) -> Iterator[list[Tensor]]:
        """While this is entered, one captured call gets clones of its constants.

        The context gives a list, which receives the values on the host of the constants that the
        call asks for. If they are not made yet, make them and capture once more.

        Raises:
            CaptureError: The call makes other constants than those that were made.
        """
        asked_for = self._asked_for = []
        with contextlib.ExitStack() as stack:
            stack.enter_context(answered_makers(self._answer))
            if self._with_copies:
                stack.enter_context(answered_indices(self._device, self._constant))
            if self._with_copies and self._device.type != "cpu":
                copies = AnsweredCopies(self._device, self._constant)
                stack.enter_context(copies.watching())
            yield asked_for
        if self.tensors and len(asked_for) != len(self.tensors):
            raise _other_constants()

    def _answer(self, call: MakerCall) -> Tensor:
        if not call.is_constant_on(self._device):
            return call.run()
        return self._constant(call.on_host())

    def _constant(self, value: Tensor) -> Tensor:
        """Return a clone of the constant with this value."""
        number = len(self._asked_for)
        self._asked_for.append(value)
        if not self.tensors:
            # this graph is dropped: a GPU computes nothing in a capture, the recorder does
            is_host = self._device.type == "cpu"
            return value.clone() if is_host else torch.empty_like(value, device=self._device)
        with beside_the_step():
            is_known = number < len(self.tensors) and same_leaf(value, self._made_of[number])
        if not is_known:
            raise _other_constants()
        return self.tensors[number].clone()


def _other_constants() -> CaptureError:
    return CaptureError("the step makes other tensors of Python values each time that it runs")
