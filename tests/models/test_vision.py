"""The encoder's cache of tokens: the same answer, less work."""

import pytest
import torch

from omnimri.models.config import preset
from omnimri.models.vision import TokenCache, VisionEncoder, visual_tokens

SHAPE = (8, 16, 16)


class CountingEncoder(VisionEncoder):
    calls = 0

    def forward(self, *args: torch.Tensor) -> list[torch.Tensor]:
        self.calls += 1
        return super().forward(*args)


@pytest.fixture
def encoder() -> CountingEncoder:
    torch.manual_seed(0)
    return CountingEncoder(preset("tiny").vision).eval()


def volumes(rng: torch.Generator, count: int) -> torch.Tensor:
    return torch.randn(count, 1, *SHAPE, generator=rng)


def test_remembered_tokens_are_the_encoders(encoder: CountingEncoder, rng: torch.Generator) -> None:
    cache, volume = TokenCache(), volumes(rng, 3)
    first = cache.tokens(encoder, volume)
    with torch.no_grad():
        torch.testing.assert_close(first, visual_tokens(encoder(volume)))
    encoder.calls = 0
    torch.testing.assert_close(cache.tokens(encoder, volume.flip(0)), first.flip(0), rtol=0, atol=0)
    assert encoder.calls == 0


def test_new_weights_forget_old_tokens(encoder: CountingEncoder, rng: torch.Generator) -> None:
    cache, volume = TokenCache(), volumes(rng, 1)
    before = cache.tokens(encoder, volume)
    with torch.no_grad():
        encoder.swin.patch_embed.proj.weight.mul_(-1)
    assert not torch.allclose(cache.tokens(encoder, volume), before)


def test_tokens_from_serving_may_take_part_in_training(encoder: CountingEncoder, rng: torch.Generator) -> None:
    cache, volume = TokenCache(), volumes(rng, 1)
    with torch.inference_mode():
        cache.tokens(encoder, volume)
    weight = torch.ones(1, requires_grad=True)
    (cache.tokens(encoder, volume) * weight).sum().backward()
    assert weight.grad is not None


def test_cache_is_bounded_and_forgets_the_oldest(encoder: CountingEncoder, rng: torch.Generator) -> None:
    volume = volumes(rng, 3)
    size = TokenCache().tokens(encoder, volume[:1]).nbytes
    cache = TokenCache(max_bytes=2 * size)
    cache.tokens(encoder, volume)
    encoder.calls = 0
    cache.tokens(encoder, volume[1:])
    assert encoder.calls == 0
    cache.tokens(encoder, volume[:1])
    assert encoder.calls == 1
