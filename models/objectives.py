"""What each training stage minimises: one module per stage, from a batch to its losses.

`objective(batch)` returns scalars; `loss` is minimised, the others are there to be watched.
"""

# B volumes, S slices per volume, N visual tokens, L sequence length, H backbone width, K queries

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from omnimri.models.augment import AugmentConfig, augment, local_crop
from omnimri.models.backbone import balance_loss, router_statistics, router_z_loss
from omnimri.models.flow_head import copy_loss
from omnimri.models.image_decoder import Measurement, bridge_state
from omnimri.models.label_head import LabelHead, label_loss
from omnimri.models.omnimri import OmniMRI, pyramid_channels
from omnimri.models.physics import SenseOperator
from omnimri.models.prompts import IGNORED
from omnimri.models.ssl_heads import instance_loss, masked_image_loss, neighbour_contrast_loss
from omnimri.models.vocabulary import DENSE_LABELS

Batch = dict[str, Tensor]
Losses = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class LossWeights:
    """Weights of the parts of each stage's loss."""

    patch_contrast: float = 0.5
    """Stage 1: neighbouring patches, beside masked image modelling at 1."""
    instance: float = 0.5
    """Stage 1: instance discrimination of volumes."""
    local_crops: int = 0
    """Stage 1: crops of half the width and height that instance discrimination sees beside two whole views; each costs
    about an eighth of the step (SwAV, arXiv 2006.09882)."""
    labels: float = 1.0
    """Stage 1: labels of patches and slices, in the steps that the sources `image.labelled` and `image.labelled_slices`
    get; they have this loss alone."""
    mask_ratio: float = 0.6
    """Stage 1: share of token-sized blocks that are masked."""
    visual: float = 0.5
    """Stage 3: next visual token, beside the next text token at 1."""
    balance: float = 0.01
    """Stages 3 and 4: load balance of the router."""
    router_z: float = 0.001
    """Stages 3 and 4: size of the router's logits."""
    image: float = 1.0
    """Stage 4: image losses, beside the text loss at 1."""
    bridge_share: float = 0.1
    """Stage 4: share of samples drawn inside the bridge; the others stand at its start, where one step decides."""


_Options = TypeVar("_Options", LossWeights, AugmentConfig)


