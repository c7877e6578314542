"""Vision encoder: one Swin Transformer for slices and volumes (Liu et al., Swin Transformer, ICCV 2021)."""

# B batch, D H W voxels (z y x) of the input, N tokens, E embedding channels, V token width (8 E)

from __future__ import annotations

import hashlib
import pickle
import re
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import torch
from einops import rearrange
from monai.networks.nets.swin_unetr import SwinTransformer
from torch import Tensor, nn

from omnimri.models.config import VisionConfig


class VisionEncoder(nn.Module):
    """Volume to tokens, with the pyramid of feature maps on the way.

    MONAI's `SwinTransformer` with its last merging removed, so that a token covers `config.token_stride` voxels.
    A slice is a volume with D=1: the same weights serve both.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        device = torch.get_default_device()
        # MONAI's constructor reads linspace().item(), which a meta tensor cannot answer.
        with torch.device("cpu") if device.type == "meta" else device:
            self.swin = SwinTransformer(
                in_chans=1,
                embed_dim=config.embed_dim,
                window_size=config.window_size,
                patch_size=config.patch_size,
                depths=config.depths,
                num_heads=config.num_heads,
                spatial_dims=3,
                downsample="mergingv2",
            )
        self.swin.layers4[0].downsample = None
        self.swin.to(device)
        self.mask_token = nn.Parameter(torch.zeros(config.embed_dim))

    def forward(self, volume: Tensor, masked: Tensor | None = None) -> list[Tensor]:
        """Feature maps at strides 2, 4, 8, 16, 16 in plane.

        Args:
            volume: `(B, 1, D, H, W)`, standardised intensities.
            masked: Bool `(B, D', H', W')` on the patch grid: patches replaced by the mask token (SimMIM, sec. 3.1).

        Returns:
            Five maps `(B, E, D', H', W')` ... `(B, 8E, d, h, w)`.
        """
        x = self.swin.patch_embed(volume)
        if masked is not None:
            x = torch.where(masked[:, None], self.mask_token[None, :, None, None, None], x)
        maps = [x]
        for layers in (self.swin.layers1, self.swin.layers2, self.swin.layers3, self.swin.layers4):
            x = layers[0](x.contiguous())
            maps.append(x)
        return maps

    def tokens(self, volume: Tensor, masked: Tensor | None = None) -> Tensor:
        """Visual tokens `(B, N, V)` of volumes; arguments as in `forward`."""
        return visual_tokens(self(volume, masked), self.config.token_level)

    def token_grid(self, shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """Tokens along z, y, x for an input of that shape; odd sizes are padded up at each merging."""
        z, y, x = (-(-size // stride) for size, stride in zip(shape, self.config.token_stride, strict=True))
        return z, y, x


def visual_tokens(pyramid: list[Tensor], level: int = 4) -> Tensor:
    """A map as float32 tokens `(B, N, V)` in z-major raster order, layer-normed without affine.

    A finer map than the coarsest is joined by that one, each normed alone: where something is, and what it is part of.
    """
    maps = pyramid[-1:] if level == 4 else [pyramid[level], spread(pyramid[-1], 2 ** (3 - level), pyramid[level])]
    tokens = [rearrange(m, "b v d h w -> b (d h w) v").float() for m in maps]
    return torch.cat([nn.functional.layer_norm(t, t.shape[-1:]) for t in tokens], dim=-1)


def spread(coarse: Tensor, factor: int, fine: Tensor) -> Tensor:
    """Each place of a map `(B, V, d, h, w)` repeated over those of a finer one that were merged into it."""
    for axis in (2, 3, 4):
        coarse = coarse.repeat_interleave(factor, dim=axis).narrow(axis, 0, fine.shape[axis])
    return coarse


class TokenCache:
    """Tokens of volumes that a frozen encoder has seen before.

    From stage 2 on the encoder is frozen and the volumes come back every epoch and for every prompt. On a CPU the
    encoder is most of the work, so its tokens are remembered, the least recently used forgotten first; on a GPU
    encoding again is cheaper than looking up. Volumes are encoded one by one: what is in the cache, and hence when
    a run was resumed, does not change a rounding.
    """

    def __init__(self, max_bytes: int = 512 * 2**20) -> None:
        self._max_bytes, self._bytes = max_bytes, 0
        self._known: OrderedDict[tuple[bytes, int], Tensor] = OrderedDict()

    def tokens(self, encoder: VisionEncoder, volume: Tensor) -> Tensor:
        """Tokens that `encoder` gives `volume` `(B, 1, D, H, W)`, without gradients."""
        if volume.device.type != "cpu":
            with torch.no_grad():
                return encoder.tokens(volume)
        # Any change in place of the weights counts their version up.
        version = sum(parameter._version for parameter in encoder.parameters())
        return torch.cat([self._one(encoder, single, version) for single in volume.split(1)])

    def _one(self, encoder: VisionEncoder, volume: Tensor, version: int) -> Tensor:
        content = hashlib.blake2b(volume.contiguous().view(torch.uint8).numpy().data, digest_size=16)
        key = (content.digest() + str(volume.dtype).encode(), version)
        if key in self._known:
            self._known.move_to_end(key)
            return self._known[key]
        # A tensor born in inference mode could not take part in training later.
        with torch.inference_mode(mode=False), torch.no_grad():
            tokens = encoder.tokens(volume.clone())
        self._known[key] = tokens
        self._bytes += tokens.nbytes
        while self._bytes > self._max_bytes:
            self._bytes -= self._known.popitem(last=False)[1].nbytes
        return tokens


class AlignmentLayer(nn.Module):
    """Visual tokens to the backbone's width, with their position in millimetres and the contrast added.

    The geometry is added here so that the backbone keeps plain one-dimensional rotary positions.
    """

    def __init__(self, token_dim: int, hidden_size: int, num_contrasts: int, embedding_rms: float = 0.02) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(token_dim)
        self.mlp = nn.Sequential(nn.Linear(token_dim, hidden_size), nn.GELU(), nn.Linear(hidden_size, hidden_size))
        self.position = nn.Sequential(nn.Linear(2 * 3 * _NUM_FREQUENCIES + 3, hidden_size), nn.GELU(),
                                      nn.Linear(hidden_size, hidden_size))  # fmt: skip
        self.contrast = nn.Embedding(num_contrasts + 1, hidden_size)
        self.output_norm = nn.RMSNorm(hidden_size, eps=1e-6)
        nn.init.normal_(self.contrast.weight, std=0.02)
        # Visual tokens enter the backbone at the scale of its word embeddings.
        nn.init.constant_(self.output_norm.weight, embedding_rms)

    def forward(self, tokens: Tensor, grid: tuple[int, int, int], spacing_mm: Tensor, contrast: Tensor) -> Tensor:
        """`(B, N, V)` to `(B, N, H)`.

        Args:
            tokens: From the vision encoder.
            grid: Tokens along `z y x`, with product N.
            spacing_mm: `(B, 3)`, size of one token along `z y x`.
            contrast: `(B,)` long, index into the vocabulary's contrasts, the last one meaning unknown.
        """
        position = self.position(_fourier_position(grid, spacing_mm))
        x = self.mlp(self.norm(tokens)) + position + self.contrast(contrast)[:, None]
        return self.output_norm(x)


_NUM_FREQUENCIES = 6


def _fourier_position(grid: tuple[int, int, int], spacing_mm: Tensor) -> Tensor:
    """Sines and cosines of token centres in mm from the volume's centre, and the token size; `(B, N, 39)`."""
    axes = [torch.arange(n, device=spacing_mm.device, dtype=torch.float32) - (n - 1) / 2 for n in grid]
    index = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, 3)
    centre_mm = index * spacing_mm[:, None]
    wavelengths_mm = 32.0 * 2.0 ** torch.arange(_NUM_FREQUENCIES, device=spacing_mm.device)
    phase = rearrange(2 * torch.pi * centre_mm[..., None] / wavelengths_mm, "b n c f -> b n (c f)")
    size = (spacing_mm / 64.0)[:, None].expand(-1, index.shape[0], -1)
    return torch.cat([phase.sin(), phase.cos(), size], dim=-1)


