"""Visual next-token head: a small flow-matching network that predicts the next continuous visual token.

MAR (arXiv 2406.11838) predicts continuous tokens by a per-token diffusion network; Ming-UniVision (arXiv 2510.06590)
does so by rectified flow on the hidden states of a language model, as here.
"""

# M tokens, V token width, H hidden width

from __future__ import annotations

import torch
from torch import Tensor, nn

from omnimri.models.config import FlowHeadConfig


class Float32Linear(nn.Linear):
    """Linear map in float32 under autocast too: velocities rounded to bfloat16 made such heads diverge (MAR #69)."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (torch's name)
        """`(..., in)` to `(..., out)`."""
        with torch.autocast(input.device.type, enabled=False):
            return nn.functional.linear(input.float(), self.weight, self.bias)


class FlowHead(nn.Module):
    """MLP with adaptive layer norm: velocity of a noisy token, given the hidden state before it."""

    def __init__(self, config: FlowHeadConfig, token_dim: int, hidden_size: int) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.input = Float32Linear(token_dim, width)
        self.time = nn.Sequential(Float32Linear(2 * _FREQUENCIES, width), nn.SiLU(), Float32Linear(width, width))
        self.condition = Float32Linear(hidden_size, width)
        self.blocks = nn.ModuleList(_Block(width) for _ in range(config.depth))
        self.output = nn.Sequential(nn.LayerNorm(width), Float32Linear(width, token_dim))
        nn.init.zeros_(self.output[1].weight)
        nn.init.zeros_(self.output[1].bias)

    def forward(self, noisy: Tensor, time: Tensor, hidden: Tensor) -> Tensor:
        """Velocity `(M, V)` from `noisy` `(M, V)`, `time` `(M,)` in [0, 1] and `hidden` `(M, H)`."""
        condition = self.time(_sinusoids(time)) + self.condition(hidden)
        x = self.input(noisy)
        for block in self.blocks:
            x = block(x, condition)
        return self.output(x)

    def loss(self, tokens: Tensor, hidden: Tensor) -> Tensor:
        """Flow-matching error `E |f(y_t, t, h) - (eps - y)|^2 / V` of tokens `(M, V)`.

        Targets are detached: with a trainable target the loss would fall by collapse. Runs in float32.
        """
        tokens = tokens.detach().float().repeat(self.config.repeats, 1)
        hidden = hidden.float().repeat(self.config.repeats, 1)
        time = torch.sigmoid(torch.randn(tokens.shape[0], device=tokens.device))
        noise = torch.randn_like(tokens)
        noisy = (1 - time[:, None]) * tokens + time[:, None] * noise
        return (self(noisy, time, hidden) - (noise - tokens)).square().mean()


@torch.no_grad()
def copy_loss(tokens: Tensor) -> Tensor:
    """What `FlowHead.loss` would be if it guessed each token of `(B, N, V)` to lie about the one before it.

    With y normal about its neighbour and variance s^2, the mean of y given `y_t` leaves the velocity an error of
    `s^2 / ((1 - t)^2 s^2 + t^2)` per dimension; the mean is over the times that the loss draws. A head that does not
    beat this copies: shifted windows let a token know of the next.
    """
    variance = (tokens[:, 1:] - tokens[:, :-1]).float().square().mean()
    quantiles = (torch.arange(256, device=tokens.device) + 0.5) / 256
    time = torch.sigmoid(torch.special.ndtri(quantiles))
    return (variance / ((1 - time).square() * variance + time.square())).mean()


class _Block(nn.Module):
    """Residual MLP modulated by shift, scale and gate (adaLN-Zero, DiT, arXiv 2212.09748)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.mlp = nn.Sequential(Float32Linear(width, width), nn.SiLU(), Float32Linear(width, width))
        self.modulation = nn.Sequential(nn.SiLU(), Float32Linear(width, 3 * width))
        nn.init.zeros_(self.modulation[1].weight)
        nn.init.zeros_(self.modulation[1].bias)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(condition).chunk(3, dim=-1)
        return x + gate * self.mlp(self.norm(x) * (1 + scale) + shift)


_FREQUENCIES = 16


def _sinusoids(time: Tensor) -> Tensor:
    frequencies = torch.exp(torch.linspace(0.0, 6.0, _FREQUENCIES, device=time.device))
    phase = time.float()[:, None] * frequencies
    return torch.cat([phase.sin(), phase.cos()], dim=-1)
