"""Which rows a licence policy lets a training run use. A reading aid, not legal advice."""

from __future__ import annotations

import re
from collections import Counter

from omnimri.platform.data.shards import Shards

ANY, COMMERCIAL_OK = "any", "commercial-ok"

_COMMERCIAL = (
    r"\bcc.?0\b|\bcc.?by\b|\bmit\b|\bbsd|apache|\bpddl\b|\bodc.?by\b|public domain|creative commons (zero|attribution)"
)
_RESTRICTED = r"\bnc\b|non.?commercial|\bnd\b|no.?deriv|research.only|agreement|registration"
"""Words that restrict use whatever else a licence says; a trained model is a derivative."""


def allows_commercial_use(licence: str | None) -> bool:
    """Whether a licence as data sets write it allows commercial use of a trained model; unknown ones do not."""
    words = (licence or "").lower().replace("_", " ")
    return bool(re.search(_COMMERCIAL, words)) and not re.search(_RESTRICTED, words)


def licensed(shards: Shards, policy: str) -> Shards:
    """The rows that a policy admits.

    Args:
        shards: Rows with their licences.
        policy: `any`, `commercial-ok`, or licences by name, separated by commas.

    Raises:
        ValueError: If no row is left.
    """
    if policy == ANY:
        return shards
    names = {name.strip().lower() for name in policy.split(",")}
    kept = [
        row
        for row in shards.rows
        if (allows_commercial_use(row.licence) if policy == COMMERCIAL_OK else (row.licence or "").lower() in names)
    ]
    if not kept:
        raise ValueError(f"--licences {policy} leaves no volume; the data hold {count_licences(shards)}.")
    return Shards(kept, shards.manifests)


def count_licences(shards: Shards) -> dict[str, int]:
    """Volumes by licence, the commonest first."""
    return dict(Counter(row.licence or "unknown" for row in shards.rows).most_common())