class VisionPretraining(nn.Module):
    """Stage 1: masked image modelling, neighbouring-patch contrast, instance discrimination; labels where some are."""

    def __init__(self, model: OmniMRI, weights: LossWeights, changes: AugmentConfig | None = None) -> None:
        super().__init__()
        self.model, self.weights, self.changes = model, weights, changes or AugmentConfig()
        self.label_head = LabelHead(pyramid_channels(model.config), len(DENSE_LABELS))

    def forward(self, batch: Batch) -> Losses:
        """`batch`: `volume` `(B, 1, D, H, W)`, and `attributes` `(B, A)`, or `labels` and `known` of `label_loss`."""
        return self._label_losses(batch) if "labels" in batch else self._self_supervised_losses(batch)

    def _label_losses(self, batch: Batch) -> Losses:
        logits = self.label_head(self.model.vision(augment(batch["volume"], self.changes)))
        loss = label_loss(logits, batch["labels"], batch["known"])
        return {"loss": self.weights.labels * loss, "loss_labels": loss}

    def _self_supervised_losses(self, batch: Batch) -> Losses:
        volume, vision, heads = batch["volume"], self.model.vision, self.model.ssl_heads
        shape = tuple(volume.shape[2:])
        grid = vision.token_grid(shape)
        blocks = torch.rand(2 * len(volume), *grid, device=volume.device) < self.weights.mask_ratio
        blocks[len(volume) :] = False  # the second view stays whole: it is the contrast's target
        masked_patches = _spread(blocks, self.model.config.vision.token_stride, vision.config.patch_size, shape)
        views = torch.cat([augment(volume, self.changes), augment(volume, self.changes)])
        tokens = vision.tokens(views, masked_patches)
        masked = _spread(blocks, self.model.config.vision.token_stride, (1, 1, 1), shape)[: len(volume), None]
        foreground = volume > volume.amin(dim=(2, 3, 4), keepdim=True) + 0.5
        first, second = tokens.chunk(2)
        losses = {
            "loss_mim": masked_image_loss(heads.predict_pixels(first, grid, shape), volume, masked, foreground),
            "loss_patch": self._patch_loss(first, second, grid),
            "loss_instance": instance_loss(self._instances(volume, tokens), batch["attributes"]),
        }
        losses["loss"] = (
            losses["loss_mim"]
            + self.weights.patch_contrast * losses["loss_patch"]
            + self.weights.instance * losses["loss_instance"]
        )
        return losses

    def _instances(self, volume: Tensor, tokens: Tensor) -> Tensor:
        """Embeddings `(V B, D)` of two whole views, whose tokens are `(2 B, N, V)`, and of the local crops."""
        pooled = [tokens.mean(1)]
        for _ in range(self.weights.local_crops):
            crop = local_crop(augment(volume, self.changes))
            pooled.append(self.model.vision.tokens(crop).mean(1))
        return self.model.ssl_heads.volume(torch.cat(pooled))

    def _patch_loss(self, first: Tensor, second: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """Positive: the token one step away along a random in-plane axis of the other view (the edge stays)."""
        projected = self.model.ssl_heads.patch(torch.cat([first, second]))
        anchors, others = projected.chunk(2)
        others = others.unflatten(1, grid)
        axis = 2 + int(torch.randint(2, ()))
        index = (torch.arange(others.shape[axis], device=others.device) + 1).clamp_max(others.shape[axis] - 1)
        return neighbour_contrast_loss(anchors, others.index_select(axis, index).flatten(1, 3))


class Alignment(nn.Module):
    """Stage 2: image-text contrast with the encoder frozen; equal texts and one study's volumes are all positives."""

    def __init__(self, model: OmniMRI) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> Losses:
        """`batch`: `volume`, `spacing_mm`, `contrast`, `text_ids` `(B, L)`, `text_lengths` and `text_group` `(B,)`."""
        tokens = self.model.aligned_tokens(batch["volume"], batch["spacing_mm"], batch["contrast"])
        places = torch.arange(batch["text_ids"].shape[1], device=tokens.device)
        attended = (places[None] < batch["text_lengths"][:, None]).long()
        states = self.model.text_encoder(batch["text_ids"], attention_mask=attended).last_hidden_state
        last = states[torch.arange(len(states), device=states.device), batch["text_lengths"] - 1]
        image, text, scale = self.model.clip_head(tokens, last)
        image, text, group = _gather(image), _gather(text), _gather(batch["text_group"])
        target = (group[:, None] == group[None]).float()
        target = target / target.sum(1, keepdim=True)
        logits = scale * image @ text.T
        loss = 0.5 * (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target))
        best = logits.argmax(1)
        matched = (group[best] == group).float().mean()
        # What a perfect match would still cost: repeated texts share their probability.
        floor = -(target * target.clamp_min(1e-12).log()).sum(1).mean()
        return {"loss": loss, "loss_clip": loss.detach() - floor, "retrieval_at_1": matched}


class MultimodalPretraining(nn.Module):
    """Stage 3: the next token, whichever its modality, over interleaved visual and text tokens."""

    def __init__(self, model: OmniMRI, weights: LossWeights) -> None:
        super().__init__()
        self.model, self.weights = model, weights

    def forward(self, batch: Batch) -> Losses:
        """`batch`: `volume`, `spacing_mm`, `contrast`, and the sequence fields of `collate`."""
        vision_tokens = self.model.vision_tokens(batch["volume"])
        visual = self.model.align_tokens(
            vision_tokens, batch["spacing_mm"], batch["contrast"], batch["volume"].shape[2:]
        )
        hidden, losses = _run_backbone(self.model, batch, visual)
        before = batch["visual_places"].roll(-1, dims=1)
        before[:, -1] = False
        losses["loss_visual"] = self.model.flow_head.loss(vision_tokens.flatten(0, 1), hidden[before])
        losses |= self._visual_floors(vision_tokens, hidden[before])
        losses["loss"] = (
            losses["loss_text"] + self.weights.visual * losses["loss_visual"] + _router_terms(losses, self.weights)
        )
        return losses

    @torch.no_grad()
    def _visual_floors(self, tokens: Tensor, hidden: Tensor) -> Losses:
        """What `loss_visual` has to beat: a copy of the token before, and the head with states of other places."""
        shuffled = hidden[torch.randperm(len(hidden), device=hidden.device)]
        return {
            "visual_copied": copy_loss(tokens),
            "visual_shuffled": self.model.flow_head.loss(tokens.flatten(0, 1), shuffled),
        }


