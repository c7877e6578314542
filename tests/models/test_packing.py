"""Sequences of several images, and several sequences in a row: each is computed as if it stood alone."""

from typing import Any

import numpy as np
import pytest
import torch

from omnimri.models import special_tokens as special
from omnimri.models.collate import collate, sequence_batch
from omnimri.models.config import preset
from omnimri.models.engine import sequence_builder
from omnimri.models.objectives import build_objective
from omnimri.models.omnimri import OmniMRI
from omnimri.models.packing import join, pack
from omnimri.models.prompts import IGNORED, SequenceBuilder, TokenSequence, tagged
from omnimri.models.tokenizer import train_tokenizer

PACK_LENGTH = 160
TEXTS = ("Normal brain.", "Old infarct in the left lobe.", "A plaque.", "Haemorrhage. " * 4, "Mass.", "Nothing new.")


@pytest.fixture(scope="module")
def model() -> OmniMRI:
    torch.manual_seed(0)
    return OmniMRI(preset("tiny"))


@pytest.fixture(scope="module")
def builder(model: OmniMRI) -> SequenceBuilder:
    return sequence_builder(model.config, train_tokenizer(list(TEXTS) * 3, 400))


def images(count: int, seed: int, shape: tuple[int, int, int] = (24, 56, 48)) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        "volume": rng.normal(size=(count, 1, *shape)).astype(np.float32),
        "spacing_mm": np.tile(np.array([6, 4, 4], np.float32), (count, 1)),
        "contrast": rng.integers(0, 4, count),
    }


def pairs() -> list[dict[str, Any]]:
    return [
        {name: value[0] for name, value in images(1, i).items()}
        | {"text": text, "image_first": i % 2 == 0, "text_group": i}
        for i, text in enumerate(TEXTS)
    ]


def interleaved() -> list[dict[str, Any]]:
    return [
        images(count, i) | {"texts": list(TEXTS[:count]), "image_first": i % 2 == 0, "text_group": i}
        for i, count in enumerate((2, 3, 2, 2))
    ]


def questions() -> list[dict[str, Any]]:
    return [
        images(count, i)
        | {
            "instruction": "Provide your diagnosis.",
            "facts": [{"plane": "axial"}] * count,
            "task": "diagnose",
            "answer": TEXTS[i],
        }
        for i, count in enumerate((1, 2, 1))
    ]


def packed_order(samples: list[dict[str, Any]], builder: SequenceBuilder, length: int) -> list[list[int]]:
    """Rows by what `collate` gives each sample alone."""
    return pack([int(collate([s], builder)["lengths"]) for s in samples], length)


def room_for_two(samples: list[dict[str, Any]], builder: SequenceBuilder) -> int:
    """A length that two or three of the samples fill, with tokens left over."""
    return 5 * max(int(collate([s], builder)["lengths"]) for s in samples) // 2


def states(model: OmniMRI, batch: dict[str, torch.Tensor], visual: torch.Tensor) -> torch.Tensor:
    """What the backbone makes of a batch, `(B, L, H)`, as the objectives ask it."""
    positions = batch.get("position_ids")
    output = model.backbone.model(
        inputs_embeds=model.embed(batch["token_ids"], visual, batch["visual_places"]),
        position_ids=positions,
        use_cache=False,
    )
    return output.last_hidden_state


def test_every_sequence_gets_a_place_and_no_row_overflows() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(10, 100, 200).tolist()
    rows = pack(lengths, 128)
    assert sorted(i for row in rows for i in row) == list(range(200))
    assert max(sum(lengths[i] for i in row) for row in rows) <= 128
    assert len(rows) <= 1.25 * np.ceil(sum(lengths) / 128)
    assert rows == pack(lengths, 128)


def test_rows_are_filled_evenly() -> None:
    """All rows are padded to the longest: a full row beside a nearly empty one would waste what packing saves."""
    rng = np.random.default_rng(1)
    lengths = rng.integers(40, 60, 32).tolist()
    filled = [sum(lengths[i] for i in row) for row in pack(lengths, 1024)]
    assert len(filled) == 2
    assert max(filled) - min(filled) < 60


def test_a_sequence_that_is_too_long_stands_alone() -> None:
    assert pack([5, 300, 6], 128) == [[1], [2, 0]]


def test_a_single_sequence_is_left_as_it_is() -> None:
    alone = TokenSequence(np.arange(4), np.arange(4))
    assert join([alone]) is alone


def test_a_text_that_comes_first_is_not_predicted_from_its_neighbour(builder: SequenceBuilder) -> None:
    sequences = [builder.paired(text, image_first=False) for text in TEXTS[:3]]
    row = join(sequences)
    starts = np.flatnonzero(row.positions == 0)
    assert starts.tolist() == np.cumsum([0, *(len(s.token_ids) for s in sequences[:-1])]).tolist()
    assert (row.labels[starts] == IGNORED).all()
    assert (row.labels != IGNORED).sum() == sum((s.labels != IGNORED).sum() - 1 for s in sequences)


