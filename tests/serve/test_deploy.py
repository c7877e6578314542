"""`omnimri deploy` with a real, untrained model: starts, answers every task, stops cleanly."""

import gzip
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import nibabel as nib
import numpy as np
import pytest
import torch

from omnimri.jobs import deploy
from omnimri.models.config import tiny
from omnimri.models.instructions import INSTRUCTIONS
from omnimri.models.omnimri import SERVING_PARTS, OmniMRI
from omnimri.models.tokenizer import train_tokenizer
from tests.serve import serving_fakes as fakes

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("untrained") / "model"
    torch.manual_seed(0)
    sentences = [sentence for phrasings in INSTRUCTIONS.values() for sentence in phrasings]
    tokenizer = train_tokenizer(sentences, tiny().backbone.vocab_size)
    OmniMRI(tiny(), SERVING_PARTS).save(folder, tokenizer, version="untrained-0", run={})
    return folder


@pytest.fixture(scope="module")
def server(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[subprocess.Popen, str]]:
    artifacts = tmp_path_factory.mktemp("artifacts")
    command = [sys.executable, "-m", "omnimri.jobs.deploy", "--model", str(checkpoint), "--port", "0"]
    environment = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "OMNIMRI_TOKEN")}
    with subprocess.Popen(
        [*command, "--artifacts", str(artifacts)], cwd=ROOT, env={**environment, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        ready = next((line for line in process.stdout if line.startswith("OmniMRI is ready at ")), None)
        assert ready is not None, f"deploy ended with status {process.wait()}"
        yield process, ready.split()[4]
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)


@pytest.mark.slow
def test_a_deployed_model_answers_every_task_on_the_grid_of_its_input(
    server: tuple[subprocess.Popen, str], tmp_path: Path
) -> None:
    process, url = server
    mask = np.arange(fakes.SHAPE[2]) % 3 == 0
    mask[14:22] = True
    dicom = fakes.write_dicom_zip(tmp_path / "series.zip")
    kspace = fakes.write_fastmri(tmp_path / "scan.h5", mask=mask)
    with httpx.Client(base_url=url, timeout=300, trust_env=False) as client:
        for task in ("reconstruct", "segment", "detect", "diagnose", "report"):
            path = kspace if task == "reconstruct" else dicom
            sampling = {} if task in ("reconstruct", "segment") else {"max_new_tokens": "16"}
            response = client.post(f"/v1/{task}", files={"file": (path.name, path.read_bytes())}, data=sampling)
            answer = response.raise_for_status().json()
            assert answer["model"]["version"] == "untrained-0"
            for artifact in answer["artifacts"]:
                content = client.get(artifact["href"]).raise_for_status().content
                if artifact["name"].endswith(".nii.gz"):
                    image = nib.Nifti1Image.from_bytes(gzip.decompress(content))
                    assert image.shape == fakes.SHAPE[::-1]
                    assert np.isfinite(image.get_fdata()).all()
        assert client.post("/v1/report", files={"file": ("a.nii", b"no")}).status_code == 422
        assert client.get("/healthz").status_code == 200
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 0
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/healthz", trust_env=False)


def test_what_cannot_be_deployed_is_refused_in_one_line(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMNIMRI_TOKEN", raising=False)
    for arguments, word in (
        (["--model", str(tmp_path)], "omnimri.json"),
        (["--model", str(checkpoint), "--host", "0.0.0.0"], "OMNIMRI_TOKEN"),
        (["--model", str(checkpoint), "--set", "image.replicas=3"], "image.max_replicas"),
        (["--model", str(checkpoint), "--set", "text.backend=magic"], "known: transformers, vllm"),
        (["--model", "models:/omnimri@champion", "--tracking-uri", f"sqlite:///{tmp_path}/none.db"], "No model"),
    ):
        assert deploy.main(arguments) == 1
        lines = capsys.readouterr().err.strip().splitlines()
        assert lines[-1].startswith("omnimri deploy: error: ")
        assert word in lines[-1]
