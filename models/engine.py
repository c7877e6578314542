"""From a checkpoint to answers: the one inference path, used by evaluation and by serving.

An engine may hold only the parts that its replica needs: `encoder` makes prompts, `text` writes, `image` draws. What
crosses between them are plain arrays.
"""

# Z Y X native voxels, L sequence length, H backbone width, K queries, P condition width, S samples

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from llguidance import LLTokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from omnimri.models.boxes import Box, BoxCoder, text_to_boxes
from omnimri.models.collate import sequence_batch
from omnimri.models.config import OmniMRIConfig
from omnimri.models.decoding import (
    PieceStreamer,
    Recorder,
    TextAnswer,
    assemble,
    grammar_tokens,
    matcher_of,
    stop_tokens,
)
from omnimri.models.detection import Detection, read_detection
from omnimri.models.grammars import detection_grammar
from omnimri.models.image_decoder import Measurement
from omnimri.models.metrics import box_iou
from omnimri.models.objectives import patch_pyramid, slice_pyramid
from omnimri.models.omnimri import OmniMRI, read_index
from omnimri.models.physics import SenseOperator, estimate_sens_maps, relative_residual, simulated_acquisition
from omnimri.models.preprocess import Preprocess, read_preprocess, scale_kspace
from omnimri.models.prompts import SequenceBuilder
from omnimri.models.scan import Scan
from omnimri.models.tokenizer import load_tokenizer
from omnimri.models.vocabulary import CONTRASTS, IMAGE_TASKS, TASKS

PARTS = {
    "encoder": ("vision", "align", "backbone", "connector"),
    "text": ("backbone",),
    "image": ("vision", "image_decoder"),
}
SLICES_PER_PASS = 16
SAME_PLACE = 0.1
"""Overlap (IoU) from which two candidate boxes are one."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What the encoder hands to a decoder."""

    task: str
    instruction: str
    token_ids: np.ndarray
    """Int64 `(L,)`, visual positions holding the placeholder."""
    embeds: np.ndarray
    """Float32 `(L, H)`: the whole prompt as embeddings."""
    queries: np.ndarray | None
    """Float32 `(K, P)`: the image decoder's condition; None for text tasks."""
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """A reconstructed scan on its native grid."""

    image: np.ndarray
    """Complex64 `(Z, Y, X)`, in the units of the k-space."""
    uncertainty: np.ndarray | None
    """Expected error of the magnitude `(Z, Y, X)`, root mean square over the samples; None without them.

    A parametric bootstrap (Efron and Tibshirani 1993, section 6.5; for inverse problems Tachella and Pereyra,
    arXiv 2310.11838): the image is acquired again in simulation, with noise like the residual's and other lines of the
    same pattern, and what its reconstruction then misses is taken for what it misses now. Noise along the bridge
    showed a tenth of the error, since the network regresses to the mean. Detail that the image lost altogether, and
    wrong coil maps, are not in it.
    """
    residual: float
    """`|A x - y| / |y|` over the whole scan: distance from what was measured."""

    @property
    def magnitude(self) -> np.ndarray:
        return np.abs(self.image)


@dataclass(frozen=True, kw_only=True)
class Segmentation:
    """Masks by structure on the native grid."""

    masks: dict[str, np.ndarray]
    """Bool `(Z, Y, X)`."""
    probabilities: dict[str, np.ndarray] = field(repr=False)
    """Float32 `(Z, Y, X)`."""


