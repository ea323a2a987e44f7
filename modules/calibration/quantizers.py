"""The two quantizers of a side of a layer: one that learns its ranges, and one that rounds by what was learnt."""

from __future__ import annotations

import torch
from torch import nn

from modules.codecs.static import ChannelScales


class DynamicCacheQuantizer(nn.Module):
    """The quantizer of calibration: the running range of every channel of the keys, or of the values, of a layer.

    `forward` takes states in and gives them back as the range so far rounds them. A calibration that passed those on would
    depend on the order of its batches: `calibrate` only observes.

    Args:
        symmetric: codes are symmetric about zero; else about the middle of a channel's range.
    """

    low: torch.Tensor | None
    high: torch.Tensor | None

    def __init__(self, symmetric: bool = True) -> None:
        super().__init__()
        self.symmetric = symmetric
        self.register_buffer("low", None)  # float32 [H, D], as `high`
        self.register_buffer("high", None)

    @torch.no_grad()
    def observe(self, states: torch.Tensor) -> None:
        """Widen the range of each channel to `states` `[batch, heads, tokens, head_dim]`.

        Raises:
            ValueError: for states of another shape, without a token, or with NaN or infinity in them.
        """
        if states.dim() != 4 or not states.is_floating_point() or not states.numel():
            raise ValueError(
                "states must be floating point, [batch, heads, tokens, head_dim], of one token at least; got "
                f"{states.dtype} {tuple(states.shape)}."
            )
        heads, head_dim = states.shape[1], states.shape[3]
        channels = states.transpose(1, 2).reshape(-1, heads * head_dim)  # [tokens, heads * head_dim]
        low, high = (bound.float().view(heads, head_dim) for bound in channels.aminmax(dim=0))
        if not bool((torch.isfinite(low) & torch.isfinite(high)).all()):
            raise ValueError(
                "states must be finite; some are NaN or infinite. Run the model in bfloat16 or float32, and see whether its "
                "weights are whole."
            )
        if self.low is None or self.high is None:
            self.low, self.high = low, high
        elif self.low.shape != low.shape:
            raise ValueError(f"states had (heads, head_dim) {tuple(self.low.shape)} so far; now {tuple(low.shape)}.")
        else:
            self.low, self.high = torch.minimum(self.low, low), torch.maximum(self.high, high)

    @property
    def range(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Lowest and highest state of each channel so far, float32 `[heads, head_dim]` both.

        Raises:
            ValueError: where nothing was observed.
        """
        if self.low is None or self.high is None:
            raise ValueError("nothing was observed yet; give the quantizer states first.")
        return self.low, self.high

    def scales(self) -> ChannelScales:
        """The scales of the range so far; raises as `range` does."""
        return ChannelScales.from_range(*self.range, self.symmetric)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Observe states `[batch, heads, tokens, head_dim]`; give them back, rounded to the codes of the range so far."""
        self.observe(x)
        return self.scales().round(x)


class FakeQuantDynamicCache(nn.Module):
    """The quantizer of deployment: states come back as their static INT8 codes give them, in their own dtype.

    Args:
        scales: of the keys, or of the values, of a layer.
    """

    scale: torch.Tensor
    offset: torch.Tensor

    def __init__(self, scales: ChannelScales) -> None:
        super().__init__()
        self.register_buffer("scale", scales.scale)
        self.register_buffer("offset", scales.offset)

    @torch.no_grad()
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Round states `[batch, heads, tokens, head_dim]`; what is beyond the calibrated range saturates."""
        self.to(x.device)
        return ChannelScales(self.scale, self.offset).round(x)
