"""What each stage's losses must do, on a tiny model with made-up batches."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from omnimri.models.backbone import balance_loss, router_statistics
from omnimri.models.collate import collate
from omnimri.models.config import preset
from omnimri.models.engine import sequence_builder
from omnimri.models.flow_head import FlowHead, copy_loss
from omnimri.models.label_head import label_loss
from omnimri.models.objectives import build_objective
from omnimri.models.omnimri import OmniMRI
from omnimri.models.prompts import IGNORED, SequenceBuilder
from omnimri.models.ssl_heads import instance_loss, masked_image_loss, neighbour_contrast_loss
from omnimri.models.tokenizer import train_tokenizer
from omnimri.models.vision import VisionEncoder
from omnimri.models.vocabulary import DENSE_LABELS


@pytest.fixture(scope="module")
def model() -> OmniMRI:
    torch.manual_seed(0)
    return OmniMRI(preset("tiny"))


@pytest.fixture(autouse=True)
def encoder_is_frozen(model: OmniMRI) -> None:
    """As in every stage but the first."""
    model.vision.requires_grad_(False)


@pytest.fixture(scope="module")
def builder(model: OmniMRI) -> SequenceBuilder:
    tokenizer = train_tokenizer(["Provide your diagnosis of this MRI volume. old infarct in the left lobe"] * 3, 400)
    return sequence_builder(model.config, tokenizer)


def volume_fields(seed: int) -> dict:
    rng = np.random.default_rng(seed)
    return {
        "volume": rng.normal(size=(1, 24, 56, 48)).astype(np.float32),
        "spacing_mm": np.array([6, 4, 4], np.float32),
        "contrast": np.int64(seed % 4),
    }


def text_samples(count: int) -> list[dict]:
    return [
        volume_fields(i) | {"instruction": "Provide your diagnosis.", "facts": {"plane": "axial"}, "task": "diagnose",
                            "answer": "<response>old infarct.</response>"} for i in range(count)
    ]  # fmt: skip


def image_samples(count: int) -> list[dict]:
    rng = np.random.default_rng(5)

    def noise(*shape: int) -> np.ndarray:
        return (rng.normal(size=shape) + 1j * rng.normal(size=shape)).astype(np.complex64)

    maps = noise(2, 4, 32, 32)
    maps /= np.sqrt((np.abs(maps) ** 2).sum(1, keepdims=True))
    return [
        volume_fields(i) | {"instruction": "Reconstruct.", "facts": {}, "task": "reconstruct",
                            "kspace": noise(2, 4, 32, 32), "sens_maps": maps,
                            "mask": np.ones((2, 32), bool), "target": noise(2, 32, 32)}
        for i in range(count)
    ]  # fmt: skip


def segment_samples(count: int) -> list[dict]:
    rng = np.random.default_rng(6)
    return [
        volume_fields(i) | {"instruction": ["Segment the grey matter.", "Segment the white matter."], "facts": {},
                            "task": "segment", "slices": rng.normal(size=(2, 32, 32)).astype(np.float32),
                            "slice_target": rng.random((2, 2, 32, 32)) < 0.3}
        for i in range(count)
    ]  # fmt: skip


def gradients(model: OmniMRI) -> set[str]:
    """Parts that received a gradient."""
    touched = {name for name, part in model.parts().items() if any(p.grad is not None for p in part.parameters())}
    model.zero_grad(set_to_none=True)
    return touched


def test_vision_stage_teaches_the_encoder_and_its_heads_only(model: OmniMRI, builder: SequenceBuilder) -> None:
    model.vision.requires_grad_(True)
    samples = [{"volume": volume_fields(i)["volume"], "attributes": np.array([i, 0, 0])} for i in range(2)]
    build_objective("vision", model)(collate(samples, builder))["loss"].backward()
    assert gradients(model) == {"vision", "ssl_heads"}


def labelled_samples() -> list[dict]:
    rng = np.random.default_rng(3)
    shape = (2, len(DENSE_LABELS), 8, 32, 24)
    return [
        {"volumes": rng.normal(size=(2, 1, *shape[2:])).astype(np.float32), "labels": rng.random(shape) < 0.01,
         "known": np.ones(shape[:2], bool)}
        for _ in range(2)
    ]  # fmt: skip


def test_labels_teach_the_encoder_at_every_level(model: OmniMRI, builder: SequenceBuilder) -> None:
    model.vision.requires_grad_(True)
    objective = build_objective("vision", model)
    objective(collate(labelled_samples(), builder))["loss"].backward()
    assert all(level.weight.grad.abs().sum() > 0 for level in objective.label_head.levels)
    assert gradients(model) == {"vision"}


def test_labels_that_are_not_known_do_not_count() -> None:
    """The loss is blind to them and falls to nothing with the answer, also where a level has odd numbers of places."""
    labels = torch.rand(2, 3, 8, 32, 24, generator=torch.Generator().manual_seed(0)) < 0.002
    known = torch.tensor([[True, True, False], [True, False, True]])
    strides = [(1, 2, 2), (2, 4, 4), (4, 8, 8), (8, 16, 16), (8, 16, 16)]  # three places of 8 become two of 16
    answer = [20.0 * (2 * F.max_pool3d(labels.float(), s, ceil_mode=True) - 1) for s in strides]
    assert [a.shape[2:] for a in answer] == [
        m.shape[2:] for m in VisionEncoder(preset("tiny").vision)(labels[:, :1] * 1.0)
    ]
    assert label_loss(answer, labels, known) < 1e-6
    other = torch.where(known[..., None, None, None], labels, ~labels)
    assert label_loss(answer, other, known) < 1e-6
    assert label_loss(answer, ~labels, known) > 1


@pytest.mark.parametrize("frozen", [True, False])
def test_alignment_reaches_the_encoder_unless_it_is_frozen(
    model: OmniMRI, builder: SequenceBuilder, frozen: bool
) -> None:
    model.vision.requires_grad_(not frozen)
    samples = [volume_fields(i) | {"text": f"report {i}", "image_first": True, "text_group": i} for i in range(3)]
    losses = build_objective("align", model)(collate(samples, builder))
    losses["loss"].backward()
    assert gradients(model) == {"align", "text_encoder", "clip_head"} | (set() if frozen else {"vision"})
    assert 0 <= float(losses["retrieval_at_1"]) <= 1


def test_equal_texts_are_no_negatives(model: OmniMRI, builder: SequenceBuilder) -> None:
    """With one group for all there is nothing to tell apart: the excess over the floor stays near zero."""
    samples = [volume_fields(i) | {"text": "same", "image_first": True, "text_group": 7} for i in range(4)]
    losses = build_objective("align", model)(collate(samples, builder))
    assert float(losses["retrieval_at_1"]) == 1.0


def test_multimodal_stage_predicts_both_modalities(model: OmniMRI, builder: SequenceBuilder) -> None:
    samples = [volume_fields(i) | {"text": f"report {i}", "image_first": i == 0, "text_group": i} for i in range(2)]
    losses = build_objective("multimodal", model)(collate(samples, builder))
    losses["loss"].backward()
    assert gradients(model) == {"align", "backbone", "flow_head"}
    assert losses["loss_visual"].item() > 0
    assert losses["loss_text"].item() > 0
    assert {"visual_copied", "visual_shuffled"} <= losses.keys()


def test_reconstruction_reaches_the_backbone_through_its_queries(model: OmniMRI, builder: SequenceBuilder) -> None:
    objective = build_objective("instruct", model, {"balance": 0.0, "router_z": 0.0})
    torch.nn.init.normal_(model.image_decoder.reconstruct_trunk.last.weight, std=0.01)
    losses = objective(collate(image_samples(2), builder))
    losses["loss_reconstruct"].backward()
    assert {"backbone", "connector", "image_decoder", "align"} <= gradients(model)


def test_segmentation_answers_every_prompt_of_every_volume(model: OmniMRI, builder: SequenceBuilder) -> None:
    objective = build_objective("instruct", model, {"balance": 0.0, "router_z": 0.0})
    batch = collate(segment_samples(2), builder)
    assert len(batch["token_ids"]) == 2 * len(batch["volume"])
    losses = objective(batch)
    losses["loss_segment"].backward()
    assert {"backbone", "connector", "image_decoder"} <= gradients(model)
    assert objective.pictures(batch)["segment"].shape == (4 * 32, 5 * 32)


def test_patches_of_volumes_are_answered_as_slices_are(model: OmniMRI, builder: SequenceBuilder) -> None:
    """The loss of the volume decoder reaches the backbone too; its pictures are the middle slices of the patches."""
    decoder = replace(model.config.image_decoder, segment_dims=3)
    torch.manual_seed(0)
    volumetric = OmniMRI(replace(model.config, image_decoder=decoder))
    volumetric.vision.requires_grad_(False)
    rng = np.random.default_rng(6)
    samples = [
        sample
        | {
            "slices": rng.normal(size=(2, 5, 32, 32)).astype(np.float32),
            "slice_target": rng.random((2, 2, 5, 32, 32)) < 0.3,
        }
        for sample in segment_samples(2)
    ]
    objective = build_objective("instruct", volumetric, {"balance": 0.0, "router_z": 0.0})
    batch = collate(samples, builder)
    losses = objective(batch)
    losses["loss_segment"].backward()
    assert {"backbone", "connector", "image_decoder"} <= gradients(volumetric)
    assert 0 < losses["soft_dice"].item() < 1
    assert objective.pictures(batch)["segment"].shape == (4 * 32, 5 * 32)


def test_a_volume_without_the_structure_does_not_shout_down_one_that_has_it(
    model: OmniMRI, builder: SequenceBuilder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where masks are nearly empty; counted in the Dice, absence pushed eleven times as hard as presence pulled."""
    batch = collate(segment_samples(2), builder)
    slices = len(batch["slices"]) // 2
    batch["slice_target"] = torch.zeros_like(batch["slice_target"])
    batch["slice_target"][:slices, :, 10:13, 10:13] = True  # the first volume has it, the second does not
    logit = torch.full(batch["slice_target"].shape, -6.0, requires_grad=True)
    monkeypatch.setattr(model.image_decoder, "predict_mask", lambda *_: logit)
    build_objective("instruct", model)(batch)["loss_segment"].backward()
    assert logit.grad is not None
    pull = -logit.grad[batch["slice_target"]].sum()
    push = logit.grad[slices:].sum()
    assert 0 < push < pull