class Engine:
    """A loaded checkpoint."""

    def __init__(
        self,
        model: OmniMRI,
        tokenizer: PreTrainedTokenizerBase,
        version: str,
        preprocess: Preprocess,
        detection: Detection | None = None,
    ) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.version = version
        self.preprocess = preprocess
        self.detection = detection or Detection()

    @classmethod
    def load(cls, folder: Path | str, *, parts: Sequence[str] = ("encoder", "text", "image")) -> Engine:
        """Read a checkpoint folder, only the parts that are asked for.

        Raises:
            ValueError: If the folder is no checkpoint, or a part is unknown.
        """
        if unknown := set(parts) - set(PARTS):
            raise ValueError(f"Unknown engine parts {sorted(unknown)}; known: {', '.join(PARTS)}.")
        wanted = {name for part in parts for name in PARTS[part]}
        model = OmniMRI.load(folder, parts=wanted)
        tokenizer = load_tokenizer(Path(folder) / "tokenizer")
        return cls(model, tokenizer, read_index(folder)["version"], read_preprocess(folder), read_detection(folder))

    @property
    def sequences(self) -> SequenceBuilder:
        """Layout of this model's token sequences."""
        return sequence_builder(self.model.config, self.tokenizer)

    # -- encoder -----------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def encode(self, scan: Scan, instruction: str, task: str, others: Sequence[Scan] = ()) -> Prompt:
        """Look at a scan with an instruction in mind.

        Args:
            scan: For `reconstruct` with `kspace` and `mask`; its image is then the zero-filled one.
            instruction: Natural language.
            task: One of the five tasks.
            others: Further contrasts of the study, shown behind the scan; the answer is about the scan.

        Raises:
            ValueError: If the task is unknown.
        """
        if task not in TASKS:
            raise ValueError(f"Task {task!r} is unknown; known: {', '.join(TASKS)}.")
        scans = (scan, *others)
        visual = torch.cat([self._visual(shown) for shown in scans])
        sequence = self.sequences.request(instruction, [shown.facts for shown in scans], task)
        batch = sequence_batch([sequence], self.sequences)
        embeds = self.model.embed(batch["token_ids"], visual, batch["visual_places"])
        queries = self._queries(embeds, batch) if task in IMAGE_TASKS else None
        return Prompt(
            task=task,
            instruction=instruction,
            token_ids=sequence.token_ids,
            embeds=embeds[0].float().numpy(),
            queries=queries,
            warnings=tuple(self._warnings(scan)),
        )

    def _visual(self, scan: Scan) -> Tensor:
        """Visual tokens `(1, N, H)`."""
        volume = self.preprocess.volume(scan)
        contrast = scan.facts.get("contrast")
        index = CONTRASTS.index(contrast) if contrast in CONTRASTS else len(CONTRASTS)
        return self.model.aligned_tokens(volume.volume[None], volume.spacing_mm[None], torch.tensor([index]))

    def _queries(self, embeds: Tensor, batch: dict[str, Tensor]) -> np.ndarray:
        hidden = self.model.backbone.model(inputs_embeds=embeds).last_hidden_state
        return self.model.conditions(hidden, batch)[0].float().numpy()

    def _warnings(self, scan: Scan) -> Iterator[str]:
        """Where a scan is unlike what the model was trained on, as far as its header and grid tell."""
        contrast, body = scan.facts.get("contrast"), scan.facts.get("body_part")
        if contrast not in CONTRASTS:
            yield f"Contrast {contrast or 'unknown'} is outside the training domain ({', '.join(CONTRASTS)})."
        if body and str(body).lower() not in ("brain", "head"):
            yield f"Body part {body} is outside the training domain (brain)."
        if min(scan.image.shape[-2:]) < 32:
            yield f"Matrix {scan.image.shape[1]} x {scan.image.shape[2]} is smaller than any seen in training."

    # -- text --------------------------------------------------------------------------------------------------------

    def generate_text(
        self, prompt: Prompt, *, max_new_tokens: int = 192, temperature: float = 0.0, seed: int = 0,
        grammar: str | None = None, on_text: Callable[[str], None] | None = None,
    ) -> TextAnswer:  # fmt: skip
        """The whole answer to a text prompt.

        Args:
            prompt: From `encode`.
            max_new_tokens: Behind the opening tag.
            temperature: 0 takes the likeliest token.
            seed: Of the draws.
            grammar: That the answer follows (see `grammars`); None: that of its task, which only detection has.
            on_text: Is called with each piece of the readable text; what it raises ends the decoding.
        """
        streamer = PieceStreamer(self.tokenizer, on_text) if on_text else None
        return self._decode(prompt, max_new_tokens, temperature, seed, grammar, streamer=streamer)[0]

    def sample_texts(
        self, prompt: Prompt, count: int, *, max_new_tokens: int = 192, temperature: float = 1.0, seed: int = 0
    ) -> list[TextAnswer]:
        """Several answers drawn side by side."""
        return self._decode(prompt, max_new_tokens, temperature, seed, None, num_return_sequences=count)

    @torch.inference_mode()
    def _decode(
        self, prompt: Prompt, limit: int, temperature: float, seed: int, grammar: str | None, **options: Any
    ) -> list[TextAnswer]:
        backbone = self.model.backbone
        grammar = grammar or (detection_grammar(self.detection.labels) if prompt.task == "detect" else None)
        recorder = Recorder(partial(matcher_of, self.grammar_tokens, grammar) if grammar else None)
        sampling = {"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature > 0 else {}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            token_ids = backbone.generate(
                inputs_embeds=torch.tensor(prompt.embeds)[None],
                attention_mask=torch.ones(1, len(prompt.embeds), dtype=torch.long),
                max_new_tokens=limit, do_sample=temperature > 0, **sampling, logits_processor=[recorder],
                eos_token_id=stop_tokens(self.tokenizer), pad_token_id=self.tokenizer.pad_token_id,
                **options,
            )  # fmt: skip
        return [
            assemble(self.tokenizer, prompt.task, ids, logprobs)
            for ids, logprobs in zip(token_ids.tolist(), recorder.logprobs(token_ids).tolist(), strict=True)
        ]

    @cached_property
    def grammar_tokens(self) -> LLTokenizer:
        """The vocabulary as grammars see it."""
        return grammar_tokens(self.tokenizer, self.model.config.backbone.vocab_size)

    @torch.inference_mode()
    def score_choices(self, prompt: Prompt, choices: Sequence[str]) -> np.ndarray:
        """Probability of each of several whole answers, summing to one `(len(choices),)`."""
        encoded = [self.tokenizer.encode(choice, add_special_tokens=False) for choice in choices]
        lengths = torch.tensor([len(ids) for ids in encoded])
        padded = torch.zeros(len(encoded), int(lengths.max()), dtype=torch.long)
        for row, ids in zip(padded, encoded, strict=True):
            row[: len(ids)] = torch.tensor(ids)
        start = torch.tensor(prompt.embeds)[None].expand(len(encoded), -1, -1)
        embeds = torch.cat([start, self.model.backbone.get_input_embeddings()(padded)], dim=1)
        logits = self.model.backbone(inputs_embeds=embeds, logits_to_keep=padded.shape[1] + 1).logits[:, :-1]
        token_scores = logits.float().log_softmax(-1).gather(-1, padded[..., None])[..., 0]
        counted = torch.arange(padded.shape[1])[None] < lengths[:, None]
        return (token_scores * counted).sum(1).softmax(0).numpy()

    def boxes(self, answer: TextAnswer, scan: Scan) -> list[Box]:
        """Boxes of a detection answer on the scan's native grid, each with its score.

        Raises:
            ValueError: If the answer cannot be read.
        """
        found = text_to_boxes(answer.text, BoxCoder(scan, self.preprocess))
        return [
            replace(box, score=self.detection.score(logprob), logprob=logprob)
            for box, logprob in zip(found, answer.box_logprobs, strict=True)
        ]

    def candidates(self, answers: Sequence[TextAnswer], scan: Scan) -> list[Box]:
        """Boxes of a greedy and of drawn answers, the surest first, none of them where a surer one lies.

        A greedy answer is one point of operation; these are boxes for all of them. An answer that cannot be read has
        none.
        """
        found: list[Box] = []
        for answer in answers:
            with contextlib.suppress(ValueError):
                found += self.boxes(answer, scan)
        kept: list[Box] = []
        for box in sorted(found, key=lambda box: -(box.score or 0.0)):
            overlap = box_iou(np.array([other.box_voxel for other in kept]), np.array([box.box_voxel]))
            if not (overlap >= SAME_PLACE).any():
                kept.append(box)
        return kept

    # -- image -------------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def reconstruct(
        self, scan: Scan, prompt: Prompt, *, num_steps: int = 1, seed: int = 0, num_samples: int = 1
    ) -> Reconstruction:
        """The image of an undersampled scan, one network for any acceleration and pattern of lines.

        Args:
            scan: With `kspace` and `mask`.
            prompt: From `encode(scan, ..., "reconstruct")`.
            num_steps: Steps along the bridge, 1 to 50; what more cost and bring, `omnimri benchmark sampling` says.
            seed: Of the simulated acquisitions.
            num_samples: More than 1 add an uncertainty map, from so many simulated acquisitions of the image.

        Raises:
            ValueError: If the scan has no k-space or the prompt is of another task.
        """
        if scan.kspace is None:
            raise ValueError("reconstruct: the scan has no k-space; give raw data (fastMRI HDF5 or ISMRMRD).")
        queries = _queries_of(prompt, "reconstruct")
        kspace = torch.tensor(scan.kspace)
        mask = torch.ones(kspace.shape[-1], dtype=torch.bool) if scan.mask is None else torch.tensor(scan.mask)
        maps = estimate_sens_maps(kspace, mask, method=self.preprocess.inputs.sens_maps)
        operator = SenseOperator(maps, mask)
        image = self._image(kspace, operator, queries, num_steps)
        norms = kspace.abs().square().sum(dim=(1, 2, 3))
        residuals = relative_residual(image, kspace, operator)
        uncertainty = None
        if num_samples > 1:
            generator = torch.Generator().manual_seed(seed)
            squares = torch.zeros_like(image.real)
            for _ in range(num_samples):  # one at a time: each is as large as the scan
                measured, other = simulated_acquisition(image, kspace, operator, generator)
                squares += (self._image(measured, other, queries, num_steps).abs() - image.abs()).square()
            uncertainty = (squares / num_samples).sqrt().numpy()
        return Reconstruction(
            image=image.numpy(),
            uncertainty=uncertainty,
            residual=float(((residuals.square() * norms).sum() / norms.sum().clamp_min(1e-12)).sqrt()),
        )

    def _image(self, kspace: Tensor, operator: SenseOperator, queries: Tensor, num_steps: int) -> Tensor:
        """One reconstruction of all slices, complex `(Z, Y, X)`, a few slices at a time."""
        images = []
        decoder = self.model.image_decoder
        for chunk in torch.arange(len(kspace)).split(SLICES_PER_PASS):
            local = SenseOperator(operator.sens_maps[chunk], operator.mask)
            scaled, scale = scale_kspace(kspace[chunk], local)
            measured = Measurement.start(scaled, local, decoder.config)
            image = decoder.reconstruct(
                measured, queries.expand(len(chunk), -1, -1), slice_pyramid(self.model, measured.initial.abs()),
                num_steps=num_steps,
            )  # fmt: skip
            images.append(image * scale[:, None, None])
        return torch.cat(images)

    @torch.inference_mode()
    def segment(self, scan: Scan, prompts: dict[str, Prompt], *, num_steps: int = 1) -> Segmentation:
        """Masks of the structures that the prompts ask for, one prompt each.

        Args:
            scan: The image.
            prompts: By structure, from `encode(scan, ..., "segment")`.
            num_steps: Steps along the bridge; one is a plain segmentation network.

        Raises:
            ValueError: If there is no prompt, or one of another task.
        """
        if not prompts:
            raise ValueError("segment: expected a prompt for each structure, found none.")
        source = self.preprocess.slices(scan)
        queries = torch.stack([_queries_of(prompt, "segment") for prompt in prompts.values()])
        probabilities = {
            name: self.preprocess.to_native(mask, source).astype(np.float32)
            for name, mask in zip(prompts, self._masks(source.slices, queries, num_steps), strict=True)
        }
        return Segmentation(masks={name: p >= 0.5 for name, p in probabilities.items()}, probabilities=probabilities)

    def _masks(self, stack: Tensor, queries: Tensor, num_steps: int) -> Tensor:
        """Probabilities `(N, D, H, W)` on a stack of slices `(D, H, W)`, for `queries` `(N, K, P)`."""
        decoder = self.model.image_decoder
        if decoder.config.segment_dims == 3:
            return decoder.segment_volume(
                stack, queries, partial(patch_pyramid, self.model),
                patch_shape=self.model.config.patch_shape, num_steps=num_steps,
            )  # fmt: skip
        parts = [
            decoder.segment(
                slices, queries.expand(len(slices), *queries.shape), slice_pyramid(self.model, slices),
                num_steps=num_steps,
            )
            for slices in stack.split(SLICES_PER_PASS)
        ]  # fmt: skip
        return torch.cat(parts).transpose(0, 1)


def sequence_builder(config: OmniMRIConfig, tokenizer: PreTrainedTokenizerBase) -> SequenceBuilder:
    """The layout of token sequences for a model configuration."""

    def num_tokens(shape: tuple[int, int, int]) -> int:
        return math.prod(-(-size // step) for size, step in zip(shape, config.vision.token_stride, strict=True))

    return SequenceBuilder(
        tokenizer,
        num_visual=num_tokens(config.inputs.volume_shape),
        num_queries=config.connector.num_queries,
        num_slice_visual=num_tokens((1, *config.inputs.slice_shape)),
    )


def _queries_of(prompt: Prompt, task: str) -> Tensor:
    if prompt.task != task or prompt.queries is None:
        raise ValueError(f"{task}: expected a prompt of that task, found one of {prompt.task!r}.")
    return torch.tensor(prompt.queries)
