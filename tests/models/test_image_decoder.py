"""The bridges: what they must do whatever the network has learned."""

import pytest
import torch
from monai.networks.nets.basic_unet import Down, TwoConv, UpCat

from omnimri.models import image_decoder
from omnimri.models.config import preset
from omnimri.models.image_decoder import ImageDecoder, Measurement, bridge_state
from omnimri.models.physics import SenseOperator, relative_residual


def decoder_and_inputs(rng: torch.Generator, height: int = 48, width: int = 40) -> tuple:
    config = preset("tiny")
    channels = tuple(config.vision.embed_dim * f for f in (1, 2, 4, 8, 8))
    torch.manual_seed(0)
    decoder = ImageDecoder(config.image_decoder, config.connector.dim, channels).eval()
    condition = torch.randn(2, 16, config.connector.dim, generator=rng)
    pyramid = [
        torch.randn(2, c, -(-height // s), -(-width // s), generator=rng)
        for c, s in zip(channels, (2, 4, 8, 16, 16), strict=True)
    ]
    return decoder, condition, pyramid


def measurement(rng: torch.Generator, height: int = 48, width: int = 40) -> tuple[Measurement, torch.Tensor]:
    maps = torch.randn(2, 4, height, width, dtype=torch.complex64, generator=rng)
    maps = maps / maps.abs().square().sum(1, keepdim=True).sqrt()
    truth = torch.randn(2, height, width, dtype=torch.complex64, generator=rng)
    operator = SenseOperator(maps, torch.arange(width) % 2 == 0)
    kspace = operator.forward(truth)
    return Measurement.start(kspace, operator, preset("tiny").image_decoder), truth


def test_untrained_decoder_returns_the_start_of_the_bridge(rng: torch.Generator) -> None:
    """The last convolution starts at zero, so that training begins where the data are."""
    decoder, condition, pyramid = decoder_and_inputs(rng)
    measured, _ = measurement(rng)
    estimate = decoder.predict_image(measured.initial, torch.ones(2), measured, condition, pyramid, consistent=False)
    torch.testing.assert_close(estimate, measured.initial)


@pytest.mark.parametrize("num_steps", [1, 3, 8])
def test_any_number_of_steps_returns_what_an_oracle_predicts(
    rng: torch.Generator, monkeypatch: pytest.MonkeyPatch, num_steps: int
) -> None:
    decoder, condition, pyramid = decoder_and_inputs(rng)
    measured, truth = measurement(rng)
    monkeypatch.setattr(decoder, "predict_image", lambda *args, **kwargs: truth)
    image = decoder.reconstruct(measured, condition, pyramid, num_steps=num_steps)
    torch.testing.assert_close(image, truth, rtol=1e-4, atol=1e-5)


def test_reconstruction_stays_true_to_the_measurement(rng: torch.Generator) -> None:
    """Data consistency inside each step: even an untrained network's image explains the data far better."""
    decoder, condition, pyramid = decoder_and_inputs(rng)
    measured, _ = measurement(rng)
    image = decoder.reconstruct(measured, condition, pyramid, num_steps=4)
    before = relative_residual(measured.operator.adjoint(measured.kspace), measured.kspace, measured.operator)
    after = relative_residual(image, measured.kspace, measured.operator)
    assert (after < 0.2 * before).all()


def test_steps_divide_the_bridge_evenly_without_a_second_shift() -> None:
    assert [round(time, 4) for _, time in image_decoder._steps(4)] == [1.0, 0.75, 0.5, 0.25]


def test_bridge_has_its_ends_where_they_belong(rng: torch.Generator) -> None:
    clean, start = torch.randn(3, 8, 8, generator=rng), torch.randn(3, 8, 8, generator=rng)
    torch.testing.assert_close(bridge_state(clean, start, torch.ones(3), 0.5), start)
    torch.testing.assert_close(bridge_state(clean, start, torch.zeros(3), 0.5), clean)


@pytest.mark.parametrize(("height", "width"), [(48, 40), (50, 45), (17, 33)])
def test_any_matrix_size_is_segmented(rng: torch.Generator, height: int, width: int) -> None:
    decoder, condition, pyramid = decoder_and_inputs(rng, height, width)
    image = torch.randn(2, height, width, generator=rng)
    probability = decoder.segment(image, condition[:, None], pyramid, num_steps=2)
    assert probability.shape == (2, 1, height, width)
    assert ((probability >= 0) & (probability <= 1)).all()


def test_masks_follow_their_prompts(rng: torch.Generator) -> None:
    """Prompts that share a pass may come in any order; the same prompt twice gets the same mask twice."""
    decoder, _, pyramid = decoder_and_inputs(rng)
    image = torch.randn(2, 48, 40, generator=rng)
    prompts = torch.randn(2, 3, 16, preset("tiny").connector.dim, generator=rng)
    masks = decoder.segment(image, prompts, pyramid, num_steps=2)
    turned = decoder.segment(image, prompts.flip(1), pyramid, num_steps=2)
    torch.testing.assert_close(turned, masks.flip(1), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(masks[:, 0], masks[:, 1])
    twice = decoder.segment(image, prompts[:, [0, 1, 1]], pyramid, num_steps=2)
    torch.testing.assert_close(twice[:, 1], twice[:, 2])


def test_a_mask_does_not_depend_on_what_else_is_asked_for(rng: torch.Generator) -> None:
    """Cerebrospinal fluid had a Dice of 0.60 when asked for alone and 0.80 beside three others, as in training."""
    decoder, _, pyramid = decoder_and_inputs(rng)
    image = torch.randn(2, 48, 40, generator=rng)
    prompts = torch.randn(2, 3, 16, preset("tiny").connector.dim, generator=rng)
    masks = decoder.segment(image, prompts, pyramid, num_steps=1)
    for asked in ([1], [2, 0]):
        torch.testing.assert_close(decoder.segment(image, prompts[:, asked], pyramid, num_steps=1), masks[:, asked])


def test_levels_over_slices_are_those_of_monai(rng: torch.Generator) -> None:
    """Checkpoints hold the tensors of `BasicUNet`'s blocks, which the trunk was once made of."""
    trunk = decoder_and_inputs(rng)[0].segment_trunk
    blocks = {"act": ("leakyrelu", {"negative_slope": 0.1, "inplace": True}), "norm": ("instance", {"affine": True})}
    first = TwoConv(2, 9, 16, bias=True, **blocks)
    down = Down(2, 16, 32, bias=True, **blocks)
    up = UpCat(2, 32, 16, 16, bias=True, **blocks, halves=False)
    for theirs, own in ((first, trunk.first), (down, trunk.downs[0]), (up, trunk.ups[0])):
        theirs.load_state_dict(own.state_dict())
    image = torch.randn(2, 9, 48, 40, generator=rng)
    fine, own_fine = first(image), trunk.first(image)
    coarse, own_coarse = down(fine), trunk.downs[0](own_fine)
    torch.testing.assert_close(own_coarse, coarse, rtol=0, atol=0)
    torch.testing.assert_close(trunk.ups[0](own_coarse, own_fine), up(coarse, fine), rtol=0, atol=0)


def test_number_of_steps_is_bounded(rng: torch.Generator) -> None:
    decoder, condition, pyramid = decoder_and_inputs(rng)
    with pytest.raises(ValueError, match="expected 1 to 50"):
        decoder.segment(torch.zeros(2, 48, 40), condition[:, None], pyramid, num_steps=0)
