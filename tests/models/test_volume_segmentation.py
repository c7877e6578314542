"""Segmentation in three dimensions: what a window over a volume must do, and what only it can learn."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from omnimri.models.config import ImageDecoderConfig, VisionConfig, preset
from omnimri.models.metrics import dice
from omnimri.models.objectives import InstructionTuning, LossWeights, patch_pyramid, slice_pyramid
from omnimri.models.omnimri import OmniMRI
from omnimri.models.resample import pad_or_crop

WINDOW = (8, 24, 24)


def decoding_model(segment_dims: int, **changes: object) -> OmniMRI:
    """Encoder and image decoder, small; the layers that start at zero are not, so that every path counts."""
    tiny = preset("tiny")
    vision = VisionConfig(embed_dim=12, depths=(1, 1, 1, 1), num_heads=(1, 2, 2, 2), window_size=(2, 4, 4))
    decoder = ImageDecoderConfig(channels=(8, 16, 16), num_heads=2, segment_dims=segment_dims, **changes)  # type: ignore[arg-type]
    torch.manual_seed(0)
    model = OmniMRI(replace(tiny, vision=vision, image_decoder=decoder), ("vision", "image_decoder")).eval()
    for parameter in model.image_decoder.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    model.vision.requires_grad_(False)
    return model


def conditions(rng: torch.Generator, count: int) -> torch.Tensor:
    return torch.randn(count, 4, preset("tiny").connector.dim, generator=rng)


def by_windows(model: OmniMRI, volume: torch.Tensor, condition: torch.Tensor, num_steps: int = 2) -> torch.Tensor:
    return model.image_decoder.segment_volume(
        volume, condition, partial(patch_pyramid, model), patch_shape=WINDOW, num_steps=num_steps
    )


@pytest.mark.parametrize("flat_levels", [1, 2])
@pytest.mark.parametrize("shape", [(8, 24, 24), (13, 37, 29), (1, 50, 11), (3, 7, 5)])
def test_volumes_of_any_size_are_segmented(rng: torch.Generator, shape: tuple[int, int, int], flat_levels: int) -> None:
    model = decoding_model(3, flat_levels=flat_levels)
    masks = by_windows(model, torch.randn(shape, generator=rng), conditions(rng, 2))
    assert masks.shape == (2, *shape)
    assert ((masks >= 0) & (masks <= 1)).all()


def test_a_volume_that_fits_is_seen_as_one(rng: torch.Generator) -> None:
    model, volume, condition = decoding_model(3), torch.randn(WINDOW, generator=rng), conditions(rng, 3)
    whole = model.image_decoder.segment(
        volume[None], condition[None], patch_pyramid(model, volume[None]), num_steps=3
    )  # fmt: skip
    torch.testing.assert_close(by_windows(model, volume, condition, num_steps=3), whole[0])


def test_a_smaller_volume_is_padded_with_its_background(rng: torch.Generator) -> None:
    model, volume, condition = decoding_model(3), torch.randn(5, 17, 24, generator=rng), conditions(rng, 2)
    padded = pad_or_crop(volume, WINDOW, float(volume.min()))
    expected = by_windows(model, padded, condition)[:, 1:6, 3:20]
    torch.testing.assert_close(by_windows(model, volume, condition), expected)


def test_windows_blend_into_one_another(rng: torch.Generator) -> None:
    """Of two windows each alone decides where only it looks; between them their answers are averaged."""
    model, condition = decoding_model(3), conditions(rng, 1)
    volume = torch.randn(12, 24, 24, generator=rng)
    first, second = (by_windows(model, volume[start : start + 8], condition)[0] for start in (0, 4))
    found = by_windows(model, volume, condition)[0]
    torch.testing.assert_close(found[:4], first[:4])
    torch.testing.assert_close(found[8:], second[4:])
    low, high = torch.minimum(first[4:], second[:4]), torch.maximum(first[4:], second[:4])
    assert ((found[4:8] >= low - 1e-5) & (found[4:8] <= high + 1e-5)).all()
    assert ((found[4:8] - low) > 0.01 * (high - low)).float().mean() > 0.5


def test_prompts_share_a_window(rng: torch.Generator) -> None:
    model, volume, condition = decoding_model(3), torch.randn(11, 30, 24, generator=rng), conditions(rng, 3)
    masks = by_windows(model, volume, condition)
    torch.testing.assert_close(by_windows(model, volume, condition.flip(0)), masks.flip(0), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(masks[0], masks[1])
    twice = by_windows(model, volume, condition[[0, 1, 1]])
    torch.testing.assert_close(twice[1], twice[2])


def test_every_map_of_the_encoder_reaches_the_masks(rng: torch.Generator) -> None:
    """Also those that are coarser along z than the level they are added to."""
    model = decoding_model(3, flat_levels=2)
    patch, condition = torch.randn(1, *WINDOW, generator=rng), conditions(rng, 1)[None]
    pyramid = patch_pyramid(model, patch)
    assert [maps.shape[2] for maps in pyramid] == [8, 4, 2, 1, 1]
    plain = model.image_decoder.segment(patch, condition, pyramid, num_steps=1)
    for level in range(2):
        other = [maps.flip(2) if i == level else maps for i, maps in enumerate(pyramid)]
        assert not torch.allclose(plain, model.image_decoder.segment(patch, condition, other, num_steps=1))


def test_flat_levels_are_some_but_not_all() -> None:
    for levels in (0, 3):
        with pytest.raises(ValueError, match=rf"flat_levels must be 1 to 2 .*, found {levels}"):
            ImageDecoderConfig(channels=(8, 16, 16), num_heads=2, segment_dims=3, flat_levels=levels)
    with pytest.raises(ValueError, match="segment_dims must be 2 or 3, found 4"):
        ImageDecoderConfig(channels=(8, 16), num_heads=2, segment_dims=4)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"patch_overlap must lie in \[0, 1\)"):
        ImageDecoderConfig(channels=(8, 16), num_heads=2, patch_overlap=1.0)
    with pytest.raises(ValueError, match="patch_shape must be three sizes"):
        ImageDecoderConfig(channels=(8, 16), num_heads=2, patch_shape=(0, 8, 8))


def balls_and_plates(rng: np.random.Generator, shape: tuple[int, int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """A volume of balls that span five slices and of discs that span one, alike in any single slice; mask of the balls.

    Discs have the radii of sections through balls, and as many are drawn as there are sections.
    """
    z, y, x = np.indices(shape)
    image, balls = 0.3 * rng.normal(size=shape), np.zeros(shape, bool)
    sections = {-2: 2.5, -1: 3.5, 0: 4.0, 1: 3.5, 2: 2.5}
    for _ in range(max(1, balls.size // 2300)):
        cz, cy, cx = (rng.integers(n) for n in shape)
        for offset, radius in sections.items():
            balls |= (z == cz + offset) & ((y - cy) ** 2 + (x - cx) ** 2 < radius**2)
            disc = [rng.integers(n) for n in shape]
            image[(z == disc[0]) & ((y - disc[1]) ** 2 + (x - disc[2]) ** 2 < radius**2)] += 2
    image[balls] = 0.3 * rng.normal(size=int(balls.sum())) + 2
    return torch.from_numpy(image).float(), torch.from_numpy(balls)


def trained(segment_dims: int, steps: int) -> tuple[OmniMRI, torch.Tensor]:
    model = decoding_model(segment_dims)
    objective = InstructionTuning(model, LossWeights())
    condition = conditions(torch.Generator().manual_seed(0), 1)
    optimizer = torch.optim.AdamW(model.image_decoder.parameters(), lr=5e-3)
    rng = np.random.default_rng(0)
    for _ in range(steps):
        pairs = [balls_and_plates(rng, WINDOW) for _ in range(4)]
        slices, target = (torch.stack(arrays) for arrays in zip(*pairs, strict=True))
        if segment_dims == 2:
            slices, target = slices.flatten(0, 1), target.flatten(0, 1)
        batch = {"volume": torch.zeros(4), "slices": slices, "slice_target": target[:, None]}
        losses = objective._segmentation_losses(batch, condition.expand(len(slices), 1, -1, -1))
        optimizer.zero_grad()
        losses["loss_segment"].backward()
        optimizer.step()
    return model, condition


@pytest.mark.slow
def test_volumes_tell_balls_from_discs_that_slices_cannot() -> None:
    """Trained alike on patches and on their slices, tried on unseen volumes larger than a window."""
    rng = np.random.default_rng(7)
    cases = [balls_and_plates(rng, (18, 44, 40)) for _ in range(3)]
    in_volumes, condition = trained(3, steps=60)
    in_slices, _ = trained(2, steps=60)
    scores: dict[str, list[float]] = {"one step": [], "four steps": [], "slices": []}
    for volume, truth in cases:
        for name, num_steps in (("one step", 1), ("four steps", 4)):
            found = by_windows(in_volumes, volume, condition, num_steps)[0] >= 0.5
            scores[name].append(dice(truth.numpy(), found.numpy()))
        stack = condition.expand(len(volume), 1, -1, -1)
        slices = in_slices.image_decoder.segment(volume, stack, slice_pyramid(in_slices, volume), num_steps=1)
        scores["slices"].append(dice(truth.numpy(), (slices[:, 0] >= 0.5).numpy()))
    means = {name: float(np.mean(values)) for name, values in scores.items()}
    assert means["one step"] > 0.8, means
    assert means["four steps"] > 0.8, means
    assert means["slices"] < 0.75, means