@dataclass(frozen=True)
class MatchedWeights:
    """What of a published encoder could be taken."""

    taken: tuple[str, ...]
    """Tensors that were taken, by their names here."""
    other_shape: tuple[str, ...]
    """Tensors that both have, in different shapes (other window, patch or width)."""
    absent: tuple[str, ...]
    """Tensors that only we have."""


_PREFIX = re.compile(r"^(module\.)?(swinViT\.|swin_vit\.|encoder\.)?")
_RENAMED = {"mlp.fc1.": "mlp.linear1.", "mlp.fc2.": "mlp.linear2."}


def load_swin_weights(encoder: VisionEncoder, path: Path | str, *, mergings: bool = False) -> MatchedWeights:
    """Take the weights of a published MONAI Swin encoder where name and shape agree.

    Reads `model_swinvit.pt` of the self-supervised pretraining (`module.layers1.0...`), and checkpoints of
    `SwinUNETR` (`swinViT.layers1...`), with or without `state_dict` around them.

    Args:
        encoder: To fill.
        path: Of the file; read without running code from it (`weights_only`).
        mergings: Take the patch mergings too. Files from before MONAI 1.0 (the two above) order the voxels that are
            merged in another way, in equal shapes: with them this must stay off.

    Raises:
        ValueError: If the file holds no tensor of such an encoder, or is no file of weights.
    """
    try:
        values = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path}: expected a file of weights without other objects: {error}") from error
    while isinstance(values, dict) and isinstance(values.get("state_dict", values.get("model")), dict):
        values = values.get("state_dict", values.get("model"))
    theirs = {_own_name(name): value for name, value in values.items() if isinstance(value, Tensor)}
    own = {name: p for name, p in encoder.swin.named_parameters() if mergings or ".downsample." not in name}
    both = [name for name in own if name in theirs]
    if not both:
        raise ValueError(
            f"{path}: expected tensors as module.layers1.0.blocks.0.norm1.weight, found {list(values)[:3]}."
        )
    taken = tuple(name for name in both if own[name].shape == theirs[name].shape)
    with torch.no_grad():
        for name in taken:
            own[name].copy_(theirs[name])
    every = dict(encoder.swin.named_parameters())
    return MatchedWeights(
        taken, tuple(name for name in both if name not in taken), tuple(name for name in every if name not in both)
    )


def _own_name(name: str) -> str:
    """Name in MONAI's `SwinTransformer` of today."""
    name = _PREFIX.sub("", name)
    for old, new in _RENAMED.items():
        name = name.replace(old, new)
    return name
