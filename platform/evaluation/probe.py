"""What the embeddings of a checkpoint hold: clusters by contrast, plane, diagnosis and vendor, and retrieval of texts.

Two embeddings of every volume: `encoder`, the mean of the vision encoder's tokens, and `aligned`, the unit vector of
the image-text contrast of stage 2. The contrast that the header states is kept from both, so that what they know of it
comes from the image. Classifiers learn on the training patients and are scored on the held-out ones. What single tokens
know of their place is told by `places`.
"""

# N volumes, D embedding width

from __future__ import annotations

import base64
import io
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure
from sklearn.linear_model import LogisticRegression
from sklearn.manifold import TSNE
from sklearn.metrics import accuracy_score, cohen_kappa_score, silhouette_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from omnimri.models.omnimri import read_index
from omnimri.models.preprocess import VolumeInput
from omnimri.models.vocabulary import CONTRASTS, RESEARCH_NOTICE
from omnimri.platform.cluster import quiet_ray_data
from omnimri.platform.data.schema import FACTS
from omnimri.platform.data.shards import RowRef, Shards, load_row, row_to_scan
from omnimri.platform.data.views import contrast_index, description_text
from omnimri.platform.evaluation.places import Places, format_places, place_scores, places_of
from omnimri.platform.tracking import Tracker

LABELS = ("contrast", "plane", "diagnosis", "vendor")
PARTS = ("vision", "align", "text_encoder", "clip_head")
TEMPLATE = "probe.html.j2"
_COLUMNS = ("image", "affine", "classes", "description", "report", "label_map", "label_names", *FACTS)


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """Settings of `probe`."""

    split: str = "test"
    """Split that is scored; classifiers learn on `train`."""
    max_volumes: int | None = None
    """Of each split at most."""
    places_per_volume: int = 512
    """Visual tokens of a labelled volume that are read by themselves, at most."""
    neighbours: int = 5
    perplexity: float = 10.0
    """Of t-SNE; about how many neighbours a point attends to."""
    num_workers: int = 2
    """Processes that hold a model each."""
    seed: int = 0


@dataclass(frozen=True)
class Volumes:
    """Embeddings and labels of volumes."""

    encoder: np.ndarray
    """`(N, D)`."""
    aligned: np.ndarray
    """`(N, D')`, unit length; D' is 0 where the checkpoint has not seen stage 2."""
    images: np.ndarray
    texts: np.ndarray
    """`(N, D')` each: volumes as stage 2 sees them, with the header's contrast, and their texts; NaN without one."""
    labels: dict[str, list[str | None]]
    wordings: list[str]
    places: list[Places] = field(default_factory=list)


def probe(model_dir: Path, shards: Shards, out: Path, config: ProbeConfig, *, command: str = "") -> dict[str, Any]:
    """Embed, score, and write `probe.json`, `index.html` and `embeddings.npz` to `out`.

    Returns:
        The content of `probe.json`: `spaces` -> space -> label -> figure; `places` -> label -> figure; `retrieval`;
        and where it comes from.

    Raises:
        ValueError: If `model_dir` is no checkpoint, or the training or the scored split holds no volume.
    """
    index = read_index(model_dir)
    splits = [_refs(shards, split, config) for split in ("train", config.split)]
    learned, held_out = _embed(model_dir, splits, config)
    spaces = {
        space: {label: scores(learned, held_out, space, label, config) for label in LABELS}
        for space in ("encoder", "aligned")
        if getattr(held_out, space).shape[1]
    }
    result = {
        "model_version": index["version"], "data_digest": shards.digest, "split": config.split,
        "volumes": {"train": len(learned.wordings), config.split: len(held_out.wordings)},
        "spaces": spaces, "places": place_scores(learned.places, held_out.places),
        "retrieval": retrieval(held_out), "simulated": any(ref.simulated for ref in shards.rows),
        "config": asdict(config), "command": command, "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "notice": RESEARCH_NOTICE,
    }  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    (out / "probe.json").write_text(json.dumps(result, indent=2, allow_nan=False) + "\n")
    np.savez_compressed(out / "embeddings.npz", encoder=held_out.encoder, aligned=held_out.aligned)
    _write_page(result, {space: picture(held_out, space, config) for space in spaces}, out / "index.html")
    return result


