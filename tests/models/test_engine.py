"""A checkpoint folder, loaded back, answers every task; and what crosses between replicas is enough."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import torch
from llguidance import LLMatcher

from omnimri.models.collate import sequence_batch
from omnimri.models.config import PRESETS, OmniMRIConfig, preset
from omnimri.models.decoding import stop_tokens
from omnimri.models.detection import Detection, PlattMap
from omnimri.models.engine import Engine
from omnimri.models.grammars import MAX_BOXES, detection_grammar, json_grammar
from omnimri.models.metrics import box_iou
from omnimri.models.omnimri import INDEX_FILE, OmniMRI
from omnimri.models.physics import SenseOperator, estimate_sens_maps, fft2c, relative_residual, undersampling_mask
from omnimri.models.preprocess import CONTRACT_FILE, CONTRACT_VERSION, Preprocess
from omnimri.models.prompts import diagnosis_choices
from omnimri.models.scan import Scan
from omnimri.models.tokenizer import train_tokenizer
from omnimri.models.vocabulary import SIDES


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("checkpoint")
    config = preset("tiny")
    tokenizer = train_tokenizer(
        ["Most likely diagnosis: old infarct. Report this MRI."] * 3, config.backbone.vocab_size
    )
    OmniMRI(config).save(folder, tokenizer, version="test-1", run={"seed": 0})
    return folder


@pytest.fixture(scope="module")
def engine(checkpoint: Path) -> Engine:
    return Engine.load(checkpoint)


@pytest.fixture
def scan(rng: torch.Generator) -> Scan:
    noise = torch.randn(6, 4, 48, 40, dtype=torch.complex64, generator=rng).numpy()
    mask = np.arange(40) % 3 == 0
    mask[17:23] = True
    return Scan(
        image=torch.rand(6, 48, 40, generator=rng).numpy(), affine=np.diag([-2.0, -2.0, 6.0, 1.0]),
        kspace=noise * mask, mask=mask, facts={"contrast": "T2w", "plane": "axial"},
    )  # fmt: skip


def test_checkpoint_round_trip_is_bit_identical(checkpoint: Path) -> None:
    torch.manual_seed(0)
    first, second = OmniMRI(preset("tiny")).state_dict(), OmniMRI.load(checkpoint).state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_checkpoint_holds_no_pickle(checkpoint: Path) -> None:
    kinds = {path.suffix for path in checkpoint.rglob("*") if path.is_file()}
    assert kinds <= {".json", ".safetensors", ".txt", ".jinja"}


def test_backbone_folder_is_a_plain_transformers_model(checkpoint: Path) -> None:
    """Per-expert names, as vLLM reads them, and a tokenizer beside them."""
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(checkpoint / "backbone")
    assert type(model).__name__ == "Qwen2MoeForCausalLM"
    assert len(AutoTokenizer.from_pretrained(checkpoint / "backbone")) > 256
    with safe_open(checkpoint / "backbone" / "model.safetensors", "pt") as tensors:
        assert "model.layers.0.mlp.experts.0.gate_proj.weight" in tensors.keys()  # noqa: SIM118


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=INDEX_FILE):
        OmniMRI.load(tmp_path)


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / INDEX_FILE).write_text(json.dumps({"format": 99}))
    with pytest.raises(ValueError, match="newer"):
        OmniMRI.load(tmp_path)


def test_tensors_of_another_version_are_refused_in_one_sentence(checkpoint: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    copy = Path(shutil.copytree(checkpoint, tmp_path / "model"))
    path = copy / "image_decoder" / "model.safetensors"
    tensors = load_file(path)
    name = sorted(tensors)[0]
    save_file({f"old.{key}" if key == name else key: value for key, value in tensors.items()}, path)
    with pytest.raises(ValueError, match=rf"image_decoder: .*1 missing \['{name}'\], 1 unknown \['old.{name}'\]"):
        OmniMRI.load(copy)


@pytest.mark.parametrize(
    ("name", "least", "most"), [("small", 1.0e9, 1.2e9), ("base", 3.5e9, 4.2e9), ("7b", 12.5e9, 14e9)]
)
def test_presets_instantiate_without_memory(name: str, least: float, most: float) -> None:
    with torch.device("meta"):
        model = OmniMRI(preset(name))
    assert least < sum(p.numel() for p in model.backbone.parameters()) < most


@pytest.mark.parametrize("name", PRESETS)
def test_config_survives_json(name: str) -> None:
    config = preset(name)
    assert OmniMRIConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_another_number_of_experts_starts_only_those_afresh(checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = preset("tiny")
    wider = replace(config, backbone=replace(config.backbone, num_experts=6))
    model = OmniMRI.load(checkpoint, config=wider)
    assert model.backbone.model.layers[0].mlp.experts.gate_up_proj.shape[0] == 6
    kept = OmniMRI.load(checkpoint)
    assert torch.equal(
        model.backbone.model.layers[0].self_attn.q_proj.weight, kept.backbone.model.layers[0].self_attn.q_proj.weight
    )


def test_reconstruction_explains_the_measurement(engine: Engine, scan: Scan) -> None:
    prompt = engine.encode(scan, "Reconstruct the image.", "reconstruct")
    result = engine.reconstruct(scan, prompt, num_steps=2)
    assert result.image.shape == scan.image.shape
    assert result.image.dtype == np.complex64
    assert 0 < result.residual < 1
    assert result.uncertainty is None


def test_reconstruction_uses_the_coil_maps_of_the_contract(checkpoint: Path, scan: Scan) -> None:
    """The distance from the measurement is that under ESPIRiT maps, not under the default ones."""
    engine = Engine.load(checkpoint)
    engine.preprocess = Preprocess(replace(engine.preprocess.inputs, sens_maps="espirit"))
    result = engine.reconstruct(scan, engine.encode(scan, "Reconstruct the image.", "reconstruct"), num_steps=1)
    kspace, mask, image = torch.tensor(scan.kspace), torch.tensor(scan.mask), torch.tensor(result.image)
    weights = kspace.abs().square().sum(dim=(1, 2, 3))

    def residual(method: str) -> float:
        operator = SenseOperator(estimate_sens_maps(kspace, mask, method=method), mask)
        squares = relative_residual(image, kspace, operator).square()
        return float(((squares * weights).sum() / weights.sum()).sqrt())

    assert result.residual == pytest.approx(residual("espirit"), rel=1e-5)
    assert result.residual != pytest.approx(residual("acs"), rel=1e-4)


def test_samples_give_an_uncertainty_map_and_a_seed_repeats_it(engine: Engine, scan: Scan) -> None:
    prompt = engine.encode(scan, "Reconstruct the image.", "reconstruct")
    first, second = (engine.reconstruct(scan, prompt, num_steps=2, num_samples=2, seed=3) for _ in range(2))
    assert first.uncertainty.shape == scan.image.shape
    assert float(first.uncertainty.max()) > 0
    np.testing.assert_array_equal(first.uncertainty, second.uncertainty)
    assert not np.array_equal(
        first.uncertainty, engine.reconstruct(scan, prompt, num_steps=2, num_samples=2, seed=4).uncertainty
    )
    np.testing.assert_array_equal(first.image, engine.reconstruct(scan, prompt, num_steps=2).image)


def test_uncertainty_is_large_where_lines_are_missing_and_small_where_none_are(engine: Engine, scan: Scan) -> None:
    """Fully sampled, the simulated acquisitions differ by noise alone."""
    y, x = np.mgrid[-1:1:48j, -1:1:40j]
    coils = np.stack([np.exp(-((y - cy) ** 2 + (x - cx) ** 2)) for cy, cx in ((-1, -1), (-1, 1), (1, -1), (1, 1))])
    object_ = ((y**2 + x**2 < 0.8) * (1 + (np.abs(x) < 0.3))).astype(np.complex64)
    kspace = fft2c(torch.from_numpy((coils * object_).astype(np.complex64)))[None].numpy()
    spread = {}
    for acceleration in (1, 4):
        mask = undersampling_mask(40, acceleration=acceleration, center_fraction=0.1, seed=1)
        image = np.abs(object_)[None].astype(np.float32)
        one = replace(scan, image=image, kspace=kspace * mask, mask=mask)
        prompt = engine.encode(one, "Reconstruct the image.", "reconstruct")
        spread[acceleration] = engine.reconstruct(one, prompt, num_steps=1, num_samples=3).uncertainty.mean()
    assert spread[1] < 0.2 * spread[4]


@pytest.mark.parametrize("kind", ["equispaced", "random"])
@pytest.mark.parametrize("acceleration", [2, 7, 12])
def test_one_model_answers_any_acceleration_and_pattern_with_its_residual(
    engine: Engine, rng: torch.Generator, acceleration: int, kind: str
) -> None:
    mask = undersampling_mask(100, acceleration=acceleration, center_fraction=0.04, kind=kind, seed=3)
    kspace = torch.randn(2, 4, 48, 100, dtype=torch.complex64, generator=rng).numpy() * mask
    one = Scan(
        image=np.abs(kspace[:, 0]), affine=np.diag([-2.0, -2.0, 6.0, 1.0]), kspace=kspace, mask=mask,
        facts={"contrast": "T2w"},
    )  # fmt: skip
    result = engine.reconstruct(one, engine.encode(one, "Reconstruct.", "reconstruct"), num_samples=2)
    assert np.isfinite(result.image).all()
    assert np.isfinite(result.uncertainty).all()
    assert 0 < result.residual < 1


def test_masks_come_back_on_the_native_grid(engine: Engine, scan: Scan) -> None:
    prompts = {name: engine.encode(scan, f"Segment the {name}.", "segment") for name in ("grey matter", "lesion")}
    result = engine.segment(scan, prompts)
    assert set(result.masks) == {"grey matter", "lesion"}
    assert all(mask.shape == scan.image.shape and mask.dtype == bool for mask in result.masks.values())


def test_volumes_are_segmented_through_the_same_door(
    checkpoint: Path, engine: Engine, rng: torch.Generator, tmp_path: Path
) -> None:
    """A decoder of three dimensions, saved and loaded: sagittal slices across the thickest axis, larger than a window
    there and smaller in plane, masks on the native grid."""
    config = preset("tiny")
    decoder = replace(config.image_decoder, segment_dims=3, patch_shape=(4, 48, 48))
    model = OmniMRI.load(checkpoint, config=replace(config, image_decoder=decoder))
    model.save(tmp_path / "model", engine.tokenizer, version="test-3d", run={})
    image = Engine.load(tmp_path / "model", parts=("image",))
    assert image.model.config.image_decoder == decoder
    affine = np.array([[0.0, 0.0, 5.0, 3.0], [2.5, 0.0, 0.0, 4.0], [0.0, -2.5, 0.0, 5.0], [0.0, 0.0, 0.0, 1.0]])
    scan = Scan(image=torch.rand(9, 40, 30, generator=rng).numpy(), affine=affine, facts={"contrast": "T2w"})
    prompts = {name: engine.encode(scan, f"Segment the {name}.", "segment") for name in ("grey matter", "lesion")}
    result = image.segment(scan, prompts, num_steps=2)
    assert set(result.masks) == set(prompts)
    for name, mask in result.masks.items():
        assert mask.shape == scan.image.shape
        np.testing.assert_array_equal(mask, result.probabilities[name] >= 0.5)
    np.testing.assert_array_equal(
        image.segment(scan, prompts, num_steps=2).probabilities["lesion"], result.probabilities["lesion"]
    )
    # The same anatomy stored along other axes is the same volume to the model.
    turned = replace(scan, image=np.ascontiguousarray(scan.image[::-1]), affine=affine @ _flipped(len(scan.image)))
    again = image.segment(turned, prompts, num_steps=2).probabilities["lesion"]
    np.testing.assert_allclose(again[::-1], result.probabilities["lesion"], atol=1e-6)


def _flipped(num_slices: int) -> np.ndarray:
    """Voxels `(x, y, z)` of a volume whose slices were turned round, to those before."""
    matrix = np.diag([1.0, 1.0, -1.0, 1.0])
    matrix[2, 3] = num_slices - 1
    return matrix


def test_a_checkpoint_from_before_volumes_gives_the_same_masks(
    checkpoint: Path, engine: Engine, scan: Scan, tmp_path: Path
) -> None:
    """Its configuration has no field for them."""
    old = Path(shutil.copytree(checkpoint, tmp_path / "old"))
    for path, keys in ((old / INDEX_FILE, ("config", "image_decoder")), (old / "image_decoder" / "config.json", ())):
        settings = json.loads(path.read_text())
        decoder = settings
        for key in keys:
            decoder = decoder[key]
        for name in ("segment_dims", "patch_shape", "patch_overlap", "flat_levels"):
            del decoder[name]
        path.write_text(json.dumps(settings))
    before = Engine.load(old)
    assert before.model.config == engine.model.config
    prompt = engine.encode(scan, "Segment the lesion.", "segment")
    found = [each.segment(scan, {"lesion": prompt}, num_steps=2).probabilities["lesion"] for each in (engine, before)]
    np.testing.assert_array_equal(*found)


def test_replicas_that_hold_only_their_parts_give_the_same_answers(
    checkpoint: Path, engine: Engine, scan: Scan
) -> None:
    """What crosses is arrays: an encoder replica's prompt, decoded by a text and an image replica."""
    encoder = Engine.load(checkpoint, parts=("encoder",))
    text, image = Engine.load(checkpoint, parts=("text",)), Engine.load(checkpoint, parts=("image",))
    assert not hasattr(text.model, "vision")
    prompt = encoder.encode(scan, "Report this MRI.", "report")
    assert text.generate_text(prompt, max_new_tokens=8) == engine.generate_text(prompt, max_new_tokens=8)
    prompt = encoder.encode(scan, "Reconstruct the image.", "reconstruct")
    np.testing.assert_array_equal(
        image.reconstruct(scan, prompt, num_steps=1).image, engine.reconstruct(scan, prompt, num_steps=1).image
    )


