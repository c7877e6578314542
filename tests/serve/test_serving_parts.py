"""Access, artifacts, label maps and pictures, each on its own."""

import asyncio
import inspect
import os
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from omnimri.serve.admission import Admission
from omnimri.serve.answers import label_map, wanted_structures
from omnimri.serve.app import build_app
from omnimri.serve.artifacts import ArtifactStore, new_request_id
from omnimri.serve.config import AppArgs, ImageConfig, TextConfig, is_loopback
from omnimri.serve.pictures import contact_sheet, radiological
from omnimri.serve.routes import Gate
from omnimri.serve.schemas import RequestError
from tests.serve import serving_fakes as fakes

RAS = np.diag([2.0, 2.0, 6.0, 1.0])


@pytest.fixture
def model(tmp_path: Path) -> str:
    return str(fakes.model_folder(tmp_path / "model"))


def test_an_open_address_without_a_token_is_refused(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMNIMRI_TOKEN", raising=False)
    with pytest.raises(ValidationError, match="set OMNIMRI_TOKEN"):
        AppArgs(model=model, host="0.0.0.0")
    assert AppArgs(model=model).token is None
    monkeypatch.setenv("OMNIMRI_TOKEN", "from-the-environment")
    args = AppArgs(model=model, host="0.0.0.0")
    assert args.token is not None and args.token.get_secret_value() == "from-the-environment"
    assert "from-the-environment" not in repr(args)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match=r"omnimri\.json"):
        AppArgs(model=str(tmp_path))


def test_serve_reads_the_type_of_the_builders_argument() -> None:
    # As text (from __future__ import annotations) Serve would hand over a plain dict, unchecked.
    assert inspect.signature(build_app).parameters["args"].annotation is AppArgs


def test_loopback_addresses() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "127.8.0.1", "::1", "[::1]", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "10.0.0.7", "example.org", "")))


def test_configurations_that_cannot_work_are_refused() -> None:
    with pytest.raises(ValueError, match="max_replicas"):
        ImageConfig(min_replicas=3, max_replicas=2)
    with pytest.raises(ValueError, match="known: transformers, vllm"):
        TextConfig(backend="magic")
    with pytest.raises(ValueError, match="outline_timeout_s must be positive, found 0"):
        TextConfig(outline_timeout_s=0)


def ask(gate: Gate, path: str, *, client: str = "127.0.0.1", **options: object) -> httpx.Response:
    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(gate, client=(client, 1234))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as opened:
            return await opened.post(path, **options)

    return asyncio.run(send())


async def echo(scope: dict, receive: object, send: object) -> None:
    await receive()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"through"})


def test_a_token_is_asked_for_where_one_is_set(model: str) -> None:
    gate = Gate(echo, AppArgs(model=model, token="secret"))
    assert ask(gate, "/v1/models").status_code == 401
    assert ask(gate, "/v1/models").headers["www-authenticate"] == "Bearer"
    assert ask(gate, "/v1/models", headers={"Authorization": "Bearer wrong"}).status_code == 401
    assert ask(gate, "/v1/models", headers={"Authorization": "Basic secret"}).status_code == 401
    right = {"Authorization": "Bearer secret"}
    assert ask(gate, "/v1/models", client="10.0.0.7", headers=right).text == "through"
    assert ask(gate, "/healthz").text == "through"


def test_without_a_token_only_this_machine_is_answered(model: str) -> None:
    gate = Gate(echo, AppArgs(model=model, token=None))
    assert ask(gate, "/v1/models").text == "through"
    assert ask(gate, "/v1/models", client="10.0.0.7").status_code == 403


def test_strangers_cannot_send_a_body(model: str) -> None:
    async def reads_nothing(scope: dict, receive: object, send: object) -> None:
        raise AssertionError("the gate let it through")

    gate = Gate(reads_nothing, AppArgs(model=model, token="secret"))
    assert ask(gate, "/v1/report", content=bytes(1000)).status_code == 401


