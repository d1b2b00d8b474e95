import json

import pytest

from loadtest.bench import decode, vision


def test_cached_and_uncached_decoding_write_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    decode.main(["--size", "tiny", "--tokens", "4", "--batch", "2", "--repeats", "1"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["equal"] and set(result["median_s"]) == {"cached", "uncached"}


def test_every_way_through_the_vision_tower_is_timed(capsys: pytest.CaptureFixture[str]) -> None:
    vision.main(["--size", "tiny", "--batch", "2", "--repeats", "1"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert "frozen" in result["median_s"] and len(result["median_s"]) == 5