def test_prompt_embeddings_decode_as_token_ids_do(engine: Engine, scan: Scan) -> None:
    """Greedy text from the embeddings of plain tokens equals transformers' own from the ids."""
    ids = torch.tensor([engine.tokenizer.encode("Most likely diagnosis: old")])
    embeds = engine.model.backbone.get_input_embeddings()(ids)[0].detach().numpy()
    prompt = engine.encode(scan, "Report this MRI.", "report")
    ours = engine.generate_text(replace(prompt, embeds=embeds), max_new_tokens=6).token_ids
    theirs = engine.model.backbone.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :].tolist()
    assert ours == theirs[: len(ours)]
    assert len(ours) == 6 or theirs[len(ours)] in stop_tokens(engine.tokenizer)


def test_streamed_pieces_make_the_whole_answer(engine: Engine, scan: Scan) -> None:
    prompt = engine.encode(scan, "Report this MRI.", "report")
    pieces: list[str] = []
    options = {"max_new_tokens": 12, "temperature": 1.5, "seed": 4}
    streamed = engine.generate_text(prompt, **options, on_text=pieces.append)
    assert "".join(pieces).strip() == streamed.readable
    assert streamed == engine.generate_text(prompt, **options)
    assert streamed != engine.generate_text(prompt, **{**options, "seed": 5})


