"""What a probe says of embeddings whose clusters are known, and of a small checkpoint from end to end."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from omnimri.models.config import tiny
from omnimri.models.omnimri import OmniMRI
from omnimri.models.tokenizer import train_tokenizer
from omnimri.models.vocabulary import DENSE_LABELS
from omnimri.platform.evaluation.places import Places, place_scores
from omnimri.platform.evaluation.probe import (
    PARTS,
    ProbeConfig,
    Volumes,
    flat,
    format_probe,
    log_probe,
    probe,
    retrieval,
    scores,
)
from omnimri.platform.tracking import Tracker
from tests.platform.evaluation_fakes import phantom_row, write_phantoms

CONTRASTS, VENDORS = ("T1w", "T2w", "FLAIR"), ("GE", "Siemens")


def volumes(seed: int, count: int = 60) -> Volumes:
    """Directions by contrast, none by vendor; every third text is missing, images point at their texts."""
    rng = np.random.default_rng(seed)
    contrast, vendor = rng.integers(0, 3, count), rng.integers(0, 2, count)
    encoder = np.eye(8)[contrast] + 0.2 * rng.standard_normal((count, 8)) + 5
    texts = np.eye(count)
    texts[::3] = np.nan
    return Volumes(
        encoder=encoder, aligned=np.zeros((count, 0)), images=np.eye(count), texts=texts,
        labels={
            "contrast": [CONTRASTS[i] for i in contrast], "vendor": [VENDORS[i] for i in vendor],
            "plane": ["axial"] * count, "diagnosis": [None] * count,
        },
        wordings=["" if i % 3 == 0 else f"text {i}" for i in range(count)],
    )  # fmt: skip


def test_a_probe_finds_what_the_embeddings_cluster_by_and_nothing_else() -> None:
    learned, held_out = volumes(0), volumes(1)
    by_contrast = scores(learned, held_out, "encoder", "contrast", ProbeConfig())
    by_vendor = scores(learned, held_out, "encoder", "vendor", ProbeConfig())
    assert by_contrast["knn_kappa"] > 0.95
    assert by_contrast["linear_kappa"] > 0.95
    assert by_contrast["silhouette"] > 0.6
    assert abs(by_vendor["knn_kappa"]) < 0.3
    assert abs(by_vendor["silhouette"]) < 0.1
    assert by_contrast["n"] == 60
    assert "fewer than two" in scores(learned, held_out, "encoder", "plane", ProbeConfig())["reason"]
    assert scores(learned, held_out, "encoder", "diagnosis", ProbeConfig())["n"] == 0


def test_retrieval_counts_equal_texts_as_one() -> None:
    found = retrieval(volumes(0))
    assert (found["images"], found["texts"]) == (40, 40)
    assert found["image_to_text_r1"] == found["text_to_image_r1"] == 1.0
    shuffled = volumes(0)
    shuffled.images[:] = np.roll(shuffled.images, 1, axis=0)
    assert retrieval(shuffled)["image_to_text_r1"] < 0.1
    shuffled.wordings[:] = ["the same"] * 60
    shuffled.texts[:] = 1.0
    assert retrieval(shuffled) | {"text_to_image_r5": 1.0} == retrieval(shuffled)
    assert retrieval(shuffled)["texts"] == 1


def volumes_of_places(seed: int, count: int = 24) -> list[Places]:
    """A direction tells of `lesion`, none of `white matter`; haemorrhage is known of no volume."""
    rng = np.random.default_rng(seed)
    lesion, white, bleeding = (DENSE_LABELS.index(name) for name in ("lesion", "white matter", "haemorrhage"))
    found = []
    for number in range(count):
        holds = np.zeros((50, len(DENSE_LABELS)), bool)
        holds[rng.integers(50), lesion] = number % 2
        holds[:, white] = rng.random(50) < 0.3
        holds[:5, bleeding] = True
        tokens = rng.standard_normal((50, 12)).astype(np.float16)
        tokens[:, 3] += 8 * holds[:, lesion]
        found.append(Places(tokens, holds, np.arange(len(DENSE_LABELS)) != bleeding))
    return found


def test_single_tokens_are_scored_by_what_their_own_place_holds() -> None:
    scores = place_scores(volumes_of_places(0), volumes_of_places(1))
    assert scores["lesion"]["auroc"] > 0.99
    assert scores["lesion"]["top_place"] > 0.9
    assert scores["lesion"]["chance"] == pytest.approx(1 / 50)
    assert scores["lesion"]["volumes"] == 12
    assert abs(scores["white matter"]["auroc"] - 0.5) < 0.1
    assert "no place holds it" in scores["haemorrhage"]["reason"]
    assert "no place holds it" in scores["grey matter"]["reason"]


@pytest.mark.slow
def test_the_probe_of_a_checkpoint_writes_its_page(tmp_path: Path, ray_cluster: None) -> None:
    torch.manual_seed(0)
    tokenizer = train_tokenizer(["Old infarct in the left hemisphere."] * 3, tiny().backbone.vocab_size)
    OmniMRI(tiny(), PARTS).save(tmp_path / "model", tokenizer, version="untrained-0", run={})
    OmniMRI(tiny(), ("vision",)).save(tmp_path / "first", tokenizer, version="untrained-1", run={})
    rows = [phantom_row(i, split=("train", "test")[i // 4 % 2], patient=i // 2, kspace=False) for i in range(14)]
    rows[4] |= {"label_map": None, "label_names": None}  # nobody has drawn in one of the six that are scored
    shards = write_phantoms(tmp_path / "data", rows)
    out = tmp_path / "out"
    result = probe(tmp_path / "model", shards, out, ProbeConfig(num_workers=1, perplexity=3))
    assert result == json.loads((out / "probe.json").read_text())
    assert result["volumes"] == {"train": 8, "test": 6}
    assert set(result["spaces"]) == {"encoder", "aligned"}
    assert result["spaces"]["encoder"]["vendor"]["classes"] == 2
    places = result["places"]["cerebrospinal fluid"]
    assert places["volumes"] == 5
    assert places["auroc"] > 0.8, "even tokens of an untrained encoder tell the middle of a phantom from air"
    assert result["retrieval"]["images"] == 6
    assert "fewer than two" in result["spaces"]["encoder"]["plane"]["reason"]
    assert np.load(out / "embeddings.npz")["encoder"].shape == (6, tiny().vision.token_dim)
    page = (out / "index.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert "Research use only" in page
    assert "| encoder | vendor | 2 | 6 |" in format_probe(result)
    with Tracker.start(f"sqlite:///{tmp_path}/mlflow.db", "probe", params=ProbeConfig()) as tracker:
        log_probe(tracker, result, out)
    assert tracker.run.data.metrics == pytest.approx(dict(flat(result)))

    first = probe(tmp_path / "first", shards, tmp_path / "early", ProbeConfig(num_workers=1, perplexity=3))
    assert set(first["spaces"]) == {"encoder"}
    assert "stage 2" in first["retrieval"]["reason"]
    with pytest.raises(ValueError, match="no row is of split 'val'"):
        probe(tmp_path / "first", shards, tmp_path / "none", ProbeConfig(split="val"))
