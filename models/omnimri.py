"""The model: parts with their own folders, joined as in the paper's architecture figure.

A checkpoint is a folder with one sub-folder per part (`config.json` and `model.safetensors`), the tokenizer, the
preprocessing contract and the run's configuration. No pickle anywhere.
"""

# B batch, N visual tokens, L sequence length, H backbone width, K queries, P condition width

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from omnimri.models.backbone import build_backbone, build_text_encoder, merge_adapters
from omnimri.models.config import OmniMRIConfig
from omnimri.models.flow_head import FlowHead
from omnimri.models.image_decoder import ImageDecoder
from omnimri.models.preprocess import CONTRACT_FILE, Preprocess
from omnimri.models.ssl_heads import SSLHeads
from omnimri.models.vision import AlignmentLayer, TokenCache, VisionEncoder
from omnimri.models.vocabulary import CONTRASTS

logger = logging.getLogger(__name__)

INDEX_FILE = "omnimri.json"
FORMAT_VERSION = 1
SERVING_PARTS = ("vision", "align", "backbone", "connector", "image_decoder")


class QueryConnector(nn.Module):
    """What the image decoder is told: the instruction's words, and what the backbone made of them.

    The second is MetaQuery's way (arXiv 2504.06256). The words have a table of their own: a backbone that has learned
    little does not attend, among hundreds of visual tokens, to the word that says what to segment; its states drift
    with all else that it learns, and so do its embeddings, which are tied to the text head. The states come in through
    a gate that starts closed (Flamingo's tanh gating, arXiv 2204.14198).
    """

    def __init__(self, hidden_size: int, vocab_size: int, num_queries: int, num_layers: int, dim: int) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            dim, nhead=max(1, dim // 64), dim_feedforward=4 * dim, dropout=0.0, activation="gelu",
            batch_first=True, norm_first=True,
        )  # fmt: skip
        self.words = nn.Embedding(vocab_size, dim)
        self.query_embed = nn.Parameter(torch.randn(num_queries, dim))
        self.input = nn.Sequential(nn.LayerNorm(hidden_size), nn.Linear(hidden_size, dim))
        self.gate = nn.Parameter(torch.zeros(dim))
        self.encoder = nn.TransformerEncoder(layer, num_layers, enable_nested_tensor=False)
        self.output_norm = nn.RMSNorm(dim, eps=1e-6)

    def forward(self, states: Tensor, token_ids: Tensor, said: Tensor) -> Tensor:
        """Condition `(B, K, P)`; bidirectional over the queries.

        Args:
            states: Of the backbone at the query tokens, `(B, K, H)`.
            token_ids: Of the whole sequence, `(B, L)`.
            said: Bool `(B, L)`, where the instruction stands.
        """
        words = self.words(token_ids)
        words = torch.einsum("blp,bl->bp", words, said.to(words.dtype))
        words = nn.functional.rms_norm(words, words.shape[-1:], eps=1e-8)
        told = words[:, None] + self.query_embed + torch.tanh(self.gate) * self.input(states)
        return self.output_norm(self.encoder(told).float())


