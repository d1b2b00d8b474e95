"""The recorded results are those of the page that quotes them."""

import json
from pathlib import Path

from service.demo.evaluate import RECORDED, table

PAGE = Path(__file__).parents[3] / "docs" / "demo.md"


def test_the_page_shows_the_recorded_table() -> None:
    assert table(json.loads(RECORDED.read_text())) in PAGE.read_text()
