"""The HTTP contract, asked by a real client of the deployed application; the engine behind it has known answers."""

import concurrent.futures
import gzip
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import nibabel as nib
import numpy as np
import pytest

from omnimri.models.prompts import instruction_for
from omnimri.models.vocabulary import RESEARCH_NOTICE
from omnimri.platform.language.description import Description
from omnimri.serve.app import running_app
from omnimri.serve.config import AppArgs, ImageConfig, ServingConfig, TextConfig, UploadLimits
from omnimri.serve.ingress import NOT_OUTLINED
from tests.serve import serving_fakes as fakes


@pytest.fixture(scope="module")
def url(
    ray_cluster: None,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("served")
    one_at_a_time = ImageConfig(max_replicas=1, max_ongoing_requests=1, max_queued_requests=1)
    args = AppArgs(
        model=str(fakes.model_folder(folder / "model")),
        artifacts_dir=str(folder / "artifacts"),
        retry_after_s=7,
        serving=ServingConfig(
            image=one_at_a_time, text=TextConfig(outline_timeout_s=4.0), limits=UploadLimits(max_upload_mb=2.0)
        ),
    )
    with running_app(args, load=fakes.known_answers) as address:
        yield address


@pytest.fixture
def client(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=120, trust_env=False) as opened:
        yield opened


@pytest.fixture(scope="module")
def nifti(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fakes.write_nifti(tmp_path_factory.mktemp("scans") / "head_T1w.nii.gz")


def post(client: httpx.Client, route: str, path: Path, **fields: str) -> httpx.Response:
    return client.post(f"/v1/{route}", files={"file": (path.name, path.read_bytes())}, data=fields)


def error_of(response: httpx.Response) -> dict[str, str]:
    assert set(response.json()) == {"error"}
    error = response.json()["error"]
    assert set(error) == {"code", "message"}
    return error


def download(client: httpx.Client, answer: dict, name: str) -> bytes:
    link = next(artifact for artifact in answer["artifacts"] if artifact["name"] == name)
    response = client.get(link["href"]).raise_for_status()
    assert response.headers["content-type"] == link["media_type"]
    return response.content


def volume(content: bytes) -> nib.Nifti1Image:
    return nib.Nifti1Image.from_bytes(gzip.decompress(content))


@pytest.mark.parametrize("task", ["segment", "detect", "diagnose", "report"])
def test_every_answer_has_the_one_shape(client: httpx.Client, nifti: Path, task: str) -> None:
    answer = post(client, task, nifti).raise_for_status().json()
    required = {"id", "task", "instruction", "model", "artifacts", "warnings", "preprocessing", "notice"}
    assert required <= set(answer) <= required | {"text", "findings", "measurements"}
    assert answer["task"] == task
    assert answer["model"] == {"name": "omnimri", "version": fakes.VERSION}
    assert answer["preprocessing"] == {
        "version": fakes.KnownAnswers.preprocess.version,
        "steps": fakes.KnownAnswers.preprocess.steps,
    }
    assert answer["notice"] == RESEARCH_NOTICE
    assert f"Encoded for {task}." in answer["warnings"]


def test_segment_returns_masks_on_the_grid_of_the_input_and_volumes(client: httpx.Client, nifti: Path) -> None:
    answer = post(client, "segment", nifti, structures="white matter, Lesion").raise_for_status().json()
    given, masks = nib.load(nifti), volume(download(client, answer, "masks.nii.gz"))
    np.testing.assert_allclose(masks.affine, given.affine, atol=1e-5)
    image, labels = given.get_fdata(), np.asarray(masks.dataobj)
    assert labels.shape == image.shape
    np.testing.assert_array_equal(labels, np.select([image >= 0.6, image >= 0.2], [2, 1], 0))
    voxel_ml = abs(np.linalg.det(given.affine[:3, :3])) / 1000
    assert [(m["label"], m["label_value"], m["unit"]) for m in answer["measurements"]] == [
        ("white matter", 1, "mL"), ("lesion", 2, "mL"),
    ]  # fmt: skip
    assert answer["measurements"][1]["value"] == pytest.approx((labels == 2).sum() * voxel_ml)
    assert download(client, answer, "overlay.png").startswith(b"\x89PNG")


def test_detect_returns_boxes_in_voxels_and_millimetres(client: httpx.Client, nifti: Path) -> None:
    (finding,) = post(client, "detect", nifti).raise_for_status().json()["findings"]
    assert (finding["label"], finding["side"], finding["score"]) == ("old infarct", "left", pytest.approx(0.8))
    assert finding["calibrated"] is False
    np.testing.assert_allclose(finding["box_voxel"], fakes.BOX, atol=1)
    z1, y1, x1, z2, y2, x2 = finding["box_voxel"]
    centre = np.array([x1 + x2, y1 + y2, z1 + z2]) / 2 - 0.5
    centre_mm = (fakes.OBLIQUE @ [*centre, 1])[:3]
    np.testing.assert_allclose(np.reshape(finding["box_mm"], (2, 3)).mean(0), centre_mm, atol=0.05)


def test_an_answer_cut_short_is_no_list_of_boxes_and_says_so(client: httpx.Client, nifti: Path) -> None:
    answer = post(client, "detect", nifti, max_new_tokens="20").raise_for_status().json()
    assert answer["findings"] == []
    assert any("no list of boxes" in warning for warning in answer["warnings"])


def test_a_report_as_a_description_is_decoded_under_its_schema(client: httpx.Client, nifti: Path) -> None:
    answer = post(client, "report", nifti, format="description").raise_for_status().json()
    assert all(field in answer["text"] for field in ("%json", *Description.model_fields))
    assert answer["instruction"] == instruction_for("describe")
    asked = post(client, "report", nifti, format="description", instruction="Describe this.").json()
    assert asked["instruction"] == "Describe this."
    cut = "The answer was cut at max_new_tokens."  # of 480 tokens here
    described, told = ({"instruction": "At length.", "format": form} for form in ("description", "text"))
    assert cut not in post(client, "report", nifti, **described).json()["warnings"]
    assert cut in post(client, "report", nifti, **told).json()["warnings"]
    refused = post(client, "detect", nifti, format="description")
    assert refused.status_code == 422
    assert refused.json()["error"]["code"] == "unknown_format"


def test_diagnose_returns_text_and_probabilities(client: httpx.Client, nifti: Path) -> None:
    answer = post(client, "diagnose", nifti).raise_for_status().json()
    assert answer["text"] == "Normal brain. No lesion."
    probabilities = {m["label"]: m["value"] for m in answer["measurements"]}
    assert probabilities["old infarct"] == 1.0
    assert sum(probabilities.values()) == pytest.approx(1.0)


def test_reconstruct_returns_the_image_on_its_grid(client: httpx.Client, tmp_path: Path) -> None:
    mask = np.zeros(fakes.SHAPE[2], bool)
    mask[::2] = mask[14:22] = True
    scan = fakes.write_fastmri(tmp_path / "head.h5", mask=mask)
    answer = post(client, "reconstruct", scan, num_samples="2", num_steps="3").raise_for_status().json()
    image = volume(download(client, answer, "reconstruction.nii.gz"))
    np.testing.assert_allclose(image.affine, fakes.OBLIQUE, atol=1e-4)
    assert image.shape == fakes.SHAPE[::-1]
    assert np.all(volume(download(client, answer, "uncertainty.nii.gz")).get_fdata() == 3.0)
    assert download(client, answer, "preview.png").startswith(b"\x89PNG")
    numbers = {m["name"]: m["value"] for m in answer["measurements"]}
    assert numbers == {"residual": 0.25, "acceleration": pytest.approx(36 / mask.sum())}


def test_fully_sampled_kspace_is_undersampled_only_when_asked(client: httpx.Client, tmp_path: Path) -> None:
    scan = fakes.write_fastmri(tmp_path / "full.h5")
    refused = post(client, "reconstruct", scan)
    assert refused.status_code == 422
    assert "fully sampled" in error_of(refused)["message"]
    answer = post(client, "reconstruct", scan, acceleration="4").raise_for_status().json()
    assert any("Retrospectively undersampled: 9 of 36" in warning for warning in answer["warnings"])


def test_a_dicom_zip_is_read_and_its_patient_is_never_named(client: httpx.Client, tmp_path: Path) -> None:
    response = post(client, "segment", fakes.write_dicom_zip(tmp_path / "Doe_Jane.zip")).raise_for_status()
    masks = volume(download(client, response.json(), "masks.nii.gz"))
    assert masks.shape == fakes.SHAPE[::-1]
    # DICOM is LPS: its first voxel at (-70, -80, 0) lies at the right and in front.
    np.testing.assert_allclose(masks.affine @ [0, 0, 0, 1], [70, 80, 0, 1], atol=1e-4)
    refused = post(client, "reconstruct", tmp_path / "Doe_Jane.zip")
    assert refused.status_code == 422
    assert "raw k-space" in error_of(refused)["message"]
    for text in (response.text, refused.text):
        assert not any(word in text for word in ("Doe", "Jane", "778899"))


@pytest.mark.parametrize("kind", ["text", "fake_nifti", "ct", "truncated_zip", "nested_zip", "empty"])
def test_a_wrong_file_gets_one_clear_sentence_and_the_app_lives_on(
    client: httpx.Client, nifti: Path, tmp_path: Path, kind: str
) -> None:
    response = post(client, "report", wrong_file(tmp_path, kind))
    assert response.status_code == 422
    message = error_of(response)["message"]
    assert message[0].isupper() and "\n" not in message and len(message) < 300 and str(tmp_path) not in message
    post(client, "report", nifti).raise_for_status()


def wrong_file(folder: Path, kind: str) -> Path:
    if kind == "ct":
        return fakes.write_dicom_zip(folder / "ct.zip", modality="CT", description="Thorax")
    series = fakes.write_dicom_zip(folder / "series.zip").read_bytes()
    name, content = {
        "text": ("notes.txt", b"not an image"),
        "fake_nifti": ("fake.nii.gz", b"not an image"),
        "truncated_zip": ("cut.zip", series[: len(series) // 2]),
        "nested_zip": ("outer.zip", _zip_of("inner.zip", series)),
        "empty": ("empty.nii", b""),
    }[kind]
    (folder / name).write_bytes(content)
    return folder / name


def _zip_of(name: str, content: bytes) -> bytes:
    import io
    import zipfile

    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, content)
    return buffer.getvalue()


def test_fields_are_checked_and_their_values_not_repeated(client: httpx.Client, nifti: Path) -> None:
    for task, fields, word in (
        ("reconstruct", {"num_steps": "900"}, "num_steps"),
        ("report", {"sampels": "Jane Doe"}, "sampels"),
        ("segment", {"structures": "left toe"}, "grey matter"),
        ("report", {"series": "7"}, "holds 1: T1w with 6 slices"),
        ("instruct", {"instruction": "Sing."}, "task"),
    ):
        response = post(client, task, nifti, **fields)
        assert response.status_code == 422
        assert word in error_of(response)["message"]
        assert "Jane" not in response.text
    missing = client.post("/v1/report", data={"seed": "1"})
    assert missing.status_code == 422
    assert "named file" in error_of(missing)["message"]


def test_an_error_of_the_model_about_its_input_reaches_the_caller(client: httpx.Client, tmp_path: Path) -> None:
    response = post(client, "report", fakes.write_nifti(tmp_path / "dark.nii", np.zeros(fakes.SHAPE, np.float32)))
    assert (response.status_code, error_of(response)["message"]) == (422, "The scan is empty.")


@pytest.mark.parametrize("stream", ["false", "true"])
def test_a_bug_is_a_500_that_says_nothing_of_the_inside(client: httpx.Client, nifti: Path, stream: str) -> None:
    response = post(client, "report", nifti, instruction="Crash.", stream=stream)
    assert (response.status_code, error_of(response)["code"]) == (500, "internal")
    assert "bug" not in response.text
    post(client, "report", nifti).raise_for_status()


def test_an_upload_over_the_limit_is_refused(client: httpx.Client, nifti: Path) -> None:
    response = client.post("/v1/report", files={"file": ("big.nii", bytes(3_000_000))})
    assert response.status_code == 413
    assert "2 MB" in error_of(response)["message"]
    post(client, "report", nifti).raise_for_status()


def test_several_series_are_named_and_can_be_chosen(client: httpx.Client, nifti: Path, tmp_path: Path) -> None:
    short = fakes.write_nifti(tmp_path / "other_FLAIR.nii.gz", fakes.head_image((3, 40, 36)))
    files = [("file", (path.name, path.read_bytes())) for path in (short, nifti)]
    first = client.post("/v1/segment", files=files).raise_for_status().json()
    assert any("2 series" in warning and "the one with most slices" in warning for warning in first["warnings"])
    assert volume(download(client, first, "masks.nii.gz")).shape[2] == 6
    second = client.post("/v1/segment", files=files, data={"series": "flair"}).raise_for_status().json()
    assert volume(download(client, second, "masks.nii.gz")).shape[2] == 3


def test_a_free_instruction_finds_its_task(client: httpx.Client, nifti: Path) -> None:
    answer = post(client, "instruct", nifti, instruction="Outline the white matter.").raise_for_status().json()
    assert (answer["task"], answer["instruction"]) == ("segment", "Outline the white matter.")
    assert [m["label"] for m in answer["measurements"]] == ["white matter"]
    answer = post(client, "instruct", nifti, instruction="Is there any haemorrhage?").raise_for_status().json()
    assert answer["task"] == "diagnose"
    assert "measurements" not in answer  # probabilities of diagnoses are no answer to yes or no
    answer = post(client, "instruct", nifti, instruction="Anything of note?", task="report").raise_for_status().json()
    assert answer["text"] == "Normal brain. No lesion."


@pytest.mark.parametrize("task", ["detect", "diagnose", "report"])
def test_the_text_decoder_is_told_what_the_image_decoder_draws(client: httpx.Client, nifti: Path, task: str) -> None:
    """The fake decoder draws the brightest band of the head as lesion, which lies in front and on both sides."""
    told = [warning for warning in post(client, task, nifti).json()["warnings"] if warning.startswith("Told: ")]
    assert len(told) == 1
    assert re.fullmatch(r"Told: 1 lesion, up to \d+ mm, [\d.]+ mL, .*\[(\d+, ){5}\d+\]\.", told[0])


def test_text_streams_as_events_that_end_in_the_answer(client: httpx.Client, nifti: Path) -> None:
    response = post(client, "report", nifti, stream="true").raise_for_status()
    assert response.headers["content-type"].startswith("text/event-stream")
    events = [block.split("\n") for block in response.text.strip().split("\n\n")]
    assert [lines[0] for lines in events] == ["event: token"] * 4 + ["event: answer"]
    pieces = [json.loads(lines[1].removeprefix("data: "))["text"] for lines in events[:4]]
    answer = json.loads(events[-1][1].removeprefix("data: "))
    assert "".join(pieces).strip() == answer["text"] == "Normal brain. No lesion."
    refused = client.post("/v1/report", files={"file": ("a.nii", b"nothing")}, data={"stream": "true"})
    assert refused.status_code == 422


def test_text_is_answered_while_an_image_is_computed_and_a_full_queue_says_when_to_return(
    client: httpx.Client, nifti: Path, tmp_path: Path
) -> None:
    pipe = tmp_path / "hold"
    os.mkfifo(pipe)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        long = pool.submit(post, client, "segment", nifti, structures="lesion", instruction=str(pipe))
        with pipe.open("w"):  # Opens once the image replica reads from it, and holds it there.
            report = post(client, "report", nifti).raise_for_status().json()
            assert NOT_OUTLINED in report["warnings"]
            assert not any("Told" in warning for warning in report["warnings"])
            assert NOT_OUTLINED in post(client, "report", nifti, stream="true").raise_for_status().text
            assert not long.done()
            waiting = [pool.submit(post, client, "segment", nifti) for _ in range(2)]
            done, _ = concurrent.futures.wait(waiting, return_when=concurrent.futures.FIRST_COMPLETED)
            busy = done.pop().result()
        assert long.result().status_code == 200
        assert sorted(request.result().status_code for request in waiting) == [200, 429]
    assert (busy.status_code, busy.headers["retry-after"], error_of(busy)["code"]) == (429, "7", "busy")


def test_artifacts_are_found_by_exact_name_only(client: httpx.Client, nifti: Path) -> None:
    answer = post(client, "segment", nifti).raise_for_status().json()
    for path in (f"{answer['id']}/other.nii.gz", f"{'0' * 32}/masks.nii.gz", f"{answer['id']}/..%2F..%2Fmodel"):
        assert client.get(f"/v1/artifacts/{path}").status_code == 404


def test_state_routes(client: httpx.Client) -> None:
    assert client.get("/healthz").json() == {"status": "ok"}
    ready = client.get("/readyz")
    assert ready.status_code == 200
    assert set(ready.json()["deployments"]) == {"ingress", "encoder", "text", "image"}
    (model,) = client.get("/v1/models").json()["data"]
    assert (model["id"], model["version"]) == ("omnimri", fakes.VERSION)
    assert client.get("/docs").status_code == 200


def test_the_description_lists_every_route_and_field(client: httpx.Client) -> None:
    description = client.get("/openapi.json").json()
    tasks = {"reconstruct", "segment", "detect", "diagnose", "report", "instruct"}
    state = {"/v1/models", "/healthz", "/readyz", "/v1/artifacts/{request_id}/{name}"}
    assert set(description["paths"]) == {f"/v1/{task}" for task in tasks} | state
    form = description["components"]["schemas"]["ReconstructForm"]["properties"]
    assert {"file", "instruction", "num_steps", "num_samples", "seed", "acceleration", "series"} <= set(form)


def test_the_page_needs_nothing_from_elsewhere(client: httpx.Client) -> None:
    page = client.get("/").raise_for_status().text
    assert RESEARCH_NOTICE in page
    assert "http://" not in page and "https://" not in page


def test_a_page_from_elsewhere_cannot_reach_in_by_another_host_name(client: httpx.Client) -> None:
    response = client.get("/v1/models", headers={"Host": "attacker.example"})
    assert response.status_code == 403