def test_artifacts_are_bounded_in_number_and_age(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path / "store", max_requests=2, max_age_s=100.0)
    ids = [new_request_id() for _ in range(3)]
    for position, request_id in enumerate(ids):
        store.write(request_id, {"masks.nii.gz": b"x"})
        written = tmp_path.stat().st_mtime - 10 * (3 - position)
        os.utime(store.root / request_id, (written, written))
    store.prune()
    assert [store.find(request_id, "masks.nii.gz") is not None for request_id in ids] == [False, True, True]
    os.utime(store.root / ids[1], (0, 0))
    assert store.find(ids[1], "masks.nii.gz") is None


@pytest.mark.parametrize("name", ["../masks.nii.gz", "..", "", "masks.nii.gz/..", "a/b.png", ".hidden.png"])
def test_artifact_names_cannot_leave_the_store(tmp_path: Path, name: str) -> None:
    store = ArtifactStore(tmp_path / "store", max_requests=2, max_age_s=100.0)
    request_id = new_request_id()
    store.write(request_id, {"masks.nii.gz": b"x"})
    assert store.find(request_id, name) is None
    assert store.find("../store", "masks.nii.gz") is None
    with pytest.raises(ValueError, match="plain file name"):
        store.write(new_request_id(), {name: b"x"})


def test_admission_frees_its_place_after_an_error() -> None:
    admission = Admission({"image": 1}, retry_after_s=3)
    with pytest.raises(KeyError), admission.slot("image"):
        with pytest.raises(RequestError, match="busy") as caught, admission.slot("image"):
            pass
        assert caught.value.retry_after_s == 3
        raise KeyError
    with admission.slot("image"):
        pass


def test_overlapping_masks_go_to_the_likelier_structure() -> None:
    first, second = np.array([[[1, 1, 0]]], bool), np.array([[[0, 1, 1]]], bool)
    probabilities = {"a": np.array([[[0.9, 0.6, 0.1]]]), "b": np.array([[[0.1, 0.7, 0.8]]])}
    labels, names = label_map({"a": first, "b": second}, probabilities)
    np.testing.assert_array_equal(labels, [[[1, 2, 2]]])
    assert names == {1: "a", 2: "b"}


def test_structures_come_from_the_field_then_the_sentence_then_the_tissues() -> None:
    assert wanted_structures("Lesion, grey matter", "Segment the white matter.") == ["lesion", "grey matter"]
    assert wanted_structures(None, "Segment the white matter.") == ["white matter"]
    assert wanted_structures(None, None) == ["cerebrospinal fluid", "grey matter", "white matter"]
    with pytest.raises(RequestError, match="known: cerebrospinal fluid"):
        wanted_structures("left toe", None)


def test_axial_slices_show_the_front_on_top_and_the_right_side_at_the_left() -> None:
    volume = np.zeros((3, 20, 30), np.float32)
    volume[1, -1, -1] = 1.0  # RAS: the last voxels lie to the right and in front.
    view = radiological(volume, RAS)
    assert (view.left, view.right) == ("R", "L")
    assert view.slices[1, 0, 0] == 1.0
    # The same head stored from left to right with x mirrored looks the same.
    mirrored = RAS @ np.array([[-1, 0, 0, 29], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])
    np.testing.assert_array_equal(radiological(volume[:, :, ::-1], mirrored).slices, view.slices)


def test_sagittal_slices_stand_upright_and_look_to_the_left() -> None:
    volume = np.zeros((3, 20, 30), np.float32)  # slices along x, rows along z, columns along y
    volume[1, -1, -1] = 1.0
    affine = np.array([[0, 0, 6.0, 0], [2.0, 0, 0, 0], [0, 2.0, 0, 0], [0, 0, 0, 1]])
    view = radiological(volume, affine)
    assert (view.left, view.right) == ("A", "P")
    assert view.slices[1, 0, 0] == 1.0


def test_pixels_of_a_sheet_are_square_in_millimetres(tmp_path: Path) -> None:
    volume = np.ones((1, 10, 40), np.float32)
    (tmp_path / "sheet.png").write_bytes(contact_sheet(volume, np.diag([1.0, 2.0, 5.0, 1.0])))
    with Image.open(tmp_path / "sheet.png") as sheet:
        columns = np.asarray(sheet.convert("L"))[: sheet.height - 30]
    height, width = (np.ptp(np.flatnonzero((columns > 128).any(axis=axis))) + 1 for axis in (1, 0))
    assert width / height == pytest.approx(40 * 1.0 / (10 * 2.0), rel=0.05)