class ClipHead(nn.Module):
    """Pooling, projections and temperature of stage 2 (CLIP, arXiv 2103.00020)."""

    def __init__(self, hidden_size: int, text_size: int, dim: int) -> None:
        super().__init__()
        self.image = nn.Linear(hidden_size, dim, bias=False)
        self.text = nn.Linear(text_size, dim, bias=False)
        self.attention = nn.Linear(hidden_size, 1)
        self.log_scale = nn.Parameter(torch.tensor([1 / 0.07]).log())  # one element: DeepSpeed sends no 0-d tensor

    def forward(self, tokens: Tensor, text_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Unit vectors `(B, D)` of images and of texts, and the logit scale, at most 100.

        Args:
            tokens: Aligned visual tokens `(B, N, H)`, pooled by attention.
            text_states: Last text states `(B, H_t)`.
        """
        tokens = nn.functional.rms_norm(tokens, tokens.shape[-1:])
        weights = self.attention(tokens).softmax(dim=1)
        image = nn.functional.normalize(self.image((weights * tokens).sum(1)), dim=-1)
        text = nn.functional.normalize(self.text(text_states), dim=-1)
        return image, text, self.log_scale.exp().clamp(max=100.0)


class OmniMRI(nn.Module):
    """All parts. Only what a stage needs is called; what is called together stands in `objectives` and `engine`."""

    def __init__(self, config: OmniMRIConfig, parts: Iterable[str] | None = None) -> None:
        super().__init__()
        self.config = config
        wanted = tuple(parts) if parts is not None else tuple(_BUILDERS)
        unknown = set(wanted) - set(_BUILDERS)
        if unknown:
            raise ValueError(f"Unknown parts {sorted(unknown)}; known: {', '.join(_BUILDERS)}.")
        for name in _BUILDERS:
            if name in wanted:
                self.add_module(name, _BUILDERS[name](config))
        self._token_cache = TokenCache()

    def parts(self) -> dict[str, nn.Module]:
        return dict(self.named_children())

    def checkpoint_activations(self) -> None:
        """Compute activations again in the backward pass instead of keeping them, layer by layer, in every part."""
        for module in self.modules():
            if hasattr(module, "gradient_checkpointing_enable") and module in self.parts().values():
                module.gradient_checkpointing_enable({"use_reentrant": False})
            elif hasattr(module, "use_checkpoint"):  # MONAI's blocks, and our trunk
                module.use_checkpoint = True

    @property
    def num_visual_tokens(self) -> int:
        z, y, x = self.vision.token_grid(self.config.inputs.volume_shape)
        return z * y * x

    def aligned_tokens(self, volume: Tensor, spacing_mm: Tensor, contrast: Tensor) -> Tensor:
        """Volume `(B, 1, D, H, W)` to backbone-width tokens `(B, N, H)`."""
        return self.align_tokens(self.vision_tokens(volume), spacing_mm, contrast, volume.shape[2:])

    def vision_tokens(self, volume: Tensor) -> Tensor:
        """Tokens `(B, N, V)` of volumes `(B, 1, D, H, W)`; a frozen encoder remembers those it has seen."""
        if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in self.vision.parameters()):
            return self.vision.tokens(volume)
        return self._token_cache.tokens(self.vision, volume)

    def align_tokens(self, tokens: Tensor, spacing_mm: Tensor, contrast: Tensor, shape: Sequence[int]) -> Tensor:
        """Vision tokens `(B, N, V)` of volumes `(D, H, W)` to backbone width; `spacing_mm` is that of the voxels."""
        z, y, x = shape
        extent = [min(size, step) for size, step in zip(shape, self.config.vision.token_stride, strict=True)]
        token_mm = spacing_mm * torch.tensor(extent, device=tokens.device)  # of a single slice one voxel deep
        return self.align(tokens, self.vision.token_grid((z, y, x)), token_mm, contrast)

    def embed(self, token_ids: Tensor, visual: Tensor, places: Tensor) -> Tensor:
        """Embeddings `(B, L, H)` of token ids `(B, L)`, the bool `places` `(B, L)` filled by `visual` `(V, N, H)`.

        The V images stand in the order of their places, row by row.

        Raises:
            ValueError: If the places are not N for each of the V images, whole images in every row.
        """
        counts, (num_images, per_image) = places.sum(1), visual.shape[:2]
        if bool((counts % per_image).any()) or int(counts.sum()) != num_images * per_image:
            raise ValueError(
                f"Expected {per_image} image placeholders for each of {num_images} images, found {counts.tolist()} in "
                "the sequences."
            )
        embeddings = self.backbone.get_input_embeddings()(token_ids)
        return embeddings.masked_scatter(places[..., None], visual.to(embeddings.dtype))

    def conditions(self, hidden: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """What the image decoder is told, `(B, K, P)`, from the backbone's states `(B, L, H)` of a `sequence_batch`."""
        states = hidden[batch["query_places"]].unflatten(0, (len(hidden), -1))
        return self.connector(states, batch["token_ids"], batch["instruction_places"])

    def save(
        self, folder: Path | str, tokenizer: PreTrainedTokenizerBase, *, version: str, run: Mapping[str, Any]
    ) -> None:
        """Write the checkpoint folder, adapters merged. Parts that this object does not hold are not written.

        Args:
            folder: Made if absent; files of the same name are replaced.
            tokenizer: Saved beside the parts, and inside the backbone's folder so that vLLM can serve that alone.
            version: What answers will quote.
            run: Configuration of the run that made it, JSON-able.
        """
        if hasattr(self, "backbone"):
            merge_adapters(self.backbone)
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, part in self.parts().items():
            _save_part(part, folder / name)
        tokenizer.save_pretrained(folder / "tokenizer")
        if hasattr(self, "backbone"):
            tokenizer.save_pretrained(folder / "backbone")
        _write_json(folder / CONTRACT_FILE, Preprocess(self.config.inputs).as_json())
        _write_json(folder / "run.json", dict(run))
        index = {
            "format": FORMAT_VERSION,
            "version": version,
            "parts": sorted(self.parts()),
            "config": self.config.to_dict(),
        }
        _write_json(folder / INDEX_FILE, index)

    @classmethod
    def load(
        cls, folder: Path | str, *, parts: Iterable[str] | None = None, config: OmniMRIConfig | None = None
    ) -> OmniMRI:
        """Read a checkpoint folder.

        Args:
            folder: Written by `save`.
            parts: Parts to build; all that the checkpoint holds by default. One that it lacks is built fresh.
            config: Another configuration: parts whose shapes differ then start afresh, and the log names them.

        Raises:
            ValueError: If the folder is not a checkpoint, was written by a newer format, or holds other tensors.
        """
        folder = Path(folder)
        index = read_index(folder)
        saved = OmniMRIConfig.from_dict(index["config"])
        model = cls(config or saved, parts or index["parts"])
        for name, part in model.parts().items():
            if name in index["parts"]:
                _load_part(part, folder / name, strict=config is None)
            else:
                logger.info("Part %s is not in %s; starting it afresh.", name, folder)
        return model


def read_index(folder: Path | str) -> dict[str, Any]:
    """The index of a checkpoint folder.

    Raises:
        ValueError: If there is none, or its format is newer than this code.
    """
    path = Path(folder) / INDEX_FILE
    if not path.is_file():
        raise ValueError(f"{folder}: expected an OmniMRI checkpoint (a folder with {INDEX_FILE}), found none.")
    index = json.loads(path.read_text())
    if index["format"] > FORMAT_VERSION:
        raise ValueError(f"{folder}: checkpoint format {index['format']} is newer than {FORMAT_VERSION}; upgrade.")
    return index


def pyramid_channels(config: OmniMRIConfig) -> tuple[int, ...]:
    """Channels of the encoder's maps, finest first."""
    return tuple(config.vision.embed_dim * factor for factor in (1, 2, 4, 8, 8))


def _pyramid_depths(config: OmniMRIConfig) -> tuple[int, ...]:
    """Slices in a voxel of each map."""
    return tuple(config.vision.patch_size[0] * factor for factor in (1, 2, 4, 8, 8))


_BUILDERS = {
    "vision": lambda c: VisionEncoder(c.vision),
    "ssl_heads": lambda c: SSLHeads(c.vision.token_dim, c.vision.token_stride, c.embedding_dim),
    "align": lambda c: AlignmentLayer(c.vision.token_dim, c.backbone.hidden_size, len(CONTRASTS)),
    "text_encoder": lambda c: build_text_encoder(c.text_encoder, c.backbone.vocab_size),
    "clip_head": lambda c: ClipHead(c.backbone.hidden_size, c.text_encoder.hidden_size, c.embedding_dim),
    "backbone": lambda c: build_backbone(c.backbone),
    "flow_head": lambda c: FlowHead(c.flow_head, c.vision.token_dim, c.backbone.hidden_size),
    "connector": lambda c: QueryConnector(
        c.backbone.hidden_size, c.backbone.vocab_size, c.connector.num_queries, c.connector.num_layers, c.connector.dim
    ),
    "image_decoder": lambda c: ImageDecoder(c.image_decoder, c.connector.dim, pyramid_channels(c), _pyramid_depths(c)),
}


def _save_part(part: nn.Module, folder: Path) -> None:
    if hasattr(part, "save_pretrained"):
        part.save_pretrained(folder)
        return
    folder.mkdir(parents=True, exist_ok=True)
    config = getattr(part, "config", None)
    _write_json(folder / "config.json", asdict(config) if config is not None else {})
    save_file({k: v.detach().contiguous().cpu() for k, v in part.state_dict().items()}, folder / "model.safetensors")


def _load_part(part: nn.Module, folder: Path, *, strict: bool) -> None:
    if hasattr(part, "save_pretrained"):
        loaded = type(part).from_pretrained(folder, dtype=torch.float32, local_files_only=True,
                                            config=None if strict else part.config,
                                            ignore_mismatched_sizes=not strict)  # fmt: skip
        part.load_state_dict(loaded.state_dict())
        return
    tensors = load_file(folder / "model.safetensors")
    own = part.state_dict()
    changed = [name for name, value in tensors.items() if name in own and own[name].shape != value.shape]
    if changed and not strict:
        logger.warning("%s: %d tensors have another shape and start afresh: %s", folder.name, len(changed), changed[:3])
        tensors = {name: value for name, value in tensors.items() if name not in changed}
    missing, unexpected = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    if strict and (missing or unexpected or changed):
        raise ValueError(
            f"{folder}: expected the tensors of this version's {type(part).__name__}, found "
            f"{len(missing)} missing {missing[:2]}, {len(unexpected)} unknown {unexpected[:2]}, "
            f"{len(changed)} of another shape {changed[:2]}. "
            "Was it written by another version? Train it again, or use that version."
        )
    part.load_state_dict(tensors, strict=strict)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
