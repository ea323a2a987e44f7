"""The new tokens of one forward."""

from __future__ import annotations

import dataclasses
import functools

import torch


@dataclasses.dataclass
class Step:
    """Which of the `[B, length]` new columns of a forward are real tokens; the others are padding and are not stored.

    Attributes:
        length: new columns.
        real: bool `[B, length]`, None where all are real.
        order: int64 `[B, length]`, columns with the real ones first; None where they are first already.
        counted: real tokens of each sequence, None where only the device knows them (see `lengths`).
    """

    length: int
    real: torch.Tensor | None = None
    order: torch.Tensor | None = None
    counted: list[int] | None = None
    _on_device: dict[torch.device, torch.Tensor] = dataclasses.field(default_factory=dict, init=False, repr=False)

    @classmethod
    def of(cls, real: torch.Tensor | None, batch: int, length: int) -> Step:
        """The step for a mask of new columns, bool `[B, length]`, or None.

        For several columns on a GPU this waits for the device; for one it does not, and the host then does not know
        which sequences got a token.
        """
        if real is None:
            return cls(length, counted=[length] * batch)
        if length == 1 and real.device.type != "cpu":
            return cls(length, real)
        if bool(real.all()):
            return cls(length, counted=[length] * batch)
        first = torch.arange(length, device=real.device) < real.sum(1, keepdim=True)
        order = None if torch.equal(first, real) else torch.argsort(~real, dim=1, stable=True)
        return cls(length, real, order, real.sum(1).tolist())

    @classmethod
    def of_lengths(cls, lengths: list[int], length: int) -> Step:
        """The step in which sequence `b` gets `lengths[b]` tokens, the first ones of `length` columns."""
        if all(count == length for count in lengths):
            return cls(length, counted=list(lengths))
        real = torch.arange(length) < torch.tensor(lengths).unsqueeze(1)
        return cls(length, real, counted=list(lengths))

    @property
    def all_real(self) -> bool:
        """Whether every new column is a token, as far as the host knows."""
        return self.real is None

    @functools.cached_property
    def lengths(self) -> list[int]:
        """Real tokens of each sequence. Waits for the device where the host does not know them."""
        if self.counted is not None:
            return self.counted
        if self.real is None:
            raise ValueError(
                "a step without a mask has to say its counted tokens; make it by Step.of or Step.of_lengths."
            )
        return self.real.sum(1).tolist()

    def lengths_on(self, device: torch.device) -> torch.Tensor:
        """Real tokens of each sequence, int32 `[B]` on `device`; without waiting where they are there already."""
        if device not in self._on_device:
            if self.real is not None and self.real.device == device:
                self._on_device[device] = self.real.sum(1, dtype=torch.int32)
            else:
                self._on_device[device] = torch.tensor(self.lengths, dtype=torch.int32, device=device)
        return self._on_device[device]

    def real_first(self, states: torch.Tensor, dim: int = 2) -> torch.Tensor:
        """`states` with the real tokens moved to the front of `dim`."""
        return states if self.order is None else states.gather(dim, self._index(states, dim, self.order))

    def as_given(self, states: torch.Tensor, dim: int = 1) -> torch.Tensor:
        """The inverse of `real_first`."""
        if self.order is None:
            return states
        return states.gather(dim, self._index(states, dim, self.order.argsort(dim=1)))

    @staticmethod
    def _index(states: torch.Tensor, dim: int, order: torch.Tensor) -> torch.Tensor:
        shape = [1] * states.dim()
        shape[0], shape[dim] = order.shape
        return order.to(states.device).view(shape).expand_as(states)