def test_detection_answers_can_always_be_read(engine: Engine, scan: Scan) -> None:
    """Whatever an untrained model writes, where it is cut, and however it is drawn."""
    prompt = engine.encode(scan, "Detect every lesion.", "detect")
    for limit in (1, 30, 70, 200):
        for answer in engine.sample_texts(prompt, 6, max_new_tokens=limit, seed=limit):
            boxes = engine.boxes(answer, scan)
            assert len(boxes) <= MAX_BOXES
            assert all(box.side in (None, *SIDES) and 0 <= box.score <= 1 for box in boxes)
            assert answer.text.startswith("<bbox>[")
            assert answer.text.endswith("]</bbox>")


def test_boxes_take_the_labels_of_the_checkpoint(engine: Engine, checkpoint: Path, scan: Scan, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoint, tmp_path / "model"))
    calibration = PlattMap(slope=0.1, intercept=1.0, num_boxes=9, num_right=3, split="val", data_digest="d")
    Detection(labels=('2" plaque', "old infarct"), calibration=calibration).write(folder)
    knowing = Engine.load(folder)
    assert knowing.detection.calibration == calibration
    prompt = engine.encode(scan, "Detect every lesion.", "detect")
    answers = knowing.sample_texts(prompt, 12, max_new_tokens=90)
    boxes = [box for answer in answers for box in knowing.boxes(answer, scan)]
    assert {box.label for box in boxes} == {'2" plaque', "old infarct"}
    logprobs = [logprob for answer in answers for logprob in answer.box_logprobs]
    assert [box.score for box in boxes] == pytest.approx([calibration.probability(p) for p in logprobs])
    np.testing.assert_array_equal(np.argsort(logprobs), np.argsort([box.score for box in boxes]))