@pytest.mark.parametrize("samples", [pairs(), interleaved(), questions()], ids=["pairs", "interleaved", "questions"])
def test_packed_sequences_have_the_states_that_they_have_alone(
    model: OmniMRI, builder: SequenceBuilder, samples: list[dict[str, Any]]
) -> None:
    length = room_for_two(samples, builder)
    rows = packed_order(samples, builder, length)
    batch = collate(samples, builder, pack_length=length)
    assert len(batch["token_ids"]) == len(rows) < len(samples)
    assert int(batch["lengths"].max()) <= length
    with torch.no_grad():
        visual = model.aligned_tokens(batch["volume"], batch["spacing_mm"], batch["contrast"])
        together = states(model, batch, visual)
        for hidden, row in zip(together, rows, strict=True):
            start = 0
            for index in row:
                single = collate([samples[index]], builder)
                own = model.aligned_tokens(single["volume"], single["spacing_mm"], single["contrast"])
                alone = states(model, single, own)[0]
                torch.testing.assert_close(hidden[start : start + len(alone)], alone, rtol=1e-4, atol=1e-5)
                start += len(alone)


@pytest.mark.parametrize("stage", ["multimodal", "instruct"])
@pytest.mark.parametrize("samples", [pairs(), interleaved(), questions()], ids=["pairs", "interleaved", "questions"])
def test_packing_changes_neither_loss_nor_gradient(
    model: OmniMRI, builder: SequenceBuilder, samples: list[dict[str, Any]], stage: str
) -> None:
    """Beside the same samples in the same order, each in a row of its own, with the same noise for the flow head."""
    length = room_for_two(samples, builder)
    ordered = [samples[i] for row in packed_order(samples, builder, length) for i in row]
    objective, results = build_objective(stage, model), []
    for batch in (collate(ordered, builder), collate(samples, builder, pack_length=length)):
        torch.manual_seed(1)
        losses = objective(batch)
        losses["loss"].backward()
        results.append((losses, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
        model.zero_grad(set_to_none=True)
    (alone, alone_grads), (packed, packed_grads) = results
    torch.testing.assert_close(dict(packed), dict(alone), rtol=1e-5, atol=1e-5)
    assert packed_grads.keys() == alone_grads.keys()
    for name, grad in packed_grads.items():
        assert (grad - alone_grads[name]).norm() <= 1e-4 * alone_grads[name].norm() + 1e-6, name


def test_the_text_loss_of_a_row_is_the_mean_over_the_tokens_of_its_sequences(
    model: OmniMRI, builder: SequenceBuilder
) -> None:
    objective, samples = build_objective("multimodal", model), interleaved()
    with torch.no_grad():
        packed = objective(collate(samples, builder, pack_length=10_000))["loss_text"]
        batches = [collate([s], builder) for s in samples]
        losses = torch.stack([objective(batch)["loss_text"] for batch in batches])
    counts = torch.stack([(batch["labels"][:, 1:] != IGNORED).sum() for batch in batches])
    torch.testing.assert_close(packed, (losses * counts).sum() / counts.sum(), rtol=1e-5, atol=1e-5)


def test_plain_causal_attention_would_not_pass(model: OmniMRI, builder: SequenceBuilder) -> None:
    """What the tests above rule out: without positions the second sequence of a row sees the first."""
    batch = collate(pairs(), builder, pack_length=PACK_LENGTH)
    with torch.no_grad():
        visual = model.aligned_tokens(batch["volume"], batch["spacing_mm"], batch["contrast"])
        apart = states(model, batch, visual)
        mixed = states(model, {k: v for k, v in batch.items() if k != "position_ids"}, visual)
    first = int((batch["position_ids"][0] == 0).nonzero()[1])
    torch.testing.assert_close(apart[0, :first], mixed[0, :first])
    assert (apart[0, first:] - mixed[0, first:]).norm() > 0.05 * apart[0, first:].norm()


def test_image_answers_are_never_packed(builder: SequenceBuilder) -> None:
    sample = {name: value[0] for name, value in images(1, 0).items()} | {
        "instruction": ["Segment the grey matter.", "Outline the lesion."], "facts": {}, "task": "segment",
    }  # fmt: skip
    batch, packed = collate([sample] * 2, builder), collate([sample] * 2, builder, pack_length=10_000)
    assert batch.keys() == packed.keys()
    assert all(torch.equal(batch[name], packed[name]) for name in batch)


@pytest.mark.parametrize("image_first", [True, False])
def test_images_and_texts_come_by_turns(builder: SequenceBuilder, image_first: bool) -> None:
    sequence = builder.interleaved(TEXTS[:3], image_first=image_first)
    starts = np.flatnonzero(sequence.token_ids == builder.tokenizer.convert_tokens_to_ids(special.VOLUME))
    ends = np.flatnonzero(sequence.token_ids == builder.tokenizer.convert_tokens_to_ids(special.TURN_END))
    turns = np.argsort(np.concatenate([starts, ends])) < 3
    assert turns.tolist() == [image_first, not image_first] * 3
    spoken = builder.tokenizer.decode(sequence.labels[sequence.labels != IGNORED])
    assert spoken == "".join(text + special.TURN_END for text in TEXTS[:3])
    np.testing.assert_array_equal(
        builder.interleaved(TEXTS[:1], image_first=image_first).token_ids,
        builder.paired(TEXTS[0], image_first=image_first).token_ids,
    )


def test_every_image_stands_at_its_own_places(model: OmniMRI, builder: SequenceBuilder) -> None:
    """Packing reorders sequences; the images go with them."""
    samples = interleaved()
    batch = collate(samples, builder, pack_length=300)
    order = [i for row in packed_order(samples, builder, 300) for i in row]
    assert order != sorted(order)
    expected = np.concatenate([samples[i]["volume"] for i in order])
    np.testing.assert_array_equal(batch["volume"].numpy(), expected)
    marked = torch.arange(len(expected), dtype=torch.float32)[:, None, None].expand(-1, builder.num_visual, 256)
    embeds = model.embed(batch["token_ids"], marked, batch["visual_places"])
    texts = [builder.tokenizer.decode(ids) for ids in batch["token_ids"]]
    assert [text.count(special.VOLUME) for text in texts] == (batch["visual_places"].sum(1) // 36).tolist()
    seen = embeds[batch["visual_places"]][:, 0].unflatten(0, (-1, builder.num_visual))
    assert torch.equal(seen, torch.arange(len(expected)).float()[:, None].expand_as(seen))


def test_alignment_pairs_every_image_with_its_own_text(model: OmniMRI, builder: SequenceBuilder) -> None:
    samples = interleaved()
    batch = collate(samples, builder)
    assert len(batch["text_ids"]) == len(batch["volume"]) == 9
    texts = [builder.tokenizer.decode(ids[:n]) for ids, n in zip(batch["text_ids"], batch["text_lengths"], strict=True)]
    assert texts == [text + special.TURN_END for s in samples for text in s["texts"]]
    assert batch["text_group"].tolist() == [0, 0, 1, 1, 1, 2, 2, 3, 3]
    assert torch.isfinite(build_objective("align", model)(batch)["loss"])


def test_slices_take_fewer_places_than_a_volume(model: OmniMRI, builder: SequenceBuilder) -> None:
    height, width = model.config.inputs.slice_shape
    sample = images(3, 0, (1, height, width)) | {
        "texts": [TEXTS[1]], "image_kind": special.SLICE, "image_first": True, "text_group": 0,
    }  # fmt: skip
    batch = collate([sample, sample], builder, pack_length=1000)
    grid = model.vision.token_grid((1, height, width))
    assert int(batch["visual_places"].sum()) == 6 * builder.num_slice_visual == 6 * int(np.prod(grid))
    losses = build_objective("multimodal", model)(batch)
    losses["loss"].backward()
    assert torch.isfinite(losses["loss_visual"])
    model.zero_grad(set_to_none=True)


def test_a_request_about_one_volume_is_what_it_was(builder: SequenceBuilder) -> None:
    facts = {"plane": "axial", "contrast": "T2w"}
    one, listed = (builder.request("Report this MRI.", f, "report") for f in (facts, [facts]))
    np.testing.assert_array_equal(one.token_ids, listed.token_ids)
    assert builder.tokenizer.decode(one.token_ids) == (
        f"<|im_start|>user\n<vol><|vision_start|>{'<|image_pad|>' * 36}<|vision_end|>This is an axial T2w MRI. "
        "Report this MRI.<|im_end|>\n<|im_start|>assistant\n<response>"
    )


def test_a_request_shows_several_contrasts_in_order(builder: SequenceBuilder) -> None:
    facts = [{"contrast": "T2w"}, {}, {"contrast": "FLAIR"}]
    request = builder.request("Report this MRI.", facts, "report")
    shown = builder.tokenizer.decode(request.token_ids).split(special.VOLUME)[1:]
    assert ["T2w" in s for s in shown] == [True, False, False]
    assert ["FLAIR" in s for s in shown] == [False, False, True]
    places = sequence_batch([request], builder)["instruction_places"][0]
    assert builder.tokenizer.decode(request.token_ids[places]) == " Report this MRI."
    example = builder.example("Report this MRI.", facts, "report", tagged("Normal."))
    np.testing.assert_array_equal(example.token_ids[: len(request.token_ids)], request.token_ids)


def test_an_image_too_few_is_refused(model: OmniMRI, builder: SequenceBuilder) -> None:
    batch = collate(interleaved()[:1], builder)
    with pytest.raises(ValueError, match=r"36 image placeholders for each of 1 images, found \[72\]"):
        model.embed(batch["token_ids"], torch.zeros(1, 36, 256), batch["visual_places"])