class InstructionTuning(nn.Module):
    """Stage 4: text answers and image answers of one backbone, optimised together.

    A batch is of one kind (`slice_target`, `kspace` or neither), the same on every worker: workers that ran
    different heads in one step would get silently wrong gradients under ZeRO.
    """

    def __init__(self, model: OmniMRI, weights: LossWeights) -> None:
        super().__init__()
        self.model, self.weights = model, weights

    def forward(self, batch: Batch) -> Losses:
        """`batch`: the fields of stage 3, and for image answers those of S slices per volume, flattened.

        They are `kspace`, `mask`, `sens_maps`, `target`, or `slices` and `slice_target` `(B S, N, H, W)`, the masks
        of N prompts; the sequences are then N per volume. A decoder of three dimensions takes patches
        `(B S, D, H, W)` in the place of slices.
        """
        hidden, losses = self._run(batch)
        losses["loss"] = losses["loss_text"] + _router_terms(losses, self.weights)
        if "kspace" in batch:
            losses["loss_reconstruct"] = self._reconstruction_loss(batch, self._condition(batch, hidden))
            losses["loss"] = losses["loss"] + self.weights.image * losses["loss_reconstruct"]
        elif "slice_target" in batch:
            losses |= self._segmentation_losses(batch, self._condition(batch, hidden))
            losses["loss"] = losses["loss"] + self.weights.image * losses["loss_segment"]
        return losses

    @torch.no_grad()
    def pictures(self, batch: Batch) -> dict[str, np.ndarray]:
        """The batch's first slices as answered in one step, in [0, 1]: start | answer | truth, prompt by prompt."""
        hidden, _ = self._run(batch)
        if "kspace" in batch:
            measured = self._measurement(batch)
            answer = self.model.image_decoder.reconstruct(
                measured, self._condition(batch, hidden), self._pyramid(measured.initial.abs()), num_steps=1
            )
            return {"reconstruct": _tiles(measured.initial.abs(), answer.abs(), batch["target"].abs())}
        if "slice_target" in batch:
            answer = self.model.image_decoder.segment(
                batch["slices"], self._condition(batch, hidden), self._pyramid(batch["slices"]), num_steps=1
            )
            truth = batch["slice_target"].float()
            answered = [column for pair in zip(answer.unbind(1), truth.unbind(1), strict=True) for column in pair]
            return {"segment": _tiles(*(_middle(column) for column in (batch["slices"], *answered)))}
        return {}

    def _run(self, batch: Batch) -> tuple[Tensor, Losses]:
        """The backbone over every sequence; those about one volume share its visual tokens."""
        visual = self.model.aligned_tokens(batch["volume"], batch["spacing_mm"], batch["contrast"])
        num_images = int(batch["visual_places"].sum()) // visual.shape[1]
        return _run_backbone(self.model, batch, _repeat(visual, num_images))

    def _condition(self, batch: Batch, hidden: Tensor) -> Tensor:
        """Connector output per slice: `(B S, K, P)`, or `(B S, N, K, P)` to segment."""
        states = self.model.conditions(hidden, batch)
        if "kspace" in batch:
            return _repeat(states, len(batch["kspace"]))
        return _repeat(states.unflatten(0, (len(batch["volume"]), -1)), len(batch["slices"]))

    def _reconstruction_loss(self, batch: Batch, condition: Tensor) -> Tensor:
        """`magnitude_loss`, since scores and eyes see the magnitude, and a little of the complex image's error."""
        measured = self._measurement(batch)
        pyramid = self._pyramid(measured.initial.abs())
        target = batch["target"]
        time = self._times(len(target), target.device)
        state = bridge_state(target, measured.initial, time, self.model.config.image_decoder.recon_noise)
        clean = self.model.image_decoder.predict_image(state, time, measured, condition, pyramid)
        return magnitude_loss(clean.abs(), target.abs()) + 3.0 * torch.view_as_real(clean - target).abs().mean()

    def _measurement(self, batch: Batch) -> Measurement:
        operator = SenseOperator(batch["sens_maps"], batch["mask"][:, None, None])
        return Measurement.start(batch["kspace"], operator, self.model.config.image_decoder)

    def _segmentation_losses(self, batch: Batch, condition: Tensor) -> Losses:
        """Cross-entropy of the mask logits, plus Dice of the structures that are there (nnU-Net's loss)."""
        slices, target = batch["slices"], batch["slice_target"].float()
        time = self._times(len(slices), slices.device)
        signed = 2 * target - 1
        state = bridge_state(signed, torch.zeros_like(signed), time, self.model.config.image_decoder.segment_noise)
        logit = self.model.image_decoder.predict_mask(state, slices, time, condition, self._pyramid(slices))
        probability = logit.sigmoid()
        volumes = len(batch["volume"])
        overlap, size, wanted = (
            part.flatten(2).unflatten(0, (volumes, -1)).sum(dim=(1, 3))
            for part in (probability * target, probability + target, target)
        )
        # Dice of each volume's structures that are there. Where one is not, the first wrong voxel would cost as much
        # as a whole structure, and rare ones would be learnt as never there: cross-entropy teaches absence.
        there = wanted > 0
        missed = (1 - (2 * overlap + 1) / (size + 1))[there].sum() / there.sum().clamp_min(1)
        cross_entropy = F.binary_cross_entropy_with_logits(logit, target)
        return {"loss_segment": cross_entropy + missed, "soft_dice": 1 - missed}

    def _times(self, count: int, device: torch.device) -> Tensor:
        """Bridge times: the start (1) for some samples, uniform in (0, 1] for the others."""
        inside = torch.rand(count, device=device) < self.weights.bridge_share
        return torch.where(inside, torch.rand(count, device=device).clamp_min(0.02), 1.0)

    def _pyramid(self, slices: Tensor) -> list[Tensor]:
        """Swin maps of slices `(B, H, W)` as volumes of depth one, or of patches `(B, D, H, W)`."""
        return slice_pyramid(self.model, slices) if slices.ndim == 3 else patch_pyramid(self.model, slices)


