from pathlib import Path

from service.folders import push_folder, remove_abandoned_pushes


def test_a_push_under_way_is_kept_and_what_a_dead_one_left_is_removed(tmp_path: Path) -> None:
    dead = tmp_path / "adapter-bank-push-dead"
    dead.mkdir()
    (dead / ".lock").touch()
    (dead / "package.tar").write_bytes(b"half")
    with push_folder(tmp_path) as folder:
        remove_abandoned_pushes(tmp_path)
        assert folder.is_dir() and not dead.exists()
    assert list(tmp_path.iterdir()) == []