def _refs(shards: Shards, split: str, config: ProbeConfig) -> list[RowRef]:
    """Volumes of a split in the order of their rows."""
    refs = sorted(shards.select(split=split).rows, key=lambda ref: ref.row_id)[: config.max_volumes]
    if not refs:
        known = ", ".join(sorted({ref.split for ref in shards.rows}))
        raise ValueError(f"probe: no row is of split {split!r}; known: {known}. Choose another --split.")
    return refs


def _embed(model_dir: Path, splits: Sequence[Sequence[RowRef]], config: ProbeConfig) -> list[Volumes]:
    """The volumes of each split, through workers that each hold the model; they start once for all."""
    refs = [ref for split in splits for ref in split]
    with quiet_ray_data():
        items = ray.data.from_items([{"index": i} for i in range(len(refs))], override_num_blocks=len(refs))
        results = items.map_batches(
            _Embedder, batch_size=1, num_cpus=1,
            fn_constructor_kwargs={"model_dir": model_dir, "refs": refs, "config": config},
            compute=ray.data.ActorPoolStrategy(size=min(config.num_workers, len(refs))),
        )  # fmt: skip
        rows = iter(sorted(results.iter_rows(), key=lambda row: row["index"]))
    return [_volumes(list(islice(rows, len(split)))) for split in splits]


def _volumes(rows: Sequence[Mapping[str, Any]]) -> Volumes:
    stacked = {name: np.stack([row[name] for row in rows]) for name in ("encoder", "aligned", "images", "texts")}
    labels = {name: [row[name] or None for row in rows] for name in LABELS}
    places = [Places(**{part.name: row[part.name] for part in fields(Places)}) for row in rows]
    return Volumes(**stacked, labels=labels, wordings=[row["wording"] for row in rows], places=places)