def test_the_tokens_of_a_box_make_its_score(engine: Engine, scan: Scan) -> None:
    """Against the whole answer, scored by teacher forcing among the tokens that the grammar allows."""
    prompt = engine.encode(scan, "Detect every lesion.", "detect")
    answer = next(a for a in engine.sample_texts(prompt, 16, max_new_tokens=200) if a.box_logprobs and a.finished)
    ids = torch.tensor([answer.token_ids])
    embeds = torch.cat([torch.tensor(prompt.embeds)[None], engine.model.backbone.get_input_embeddings()(ids)], 1)
    with torch.inference_mode():
        logits = engine.model.backbone(inputs_embeds=embeds, logits_to_keep=ids.shape[1] + 1).logits[0, :-1]
    matcher = LLMatcher(engine.grammar_tokens, detection_grammar())
    total = 0.0
    for row, token in zip(logits, answer.token_ids, strict=True):
        allowed = torch.frombuffer(bytearray(matcher.compute_logit_bias()), dtype=torch.uint8) > 0
        total += float(row.masked_fill(~allowed, -torch.inf).log_softmax(-1)[token])
        matcher.consume_token(token)
    assert answer.logprob * len(answer.token_ids) == pytest.approx(total, abs=1e-3)
    outside = total - sum(answer.box_logprobs)  # the brackets around the list
    assert -30 < outside <= 1e-3
    assert sum(answer.box_logprobs) < 0


