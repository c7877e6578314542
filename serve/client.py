"""A small client: one request with one file, the answer and its artifacts kept in a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx


class RequestFailedError(RuntimeError):
    """The server answered with an error; the message is its sentence."""


def ask(
    url: str, task: str, file: Path, out: Path, *, token: str | None = None, timeout_s: float = 600.0, **fields: object
) -> dict[str, Any]:
    """Send a file to a task route and keep what comes back.

    Args:
        url: Of the server.
        task: One of the five tasks.
        file: DICOM zip, NIfTI or k-space HDF5.
        out: Folder for `answer.json` and the artifacts; made if absent.
        token: Bearer token, where the server wants one.
        timeout_s: Longest time to wait.
        fields: Further form fields, for example `structures="lesion"`.

    Returns:
        The answer.

    Raises:
        RequestFailedError: If the status is not 200.
    """
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    out.mkdir(parents=True, exist_ok=True)
    with httpx.Client(base_url=url, headers=headers, timeout=timeout_s, trust_env=False) as client:
        with file.open("rb") as stream:
            response = client.post(
                f"/v1/{task}", files={"file": (file.name, stream)}, data={k: str(v) for k, v in fields.items()}
            )
        if response.status_code != httpx.codes.OK:
            raise RequestFailedError(f"{task}: status {response.status_code}: {_sentence(response)}")
        answer = response.json()
        (out / "answer.json").write_text(json.dumps(answer, indent=1) + "\n")
        for artifact in answer["artifacts"]:
            (out / artifact["name"]).write_bytes(client.get(artifact["href"]).raise_for_status().content)
    return answer


def _sentence(response: httpx.Response) -> str:
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError):
        return response.text[:300]