class _Embedder:
    """Holds the parts of stages 1 and 2."""

    def __init__(self, model_dir: Path, refs: Sequence[RowRef], config: ProbeConfig) -> None:
        from omnimri.models.engine import sequence_builder
        from omnimri.models.omnimri import OmniMRI
        from omnimri.models.preprocess import read_preprocess
        from omnimri.models.tokenizer import load_tokenizer

        torch.set_num_threads(1)
        held = [part for part in PARTS if part in read_index(model_dir)["parts"]]
        self._model = OmniMRI.load(model_dir, parts=held).eval()
        self._is_aligned = len(held) == len(PARTS)
        self._preprocess = read_preprocess(model_dir)
        self._builder = sequence_builder(self._model.config, load_tokenizer(model_dir / "tokenizer"))
        self._refs = refs
        self._config = config

    def __call__(self, batch: Mapping[str, np.ndarray]) -> dict[str, list[Any]]:
        index = int(batch["index"][0])
        row = load_row(self._refs[index], _COLUMNS)
        wording = description_text(row["description"]) or row["report"] or ""
        with torch.inference_mode():
            view = self._preprocess.volume(row_to_scan(row))
            tokens = self._model.vision_tokens(view.volume[None])
            vectors = {k: [value.float().numpy()] for k, value in self._vectors(row, wording, view, tokens).items()}
            places = places_of(
                row, tokens[0], self._model.config.vision.token_stride, self._preprocess,
                self._config.places_per_volume, self._config.seed + index,
            )  # fmt: skip
        labels = {name: [row[name] or ""] for name in ("contrast", "plane", "vendor")}
        labels["diagnosis"] = [(row["classes"] or [""])[0]]
        read = {part.name: [getattr(places, part.name)] for part in fields(places)}
        return {"index": [index], "wording": [wording], **labels, **vectors, **read}

    def _vectors(
        self, row: Mapping[str, Any], wording: str, view: VolumeInput, tokens: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        volume, spacing = view.volume[None], view.spacing_mm[None]
        if not self._is_aligned:
            return {"encoder": tokens[0].mean(0), **dict.fromkeys(("aligned", "images", "texts"), torch.zeros(0))}
        state = self._text_state(wording)
        unknown, stated = (
            self._model.clip_head(
                self._model.align_tokens(tokens, spacing, torch.tensor([contrast]), volume.shape[2:]), state
            )
            for contrast in (len(CONTRASTS), contrast_index(row["contrast"]))
        )
        text = stated[1][0] if wording else torch.full_like(stated[1][0], torch.nan)
        return {"encoder": tokens[0].mean(0), "aligned": unknown[0][0], "images": stated[0][0], "texts": text}

    def _text_state(self, wording: str) -> torch.Tensor:
        ids = torch.from_numpy(self._builder.plain(wording).token_ids)[None]
        return self._model.text_encoder(ids).last_hidden_state[:, -1]


def scores(learned: Volumes, held_out: Volumes, space: str, label: str, config: ProbeConfig) -> dict[str, Any]:
    """How far a label can be read from an embedding.

    Returns:
        `knn_accuracy`, `knn_kappa`, `linear_accuracy`, `linear_kappa` on the held-out volumes (Cohen's kappa is 0 for
        guessing by frequency, whatever the number of classes, so labels can be compared), `silhouette` of the held-out
        volumes by cosine distance, `majority` (accuracy of the commonest class), `classes` and `n`; or `reason`.
    """
    (x, y), (x_new, y_new) = (_labelled(volumes, space, label) for volumes in (learned, held_out))
    if len(set(y)) < 2 or len(set(y_new)) < 2:
        return {"reason": f"not computed: {label} has fewer than two values", "n": len(y_new)}
    x, x_new = _centred(x, x), _centred(x_new, x)
    neighbours = KNeighborsClassifier(min(config.neighbours, len(x)), metric="cosine").fit(x, y).predict(x_new)
    linear = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=2000)).fit(x, y).predict(x_new)
    counts = Counter(y_new)
    return {
        "knn_accuracy": float(accuracy_score(y_new, neighbours)),
        "knn_kappa": float(cohen_kappa_score(y_new, neighbours)),
        "linear_accuracy": float(accuracy_score(y_new, linear)),
        "linear_kappa": float(cohen_kappa_score(y_new, linear)),
        "silhouette": float(silhouette_score(x_new, y_new, metric="cosine")) if len(counts) < len(y_new) else None,
        "majority": max(counts.values()) / len(y_new), "classes": len(counts), "n": len(y_new),
    }  # fmt: skip


def _labelled(volumes: Volumes, space: str, label: str) -> tuple[np.ndarray, np.ndarray]:
    known = [i for i, value in enumerate(volumes.labels[label]) if value]
    return getattr(volumes, space)[known], np.array([volumes.labels[label][i] for i in known])


def _centred(x: np.ndarray, of: np.ndarray) -> np.ndarray:
    """Without what all volumes share, which would make every cosine nearly one."""
    return x - of.mean(axis=0)


