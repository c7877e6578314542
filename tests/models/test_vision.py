"""The encoder's tokens at either fineness, their cache, and weights from elsewhere."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from monai.networks.nets.swin_unetr import SwinTransformer

from omnimri.models.config import preset
from omnimri.models.vision import TokenCache, VisionEncoder, load_swin_weights, visual_tokens

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


@pytest.mark.parametrize("shape", [(24, 56, 48), (7, 45, 33), (1, 40, 24)])
@pytest.mark.parametrize("level", [1, 2])
def test_fine_tokens_stand_on_their_grid_beside_the_coarsest_of_their_place(
    level: int, shape: tuple[int, int, int], rng: torch.Generator
) -> None:
    torch.manual_seed(0)
    encoder = VisionEncoder(replace(preset("tiny").vision, token_level=level)).eval()
    volume = torch.randn(1, 1, *shape, generator=rng)
    with torch.no_grad():
        fine, coarse = encoder.tokens(volume), visual_tokens(encoder(volume))
    grid, coarse_grid = encoder.token_grid(shape), VisionEncoder(preset("tiny").vision).token_grid(shape)
    assert fine.shape == (1, torch.Size(grid).numel(), encoder.config.token_dim)
    above = [torch.arange(size) // 2 ** (3 - level) for size in grid]
    expected = coarse[0].reshape(*coarse_grid, -1)[above[0]][:, above[1]][:, :, above[2]]
    torch.testing.assert_close(fine[0].reshape(*grid, -1)[..., -expected.shape[-1] :], expected)


def test_a_token_level_without_a_grid_of_its_own_is_refused() -> None:
    with pytest.raises(ValueError, match="token_level must be 1, 2 or 4, found 3"):
        replace(preset("tiny").vision, token_level=3)


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


@pytest.mark.parametrize(("prefix", "wrapped"), [("module.", True), ("swinViT.", False), ("", True)])
def test_published_swin_weights_are_taken_where_they_fit(tmp_path: Path, prefix: str, wrapped: bool) -> None:
    """Laid out as `model_swinvit.pt`: other names of the feed-forward layers, cubic patches, heads of its own."""
    torch.manual_seed(1)
    config = preset("tiny").vision
    theirs = SwinTransformer(
        in_chans=1, embed_dim=config.embed_dim, window_size=config.window_size, patch_size=(2, 2, 2),
        depths=config.depths, num_heads=config.num_heads, spatial_dims=3,
    )  # fmt: skip
    renamed = {f"{prefix}{n.replace('linear', 'fc')}": value for n, value in theirs.state_dict().items()}
    renamed |= {"module.rotation_head.weight": torch.zeros(4, 3)}
    torch.save({"epoch": 3, "state_dict": renamed} if wrapped else renamed, tmp_path / "model_swinvit.pt")
    encoder = VisionEncoder(config)
    match = load_swin_weights(encoder, tmp_path / "model_swinvit.pt")
    assert match.other_shape == ("patch_embed.proj.weight",)
    assert all(".downsample." in name for name in match.absent)
    own, published = dict(encoder.swin.named_parameters()), dict(theirs.named_parameters())
    assert "layers2.0.blocks.1.mlp.linear1.weight" in match.taken
    assert all(torch.equal(own[name], published[name]) for name in match.taken)


def test_a_file_without_an_encoder_is_refused(tmp_path: Path) -> None:
    encoder = VisionEncoder(preset("tiny").vision)
    torch.save({"state_dict": {"conv.weight": torch.zeros(1)}}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"expected tensors as module.layers1.* found \['conv.weight'\]"):
        load_swin_weights(encoder, tmp_path / "other.pt")
    torch.save({"state_dict": {}, "args": Path("x")}, tmp_path / "objects.pt")
    with pytest.raises(ValueError, match="without other objects"):
        load_swin_weights(encoder, tmp_path / "objects.pt")