def test_candidates_are_sorted_and_lie_apart(engine: Engine, scan: Scan) -> None:
    prompt = engine.encode(scan, "Detect every lesion.", "detect")
    answers = engine.sample_texts(prompt, 8, max_new_tokens=120)
    boxes = engine.candidates(answers, scan)
    assert engine.candidates([replace(answers[0], text="Two lesions."), *answers], scan) == boxes
    scores, corners = [box.score for box in boxes], np.array([box.box_voxel for box in boxes])
    assert scores == sorted(scores, reverse=True)
    overlap = box_iou(corners, corners) - np.eye(len(boxes))
    assert len(boxes) > 1
    assert overlap.max() < 0.1


def test_a_description_is_json_of_its_schema(engine: Engine, scan: Scan) -> None:
    schema = {
        "type": "object", "additionalProperties": False, "required": ["level", "plane"],
        "properties": {"level": {"type": "object", "properties": {"key": {"type": "string", "maxLength": 9}},
                                 "required": ["key"], "additionalProperties": False},
                       "plane": {"enum": ["axial", "coronal"]}},
    }  # fmt: skip
    prompt = engine.encode(scan, "Report this MRI.", "report")
    for seed in range(4):
        answer = engine.generate_text(
            prompt, grammar=json_grammar(schema), max_new_tokens=300, temperature=1.0, seed=seed
        )
        assert answer.finished
        jsonschema.validate(json.loads(answer.readable), schema)
    assert not engine.generate_text(prompt, grammar=json_grammar(schema), max_new_tokens=3).finished
    with pytest.raises(ValueError, match="grammar cannot be used"):
        engine.generate_text(prompt, grammar="start: nonsense")


def test_choice_probabilities_sum_to_one_and_do_not_depend_on_order(engine: Engine, scan: Scan) -> None:
    prompt = engine.encode(scan, "What is the most likely diagnosis?", "diagnose")
    choices = diagnosis_choices()
    forward, backward = engine.score_choices(prompt, choices), engine.score_choices(prompt, choices[::-1])
    assert forward.sum() == pytest.approx(1.0)
    np.testing.assert_allclose(forward, backward[::-1], rtol=1e-4)