def test_an_untrained_backbone_already_tells_prompts_apart(model: OmniMRI, builder: SequenceBuilder) -> None:
    """Without the instruction's own words the two conditions differed by 1.3 % after 80 training steps."""
    batch = collate(segment_samples(1), builder)
    hidden = torch.ones(2, batch["token_ids"].shape[1], model.config.backbone.hidden_size)
    with torch.no_grad():
        grey, white = model.conditions(hidden, batch).flatten(1)
    assert (grey - white).norm() > 0.2 * grey.norm()


def test_states_of_the_backbone_come_in_through_a_gate_that_opens_by_learning(
    model: OmniMRI, builder: SequenceBuilder, rng: torch.Generator
) -> None:
    model, batch = copy.deepcopy(model), collate(segment_samples(1), builder)
    shape = (2, batch["token_ids"].shape[1], model.config.backbone.hidden_size)
    early, late = torch.randn(2, *shape, generator=rng)
    told = model.conditions(early, batch)
    torch.testing.assert_close(told, model.conditions(late, batch), rtol=0, atol=0)
    told[..., 0].sum().backward()
    with torch.no_grad():
        model.connector.gate -= model.connector.gate.grad
        assert (model.conditions(early, batch) - model.conditions(late, batch)).abs().max() > 1e-3


