"""Random generators of the user's on the device: captures draw from them, as eager does."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor


def key_of(generator: torch.Generator) -> int:
    """Return the identity of a generator. An operation shows another object for it.

    ``_cdata`` is private; without it, no generator that an operation shows is known.
    """
    key: int = getattr(generator, "_cdata", id(generator))
    return key


class FollowedGenerators:
    """The generators that steps were seen to draw from, and the states of all of the device.

    Args:
        get_default: Returns the state of the default generator.
        set_default: Sets it.
    """

    def __init__(
        self, get_default: Callable[[], Tensor], set_default: Callable[[Tensor], None]
    ) -> None:
        self._get_default = get_default
        self._set_default = set_default
        self._followed: dict[int, torch.Generator] = {}

    def __iter__(self) -> Iterator[torch.Generator]:
        """Iterate over the generators, without the default one."""
        return iter(self._followed.values())

    def add(self, generator: torch.Generator) -> None:
        """Follow a generator from now on."""
        self._followed[key_of(generator)] = generator

    def get_state(self) -> Tensor:
        """Return the states of the default generator and of all others, in one tensor."""
        default = self._get_default()
        return (
            torch.cat([default, *[each.get_state() for each in self]])
            if self._followed
            else default
        )

    def set_state(self, state: Tensor) -> None:
        """Set the states. A generator that was added since they were taken is left as it is.

        So is a generator that has its state already: cuDNN keeps a state of its own for the dropout
        of recurrent networks, and PyTorch seeds it again after each call that sets a generator.
        """
        parts = state.split(self._get_default().numel())
        generators = [
            (self._get_default, self._set_default),
            *[(each.get_state, each.set_state) for each in self],
        ]
        for (get_state, set_state), part in zip(generators, parts, strict=False):
            if not torch.equal(get_state(), part):
                set_state(part.clone())


class FollowsGenerators:
    """The part of a backend that follows the random generators of its device."""

    def __init__(self, generators: FollowedGenerators) -> None:
        self._generators = generators

    def follow(self, generator: torch.Generator) -> None:
        """See :class:`~cg_lightning.backends.base.GraphBackend`."""
        self._generators.add(generator)

    def get_random_state(self) -> Tensor:
        """Return the states of the default generator of the device and of followed ones."""
        return self._generators.get_state()

    def set_random_state(self, state: Tensor) -> None:
        """Set the states of these generators."""
        self._generators.set_state(state)
