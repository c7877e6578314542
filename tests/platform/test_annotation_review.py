"""A reader accepts and rejects on the page; the file that it saves is what Python reads."""

from __future__ import annotations

import base64
import io
import json
import re
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from omnimri.platform.annotation.checks import Contradiction
from omnimri.platform.annotation.review import ReviewItem, Verdict, load_verdicts, marked, write_review
from tests.platform.browser import CHROMIUM, Tab, browser_tab

DIGEST = "0123456789abcdef"
ORGANS = "visible_anatomical_structures.organs_or_central_structures"
SIGNAL = "tissue_signal_characteristics.normal_signal_appearance"
EVIL = '</dd><script>window.hacked = 1</script><img src=x onerror="window.hacked = 2"> & "quoted"'


def png(seed: int, size: tuple[int, int] = (96, 80)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, size, dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def items() -> list[ReviewItem]:
    wrong = Contradiction(field=ORGANS, kind="anatomy", said="medial meniscus", known="body part brain")
    return [
        ReviewItem(
            row_id="row-a", pictures=[png(0), png(1), png(2)], facts={"plane": "axial", "contrast": "T1w"},
            fields={SIGNAL: "dark fluid", ORGANS: "thalamus, Medial meniscus"}, contradictions=[wrong],
        ),
        ReviewItem(row_id='row"<b>', pictures=[png(3)], facts={"note": EVIL}, fields={ORGANS: EVIL}),
        ReviewItem(row_id="__proto__", pictures=[], facts={}, fields={}),
    ]  # fmt: skip


@pytest.fixture
def page(tmp_path: Path) -> Path:
    path = tmp_path / "review.html"
    write_review(path, items(), digest=DIGEST, title="Review <i>")
    return path


@pytest.fixture
def tab(tmp_path: Path) -> Iterator[Tab]:
    if CHROMIUM is None or find_spec("websockets") is None:
        pytest.skip("needs Chromium and the package websockets")
    with browser_tab(tmp_path / "profile") as opened:
        yield opened


def test_the_page_is_self_contained_and_holds_the_pictures(page: Path) -> None:
    html = page.read_text()
    assert not re.search(r"https?://|<link|src=\"(?!data:image/png;base64,)", html)
    found = [base64.b64decode(data) for data in re.findall(r"data:image/png;base64,([^\"]+)", html)]
    assert found == [picture for item in items() for picture in item.pictures]


def test_levels_come_in_the_order_of_the_paper(page: Path) -> None:
    html = page.read_text()
    assert html.index("Visible anatomical structures") < html.index("Tissue signal characteristics")


def test_verdicts_are_kept_saved_and_read(page: Path, tab: Tab, tmp_path: Path) -> None:
    tab.open(page)
    assert tab.evaluate("document.getElementById('progress').textContent") == "0 of 3 decided, 0 accepted"
    tab.press("a")
    tab.evaluate("document.querySelectorAll('.item')[1].querySelector('[data-verdict=reject]').click()")
    tab.press("n")
    for letter in "a & b":
        tab.press(letter)
    tab.evaluate("document.activeElement.blur()")
    tab.press("j")
    tab.press("r")
    tab.press("u")
    assert tab.evaluate("document.getElementById('progress').textContent") == "2 of 3 decided, 1 accepted"
    tab.evaluate("window.isOld = true")
    tab.call("Page.reload")
    tab.wait(
        "!window.isOld && document.readyState === 'complete' && document.querySelectorAll('.item.reject').length === 1"
    )
    assert tab.evaluate("document.getElementById('progress').textContent") == "2 of 3 decided, 1 accepted"
    assert tab.evaluate("document.querySelectorAll('.item')[1].querySelector('input').value") == "a & b"
    tab.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path / "saved"))
    tab.evaluate("document.getElementById('save').click()")
    assert load_verdicts(_downloaded(tmp_path / "saved"), DIGEST) == {
        "row-a": Verdict(decision="accept"),
        'row"<b>': Verdict(decision="reject", note="a & b"),
    }