def retrieval(volumes: Volumes) -> dict[str, Any]:
    """Recall at 1 and 5 of the right text for an image and of a right image for a text; equal texts count as one."""
    if not volumes.texts.shape[1]:
        return {"reason": "not computed: the checkpoint has not seen stage 2"}
    known = [i for i, wording in enumerate(volumes.wordings) if wording]
    wordings = [volumes.wordings[i] for i in known]
    first = [wordings.index(wording) for wording in wordings]  # of each group of equal texts
    texts = sorted(set(first))
    similarity = volumes.images[known] @ volumes.texts[known].T
    is_right = np.array(first)[:, None] == np.array(texts)[None]  # (images, texts)
    similarity = similarity[:, texts]
    recalls = {
        f"{name}_r{k}": float(np.mean(np.take_along_axis(right, np.argsort(-alike, axis=1)[:, :k], axis=1).any(1)))
        for name, alike, right in (
            ("image_to_text", similarity, is_right),
            ("text_to_image", similarity.T, is_right.T),
        )
        for k in (1, 5)
    }
    chance = {"chance_image_to_text_r1": 1 / len(texts), "chance_image_to_text_r5": min(1.0, 5 / len(texts))}
    return recalls | chance | {"images": len(known), "texts": len(texts)}


def picture(volumes: Volumes, space: str, config: ProbeConfig) -> Figure:
    """t-SNE of the held-out volumes, once for each label in its colours."""
    points = getattr(volumes, space)
    perplexity = min(config.perplexity, max(1.0, (len(points) - 1) / 3))
    where = TSNE(perplexity=perplexity, metric="cosine", init="random", random_state=config.seed).fit_transform(
        _centred(points, points)
    )
    figure = Figure(figsize=(12, 3.4), layout="constrained")
    for axes, label in zip(figure.subplots(1, len(LABELS)), LABELS, strict=True):
        values = [value or "unknown" for value in volumes.labels[label]]
        for number, value in enumerate(sorted(set(values))):
            of_value = [i for i, found in enumerate(values) if found == value]
            axes.scatter(*where[of_value].T, s=18, color=f"C{number}", label=value)
        axes.set(title=label, xticks=[], yticks=[])
        axes.legend(fontsize=7, framealpha=0.6)
    return figure


def _write_page(result: Mapping[str, Any], figures: Mapping[str, Figure], path: Path) -> None:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    pictures = {space: _data_uri(figure) for space, figure in figures.items()}
    path.write_text(environment.get_template(TEMPLATE).render(result=result, pictures=pictures), encoding="utf-8")


def _data_uri(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def flat(result: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """`space/label/figure` and its value, for a tracking run."""
    for space, labels in result["spaces"].items():
        for label, figures in labels.items():
            yield from ((f"{space}/{label}/{k}", v) for k, v in figures.items() if isinstance(v, float))
    for label, figures in result["places"].items():
        yield from ((f"places/{label}/{k}", v) for k, v in figures.items() if isinstance(v, float))
    yield from ((f"retrieval/{k}", v) for k, v in result["retrieval"].items() if isinstance(v, float))


def log_probe(tracker: Tracker, result: Mapping[str, Any], out: Path) -> None:
    """Record the figures, the page and the JSON with a tracking run."""
    tracker.log_metrics(dict(flat(result)))
    tracker.set_tags({"model_version": result["model_version"], "data_digest": result["data_digest"]})
    for name in ("index.html", "probe.json"):
        tracker.log_artifact(out / name)


def format_probe(result: Mapping[str, Any]) -> str:
    """The figures as a Markdown table."""
    lines = [
        "| space | label | classes | n | kNN kappa | linear kappa | kNN accuracy | majority | silhouette |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for space, labels in result["spaces"].items():
        for label, row in labels.items():
            cells = [row.get(name) for name in ("knn_kappa", "linear_kappa", "knn_accuracy", "majority", "silhouette")]
            numbers = " | ".join("-" if cell is None else f"{cell:.2f}" for cell in cells)
            lines.append(f"| {space} | {label} | {row.get('classes', '-')} | {row['n']} | {numbers} |")
    found = result["retrieval"]
    figures = [
        f"{name} {value:.2f}" if isinstance(value, float) else f"{name} {value}" for name, value in found.items()
    ]
    return "\n".join([*lines, "", format_places(result["places"]), "", f"retrieval: {', '.join(figures)}"])