def _repeat(rows: Tensor, count: int) -> Tensor:
    """Each row as often as makes `count` of them, copies side by side."""
    return rows.repeat_interleave(count // len(rows), dim=0)


def _middle(images: Tensor) -> Tensor:
    """Slices `(B, H, W)` as they are, of patches `(B, D, H, W)` the middle one."""
    return images if images.ndim == 3 else images[:, images.shape[1] // 2]


def _tiles(*columns: Tensor, rows: int = 4) -> np.ndarray:
    """Slices `(B, H, W)` of several kinds side by side, each scaled to [0, 1], the first few below one another."""
    scaled = [
        (c - c.amin((1, 2), True)) / (c.amax((1, 2), True) - c.amin((1, 2), True)).clamp_min(1e-6) for c in columns
    ]
    return torch.cat([torch.cat(list(c[:rows]), dim=0) for c in scaled], dim=1).float().cpu().numpy()


def slice_pyramid(model: OmniMRI, slices: Tensor) -> list[Tensor]:
    """Feature maps `(B, E, H', W')` of slices `(B, H, W)`, each standardised over its foreground."""
    flat = slices.flatten(1)
    foreground = (
        flat > flat.amin(1, keepdim=True) + 0.1 * (flat.amax(1, keepdim=True) - flat.amin(1, keepdim=True))
    ).float()
    count = foreground.sum(1, keepdim=True).clamp_min(1)
    mean = (flat * foreground).sum(1, keepdim=True) / count
    variance = ((flat - mean).square() * foreground).sum(1, keepdim=True) / count
    standard = ((flat - mean) / variance.clamp_min(1e-12).sqrt()).reshape(slices.shape)
    return [maps[:, :, 0] for maps in patch_pyramid(model, standard[:, None])]


def patch_pyramid(model: OmniMRI, patches: Tensor) -> list[Tensor]:
    """Feature maps `(B, E, D', H', W')` of patches `(B, D, H, W)`, scaled as volumes are; the encoder is frozen."""
    with torch.no_grad():
        maps = model.vision(patches[:, None])
    # Normed over channels as MONAI's SwinUNETR does before its skip connections: the raw maps grow with depth.
    return [F.layer_norm(m.movedim(1, -1), m.shape[1:2]).movedim(-1, 1) for m in maps]


def _run_backbone(model: OmniMRI, batch: Batch, visual: Tensor) -> tuple[Tensor, Losses]:
    """Hidden states `(B, L, H)`, text loss and router health of one batch."""
    ids, labels = batch["token_ids"], batch["labels"]
    real = torch.arange(ids.shape[1], device=ids.device)[None] < batch["lengths"][:, None]
    positions = batch.get("position_ids")
    output = model.backbone.model(
        inputs_embeds=model.embed(ids, visual, batch["visual_places"]),
        # A mask, or a cache, would keep transformers from seeing where packed sequences start.
        attention_mask=real.long() if positions is None else None,
        position_ids=positions,
        use_cache=False,
        output_router_logits=True,
    )
    hidden = output.last_hidden_state
    predicts = labels[:, 1:] != IGNORED
    logits = model.backbone.lm_head(hidden[:, :-1][predicts])
    losses = {"loss_text": F.cross_entropy(logits.float(), labels[:, 1:][predicts])}
    return hidden, losses | _router_losses(model, output.router_logits, batch["visual_places"], real)


def _router_losses(model: OmniMRI, router_logits: tuple[Tensor, ...], visual: Tensor, real: Tensor) -> Losses:
    """Balance per modality, z-loss, and the load that the logs show (share of tokens times E / k, one is even)."""
    top_k = model.config.backbone.experts_per_token
    loads = {"text": router_statistics(router_logits, top_k, real & ~visual)}
    loads["image"] = router_statistics(router_logits, top_k, visual)
    losses = {"loss_balance": torch.stack([balance_loss(f, p, top_k) for f, p in loads.values()]).mean()}
    losses["loss_router_z"] = router_z_loss(router_logits, real)
    overall, _ = router_statistics(router_logits, top_k, real)
    even = overall.mean(0) * overall.shape[1] / top_k
    losses |= {f"router_load_expert_{expert}": load for expert, load in enumerate(even)}
    losses["router_max_violation"] = (overall.max(dim=1).values * overall.shape[1] / top_k - 1).max()
    return losses


def _router_terms(losses: Losses, weights: LossWeights) -> Tensor:
    return weights.balance * losses["loss_balance"] + weights.router_z * losses["loss_router_z"]


def _spread(blocks: Tensor, block: tuple[int, int, int], cell: tuple[int, int, int], shape: tuple[int, ...]) -> Tensor:
    """Blocks `(B, d, h, w)` of `block` voxels on a grid whose cells are `cell` voxels, cut to the volume's shape."""
    for axis, (size, unit) in enumerate(zip(block, cell, strict=True), start=1):
        blocks = blocks.repeat_interleave(size // unit, dim=axis)
    ends = [-(-size // unit) for size, unit in zip(shape, cell, strict=True)]
    return blocks[:, : ends[0], : ends[1], : ends[2]]


def magnitude_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """Mean absolute error, ten times, and one minus SSIM, one and a half times, of magnitudes `(B, H, W)`."""
    return 10.0 * (predicted - target).abs().mean() + 1.5 * (1 - mean_ssim(predicted, target))


def mean_ssim(a: Tensor, b: Tensor, window: int = 7) -> Tensor:
    """Mean structural similarity of magnitudes `(B, H, W)` with range b.max() (Wang et al., TIP 2004; 7x7 uniform)."""
    a, b = a[:, None], b[:, None]
    data_range = b.amax(dim=(1, 2, 3), keepdim=True)
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    mean_a, mean_b = F.avg_pool2d(a, window, 1), F.avg_pool2d(b, window, 1)
    sample = window**2 / (window**2 - 1)
    var_a = sample * (F.avg_pool2d(a * a, window, 1) - mean_a**2)
    var_b = sample * (F.avg_pool2d(b * b, window, 1) - mean_b**2)
    covariance = sample * (F.avg_pool2d(a * b, window, 1) - mean_a * mean_b)
    top = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    return (top / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))).mean()


def _gather(local: Tensor) -> Tensor:
    """Rows of every worker, with the gradient flowing into the own ones; the tensor itself when alone."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return local
    gathered = [torch.empty_like(local) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, local.detach().contiguous())
    gathered[dist.get_rank()] = local
    return torch.cat(gathered)


def build_objective(name: str, model: OmniMRI, options: Mapping[str, Any] | None = None) -> nn.Module:
    """The objective of a stage: `vision`, `align`, `multimodal` or `instruct`.

    Args:
        name: Of the stage.
        model: Holds the parts that the stage needs.
        options: Fields of `LossWeights` that differ from their defaults, and for `vision` a mapping `augment` of those
            of `AugmentConfig`.

    Raises:
        ValueError: If the name or an option is unknown.
    """
    options = dict(options or {})
    changes = _of(AugmentConfig, options.pop("augment", {}), "augmentations")
    weights = _of(LossWeights, options, "loss weights")
    builders: dict[str, Callable[[], nn.Module]] = {
        "vision": lambda: VisionPretraining(model, weights, changes),
        "align": lambda: Alignment(model),
        "multimodal": lambda: MultimodalPretraining(model, weights),
        "instruct": lambda: InstructionTuning(model, weights),
    }
    if name not in builders:
        raise ValueError(f"Objective {name!r} is unknown; known: {', '.join(builders)}.")
    return builders[name]()


def _of(kind: type[_Options], values: Mapping[str, Any], what: str) -> _Options:
    known = {field.name for field in fields(kind)}
    if unknown := set(values) - known:
        raise ValueError(f"Unknown {what} {sorted(unknown)}; known: {', '.join(sorted(known))}.")
    return kind(**values)