def _downloaded(folder: Path) -> Path:
    path = folder / "verdicts.json"
    stop = time.monotonic() + 30
    while not path.is_file():
        assert time.monotonic() < stop
        time.sleep(0.05)
    return path


def test_a_second_press_takes_a_verdict_back(page: Path, tab: Tab) -> None:
    tab.open(page)
    button = "document.querySelectorAll('.item')[2].querySelector('[data-verdict=accept]')"
    for pressed in ("true", "false"):
        tab.evaluate(f"{button}.click()")
        assert tab.evaluate(f"{button}.getAttribute('aria-pressed')") == pressed
    tab.evaluate(f"{button}.click()")
    assert json.loads(tab.evaluate("verdicts()"))["verdicts"] == {"__proto__": {"verdict": "accept", "note": ""}}


def test_what_a_model_wrote_is_shown_to_the_letter_and_never_run(page: Path, tab: Tab) -> None:
    tab.open(page)
    texts = tab.evaluate("[...document.querySelectorAll('dd:not(.why)')].map(node => node.textContent)")
    assert texts == ["thalamus, Medial meniscus", "dark fluid", EVIL]
    assert tab.evaluate("window.hacked === undefined")
    assert tab.evaluate("document.querySelectorAll('main img').length") == 4
    assert tab.evaluate("document.querySelector('h1').textContent") == "Review <i>"
    assert tab.evaluate("[...document.querySelectorAll('mark')].map(node => node.textContent)") == ["Medial meniscus"]
    assert tab.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")


def test_another_layer_starts_without_verdicts(page: Path, tab: Tab, tmp_path: Path) -> None:
    tab.open(page)
    tab.press("a")
    other = tmp_path / "other.html"
    write_review(other, items(), digest="fedcba")
    tab.open(other)
    assert tab.evaluate("document.getElementById('progress').textContent") == "0 of 3 decided, 0 accepted"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "no JSON"),
        ("[]", 'keys "layer" and "verdicts"'),
        ('{"layer": "0123456789abcdef"}', 'keys "layer" and "verdicts"'),
        ('{"layer": "other", "verdicts": {}}', "holds verdicts on layer other, not on 0123456789abcdef"),
        ('{"layer": "0123456789abcdef", "verdicts": {"a": {"verdict": "maybe"}}}', "row a: expected"),
        ('{"layer": "0123456789abcdef", "verdicts": {"a": "accept"}}', "row a: expected"),
        ('{"layer": "0123456789abcdef", "verdicts": {"a": {"verdict": ["accept"]}}}', "row a: expected"),
        ('{"layer": "0123456789abcdef", "verdicts": {"a": {"verdict": "accept", "note": 3}}}', "row a: expected"),
    ],
)
def test_another_file_is_refused_in_one_sentence(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "verdicts.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=re.escape(message)):
        load_verdicts(path, DIGEST)
    with pytest.raises(ValueError, match="No such file"):
        load_verdicts(tmp_path / "none.json", DIGEST)


def test_a_sheet_of_bad_items_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="row-a: pictures must be PNG"):
        ReviewItem(row_id="row-a", pictures=[b"GIF89a"], facts={}, fields={})
    twice = [ReviewItem(row_id="row-a", pictures=[], facts={}, fields={})] * 2
    with pytest.raises(ValueError, match="found row-a more often"):
        write_review(tmp_path / "page.html", twice, digest=DIGEST)
    unknown = [ReviewItem(row_id="row-a", pictures=[], facts={}, fields={"level.key": "x"})]
    with pytest.raises(ValueError, match="level"):
        write_review(tmp_path / "page.html", unknown, digest=DIGEST)


def test_marks_join_where_statements_overlap() -> None:
    assert marked("ab cd ef", ["cd ef", "B CD", "missing", ""]) == [("a", False), ("b cd ef", True)]
    assert marked("", ["x"]) == []
    assert marked("abc", []) == [("abc", False)]