def test_pictures_stand_side_by_side(model: OmniMRI, builder: SequenceBuilder) -> None:
    pictures = build_objective("instruct", model).pictures(collate(image_samples(1), builder))
    assert pictures["reconstruct"].shape == (2 * 32, 3 * 32)
    assert pictures["reconstruct"].min() >= 0
    assert pictures["reconstruct"].max() <= 1


def test_later_tokens_do_not_change_earlier_states(model: OmniMRI, builder: SequenceBuilder) -> None:
    """The causal mask holds through the whole embedding path."""
    batch = collate(text_samples(1), builder)
    visual = torch.randn(1, model.num_visual_tokens, model.config.backbone.hidden_size)
    embeds = model.embed(batch["token_ids"], visual, batch["visual_places"])
    changed = embeds.clone()
    changed[:, -1] += 1.0
    with torch.no_grad():
        states = [model.backbone.model(inputs_embeds=e).last_hidden_state for e in (embeds, changed)]
    torch.testing.assert_close(states[0][:, :-1], states[1][:, :-1])
    assert not torch.allclose(states[0][:, -1], states[1][:, -1])


def test_padding_does_not_change_the_loss(model: OmniMRI, builder: SequenceBuilder) -> None:
    objective = build_objective("instruct", model)
    batch = collate(text_samples(1), builder)
    padded = dict(batch)
    for name, value in (("token_ids", 0), ("labels", IGNORED), ("visual_places", False), ("query_places", False)):
        padded[name] = torch.nn.functional.pad(batch[name], (0, 9), value=value)
    with torch.no_grad():
        torch.testing.assert_close(objective(batch), objective(padded), rtol=1e-4, atol=1e-4)


def test_placeholders_must_match_the_visual_tokens(model: OmniMRI, builder: SequenceBuilder) -> None:
    batch = collate(text_samples(1), builder)
    with pytest.raises(ValueError, match="image placeholders"):
        model.embed(batch["token_ids"], torch.zeros(1, 5, 256), batch["visual_places"])


def test_balance_is_one_when_even_and_experts_over_k_when_collapsed() -> None:
    even = torch.full((2, 4), 0.25)
    torch.testing.assert_close(balance_loss(even * 2, even, top_k=2), torch.tensor(1.0))
    collapsed = torch.tensor([[1.0, 1, 0, 0], [0, 0, 1, 1]])
    torch.testing.assert_close(balance_loss(collapsed, collapsed / 2, top_k=2), torch.tensor(2.0))


