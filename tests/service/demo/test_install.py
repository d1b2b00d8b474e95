import json
from pathlib import Path

import pytest

from service.config import InvalidSettings, Settings
from service.demo.install import CLIPS_TASK, PICTURE_TASK, SOUND_TASK, curl_lines, demo_settings, media_folder
from service.demo.samples import ITEMS_FILE


@pytest.mark.parametrize("has_keys", [False, True])
def test_the_printed_lines_send_a_key_where_one_is_needed(tmp_path: Path, has_keys: bool) -> None:
    settings = Settings(home=tmp_path, api_keys="[]" if has_keys else None)
    item = {"file": "0.png", "question": "what shape", "answer": "circle", "caption": "a circle"}
    for task in (PICTURE_TASK, CLIPS_TASK, SOUND_TASK):
        media_folder(settings, task).mkdir(parents=True)
        (media_folder(settings, task) / ITEMS_FILE).write_text(json.dumps(item))
    for line in curl_lines("http://127.0.0.1:8000", settings):
        assert line.startswith("curl -s ") and " http://127.0.0.1:8000/" in line
        assert ('-H "Authorization: Bearer $BANK_API_KEY"' in line) == has_keys


@pytest.mark.parametrize("given", [{"backbone": "mine"}, {"backbones": "blip=mine,opt=other"}])
def test_the_demo_is_never_put_in_the_place_of_a_backbone_that_was_given(tmp_path: Path, given: dict[str, str]) -> None:
    with pytest.raises(InvalidSettings, match="brings its own backbone"):
        demo_settings(Settings.model_validate({"home": tmp_path} | given))
    home = tmp_path / "demo"
    folders = demo_settings(Settings(home=tmp_path)).backbone_folders
    assert folders == {"backbone": home / "backbone", "opt": home / "opt"}
