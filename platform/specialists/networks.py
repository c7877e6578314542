"""The U-Net that specialists share: MONAI's `BasicUNet` at any size of slice."""

# B slices, C channels, H W voxels

from __future__ import annotations

from monai.networks.nets import BasicUNet
from torch import Tensor, nn

ACTIVATION = ("leakyrelu", {"negative_slope": 0.1, "inplace": True})
NORM = ("instance", {"affine": True})
_STRIDE = 16


class SliceUNet(nn.Module):
    """`BasicUNet` from `(B, in, H, W)` to `(B, out, H, W)`; slices are padded to whole coarsest voxels and cropped."""

    def __init__(self, in_channels: int, out_channels: int, channels: tuple[int, ...], *, silent: bool = False) -> None:
        """Build it.

        Args:
            in_channels: Of the input.
            out_channels: Of the output.
            channels: Width of each of five levels, as the image decoder's trunk has them.
            silent: Start with an output of zero.
        """
        super().__init__()
        if len(channels) != 5:
            raise ValueError(f"SliceUNet: expected 5 widths in channels, found {len(channels)}.")
        self.unet = BasicUNet(
            2, in_channels, out_channels, features=(*channels, channels[0]), act=ACTIVATION, norm=NORM
        )  # fmt: skip
        if silent:
            nn.init.zeros_(self.unet.final_conv.weight)
            assert self.unet.final_conv.bias is not None
            nn.init.zeros_(self.unet.final_conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        padded = nn.functional.pad(x, (0, -width % _STRIDE, 0, -height % _STRIDE))
        return self.unet(padded)[..., :height, :width]


def num_parameters(network: nn.Module) -> int:
    """Weights that are trained."""
    return sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