def test_router_load_counts_only_the_chosen_tokens() -> None:
    logits = torch.tensor([[9.0, 0, 0, 0], [0, 9, 0, 0], [0, 0, 9, 0]])
    load, probability = router_statistics((logits,), 1, torch.tensor([[True, True, False]]))
    assert load.tolist() == [[0.5, 0.5, 0.0, 0.0]]
    torch.testing.assert_close(probability.sum(1), torch.ones(1))


def test_masked_loss_ignores_air_and_visible_voxels(rng: torch.Generator) -> None:
    target = torch.randn(1, 1, 2, 4, 4, generator=rng)
    masked = torch.zeros_like(target, dtype=torch.bool)
    masked[..., :2] = True
    foreground = torch.ones_like(masked)
    foreground[:, :, 0] = False
    wrong_elsewhere = torch.where(masked & foreground, target, target + 100)
    assert float(masked_image_loss(wrong_elsewhere, target, masked, foreground)) == 0.0


def test_neighbour_contrast_prefers_the_own_volume(rng: torch.Generator) -> None:
    tokens = torch.randn(3, 1, 8, generator=rng).expand(3, 6, 8)
    shuffled = tokens[torch.tensor([1, 2, 0])]
    assert float(neighbour_contrast_loss(tokens, tokens)) < float(neighbour_contrast_loss(tokens, shuffled))


def test_instance_loss_counts_shared_attributes_as_near(rng: torch.Generator) -> None:
    """Volumes of one contrast embedded together cost less when their attributes say that they belong together."""
    centre = torch.randn(2, 8, generator=rng).repeat_interleave(2, dim=0).repeat(2, 1)
    views = centre + 0.01 * torch.randn(8, 8, generator=rng)
    right, wrong = torch.tensor([[0], [0], [1], [1]]), torch.tensor([[0], [1], [0], [1]])
    assert float(instance_loss(views, right)) < float(instance_loss(views, wrong))


def test_flow_head_learns_what_the_hidden_state_tells() -> None:
    """Loss with the true hidden states falls below the loss with shuffled ones; no gradient reaches the targets."""
    torch.manual_seed(0)
    head = FlowHead(preset("tiny").flow_head, token_dim=8, hidden_size=16)
    tokens = torch.randn(256, 8, requires_grad=True)
    hidden = torch.cat([tokens, tokens], dim=1).detach()
    optimizer = torch.optim.Adam(head.parameters(), lr=3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        head.loss(tokens, hidden).backward()
        optimizer.step()
    assert tokens.grad is None
    with torch.no_grad():
        assert float(head.loss(tokens, hidden)) < 0.8 * float(head.loss(tokens, hidden[torch.randperm(256)]))


@pytest.mark.parametrize("step", [0.3, 1.5])
def test_copying_costs_what_the_best_guess_about_the_token_before_costs(step: float) -> None:
    """Against that guess itself, drawn as the loss draws: the mean of a normal token given its noisy self."""
    rng = torch.Generator().manual_seed(0)
    tokens = (step * torch.randn(64, 400, 8, generator=rng)).cumsum(1)
    token, before = tokens[:, 1:], tokens[:, :-1]
    time = torch.sigmoid(torch.randn(*token.shape[:2], 1, generator=rng))
    noise = torch.randn(token.shape, generator=rng)
    noisy = (1 - time) * token + time * noise
    gain = (1 - time) * step**2 / ((1 - time).square() * step**2 + time.square())
    guess = before + gain * (noisy - (1 - time) * before)
    error = ((noisy - guess) / time - (noise - token)).square().mean()
    assert copy_loss(tokens).item() == pytest.approx(error.item(), rel=0.02)


def test_unknown_objective_and_weight_are_refused(model: OmniMRI) -> None:
    with pytest.raises(ValueError, match="known: vision, align, multimodal, instruct"):
        build_objective("other", model)
    with pytest.raises(ValueError, match="known: balance"):
        build_objective("vision", model, {"focal": 1.0})


def test_local_crops_are_further_views_of_their_volume(model: OmniMRI, builder: SequenceBuilder) -> None:
    """With each volume its own attributes, three embeddings that agree cost less than two that agree and one that
    is another volume's."""
    volumes = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
    apart = torch.arange(2)[:, None]
    right = instance_loss(volumes.repeat(3, 1), apart)
    assert right < instance_loss(torch.cat([volumes, volumes, volumes.flip(0)]), apart)
    samples = [volume_fields(i) | {"attributes": np.array([i, i, i])} for i in range(2)]
    objective = build_objective("vision", model, {"local_crops": 2, "augment": {"motion_share": 1.0}})
    losses = objective(collate(samples, builder))
    assert all(torch.isfinite(value) for value in losses.values())
    with pytest.raises(ValueError, match=r"Unknown augmentations.*known: coarsest"):
        build_objective("vision", model, {"augment": {"motions": 1}})