def test_input_unlike_the_training_domain_is_warned_about(engine: Engine, scan: Scan) -> None:
    knee = Scan(image=scan.image, affine=scan.affine, facts={"contrast": None, "body_part": "knee"})
    warnings = engine.encode(knee, "Report this MRI.", "report").warnings
    assert any("Contrast unknown" in w for w in warnings)
    assert any("knee" in w for w in warnings)
    assert engine.encode(scan, "Report this MRI.", "report").warnings == ()


def test_reconstruction_without_kspace_says_what_is_needed(engine: Engine, scan: Scan) -> None:
    prompt = engine.encode(scan, "Reconstruct the image.", "reconstruct")
    with pytest.raises(ValueError, match="no k-space"):
        engine.reconstruct(Scan(image=scan.image, affine=scan.affine), prompt)
    with pytest.raises(ValueError, match="expected a prompt of that task"):
        engine.segment(scan, {"lesion": prompt})


def test_a_reconstruction_keeps_the_units_of_its_kspace(engine: Engine, scan: Scan) -> None:
    """Every slice is scaled by its own zero-filled maximum before the network and back after it."""
    prompt = engine.encode(scan, "Reconstruct.", "reconstruct")
    factor = np.array([1.0, 1e3, 1e-3, 7.0, 1.0, 1e2], np.float32)[:, None, None]
    louder = replace(scan, kspace=scan.kspace * factor[:, None])
    image = engine.reconstruct(scan, prompt, num_steps=2).image
    np.testing.assert_allclose(
        engine.reconstruct(louder, prompt, num_steps=2).image / factor, image, atol=1e-4 * np.abs(image).max()
    )


def test_an_engine_keeps_the_contract_of_its_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    old = shutil.copytree(checkpoint, tmp_path / "old")
    contract = Preprocess(preset("tiny").inputs, contract=1)
    (old / CONTRACT_FILE).write_text(json.dumps(contract.as_json()))
    assert Engine.load(old, parts=("encoder",)).preprocess == contract
    assert Engine.load(checkpoint, parts=("encoder",)).preprocess.contract == CONTRACT_VERSION
    (old / CONTRACT_FILE).write_text(json.dumps(contract.as_json() | {"version": "9-00000000"}))
    with pytest.raises(ValueError, match="contract 9 is unknown"):
        Engine.load(old, parts=("encoder",))


def test_one_representation_through_both_decoders(engine: Engine, scan: Scan) -> None:
    """The states of one pass of the backbone draw a mask and write boxes, and neither decoder changes the other."""
    prompt = engine.encode(scan, "Segment the lesion.", "segment")
    model, tokenizer = engine.model, engine.tokenizer
    request = engine.sequences.request("Segment the lesion.", scan.facts, "segment")
    batch = sequence_batch([request], engine.sequences)
    with torch.inference_mode():
        hidden = model.backbone.model(inputs_embeds=torch.tensor(prompt.embeds)[None]).last_hidden_state
        queries = model.conditions(hidden, batch)[0].numpy()
        words = model.backbone.lm_head(hidden[0, -1]).argmax()
        tag = model.backbone.get_input_embeddings()(torch.tensor(tokenizer.encode("<bbox>"))).numpy()
    np.testing.assert_array_equal(queries, prompt.queries)
    drawn = engine.segment(scan, {"lesion": replace(prompt, queries=queries)})
    written = engine.generate_text(replace(prompt, task="report"), max_new_tokens=1)
    assert written.token_ids in ([int(words)], [])
    boxes = replace(prompt, task="detect", embeds=np.concatenate([prompt.embeds, tag]))
    answer = engine.generate_text(boxes, max_new_tokens=120)
    assert np.isfinite(drawn.probabilities["lesion"]).all()
    assert drawn.masks["lesion"].shape == scan.image.shape
    assert engine.boxes(answer, scan) is not None
    again = engine.segment(scan, {"lesion": prompt})
    np.testing.assert_array_equal(again.probabilities["lesion"], drawn.probabilities["lesion"])
    assert engine.generate_text(boxes, max_new_tokens=120) == answer
