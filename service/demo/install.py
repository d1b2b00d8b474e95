"""Put the shipped demo into a home folder: backbones, adapters, sample media, and galleries of drawn clips and captions."""

import io
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from adapters.errors import BackboneNotFound
from adapters.registry import DEFAULT_ALIAS
from service.backbone.folder import load_manifest
from service.config import CLIENT_KEY_VARIABLE, InvalidSettings, Settings
from service.demo.recipes import ASSETS
from service.demo.samples import ITEMS_FILE, write_samples
from service.demo.world import TASKS
from service.folders import open_registry
from service.gallery.sources import read_sources
from service.home import push_package
from service.pipelines.galleries import BuildOptions
from service.runtime import Runtime
from service.types import RequestContext

CLIPS_TASK, PICTURE_TASK, SOUND_TASK = "demo-video-retrieval", "demo-image-vqa", "demo-epalm-audio-caption"
CLIPS_GALLERY, CAPTIONS_GALLERY = "demo-clips", "demo-captions"
NUM_DRAWN = {CLIPS_TASK: 240, PICTURE_TASK: 8, "demo-epalm-video-qa": 8, SOUND_TASK: 8}
SEED = 7
BACKBONES = ("backbone", "opt")  # folders of the assets and of the home; the first is the default
BUILD_TIMEOUT_S = 3600.0


def demo_settings(settings: Settings) -> Settings:
    """The settings to serve the demo with: a home and backbones of its own.

    Raises: InvalidSettings for backbones that are not the demo's.
    """
    if settings.backbone is not None or settings.backbones is not None:
        raise InvalidSettings("the demo brings its own backbones; give none beside it", param="backbone")
    home = settings.home / "demo"
    folders = ",".join(f"{name}={home / name}" for name in BACKBONES)
    return Settings.model_validate(settings.model_dump() | {"home": home, "backbones": folders})


async def install(settings: Settings, say: Callable[[str], None]) -> None:
    """Install or update the demo in `settings.home`; what is there already is left as it is. `say` tells what takes long."""
    missing = missing_assets()
    if missing:
        raise BackboneNotFound(
            f"this checkout lacks the demo's trained weights ({', '.join(missing)}); `make demo` trains them"
        )
    settings.home.mkdir(parents=True, exist_ok=True)
    for name, folder in settings.backbone_folders.items():
        _install_backbone(ASSETS / name, folder)
    for task in TASKS:
        _install_adapter(settings, task)
    _draw(settings, say)
    await _build_galleries(settings, say)


def missing_assets() -> list[str]:
    """Which of the demo's weights are not beside the code."""
    files = {name: ASSETS / name / "backbone.json" for name in BACKBONES}
    files |= {task: ASSETS / "adapters" / task / "adapter_config.json" for task in TASKS}
    return [name for name, file in files.items() if not file.exists()]


def _install_backbone(source: Path, target: Path) -> None:
    if (target / "backbone.json").exists() and load_manifest(target).parts == load_manifest(source).parts:
        return
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)


def _install_adapter(settings: Settings, task: str) -> None:
    """Push the shipped package; the same bytes give the same version, and `prod` follows new ones."""
    record = push_package(settings, ASSETS / "adapters" / task, task)
    registry = open_registry(settings)
    try:
        registry.set_alias(task, DEFAULT_ALIAS, record.version, actor="demo")
    finally:
        registry.close()


def media_folder(settings: Settings, task: str) -> Path:
    """Where the demo's drawn media of a task are."""
    return settings.home / "media" / task


def _draw(settings: Settings, say: Callable[[str], None]) -> None:
    for task, num_items in NUM_DRAWN.items():
        folder = media_folder(settings, task)
        if not (folder / ITEMS_FILE).exists():
            say(f"drawing {num_items} items of {task} ...")
            write_samples(task, SEED, num_items, folder)


async def _build_galleries(settings: Settings, say: Callable[[str], None]) -> None:
    """Build what is missing, or was embedded with another version of the adapter."""
    registry = open_registry(settings)
    try:
        snapshot = registry.snapshot()
    finally:
        registry.close()
    wanted = next(
        r for r in snapshot.adapters[CLIPS_TASK] if r.version == snapshot.aliases_of(CLIPS_TASK)[DEFAULT_ALIAS]
    )
    made_with = {head.name: snapshot.gallery(head.name).adapter for head in snapshot.heads if head.live is not None}
    missing = [n for n in (CLIPS_GALLERY, CAPTIONS_GALLERY) if made_with.get(n) != wanted.weights_digest]
    if not missing:
        return
    manifests = _write_manifests(media_folder(settings, CLIPS_TASK))
    runtime = Runtime(settings)
    await runtime.start()
    try:
        for name in missing:
            sources = read_sources(manifests[name])
            say(f"embedding gallery {name}: {len(sources)} items ...")
            context = RequestContext(deadline=time.monotonic() + BUILD_TIMEOUT_S, client="demo")
            await runtime.galleries.build(name, CLIPS_TASK, sources, BuildOptions(sources[0].kind), context)
    finally:
        await runtime.close()


def _write_manifests(folder: Path) -> dict[str, Path]:
    """The galleries' manifests beside the clips: the clips with their captions, and the captions alone."""
    items = [json.loads(line) for line in (folder / ITEMS_FILE).read_text().splitlines()]
    clips = [{"id": i["file"], "file": i["file"], "caption": i["caption"]} for i in items]
    captions = [{"id": f"caption-of-{i['file']}", "text": i["caption"], "metadata": {"clip": i["file"]}} for i in items]
    paths = {CLIPS_GALLERY: folder / "clips.jsonl", CAPTIONS_GALLERY: folder / "captions.jsonl"}
    for path, lines in ((paths[CLIPS_GALLERY], clips), (paths[CAPTIONS_GALLERY], captions)):
        text = io.StringIO()
        for line in lines:
            text.write(json.dumps(line) + "\n")
        path.write_text(text.getvalue())
    return paths


def curl_lines(url: str, settings: Settings) -> list[str]:
    """Commands that work as printed: a question about a picture, a search of clips, and a sound put into words.

    A server with keys wants one in the variable that our client asks, too.
    """
    has_keys = settings.api_keys is not None or settings.api_keys_file is not None
    curl = f'curl -s -H "Authorization: Bearer ${CLIENT_KEY_VARIABLE}"' if has_keys else "curl -s"
    asked, told, heard = (_first_item(settings, task) for task in (PICTURE_TASK, CLIPS_TASK, SOUND_TASK))
    pictures, sounds = media_folder(settings, PICTURE_TASK), media_folder(settings, SOUND_TASK)
    question = json.dumps({"adapter": PICTURE_TASK, "question": asked["question"], "decode": {"mode": "rank"}})
    search = json.dumps({"gallery": CLIPS_GALLERY, "query": {"text": told["caption"]}, "k": 3, "rerank": "match"})
    return [
        f"{curl} {url}/vqa -F 'request={question}' -F 'image=@{pictures / asked['file']}'"
        f"    # right answer: {asked['answer']}",
        f"{curl} {url}/retrieve -H 'content-type: application/json' -d '{search}'    # right clip: {told['file']}",
        f"{curl} {url}/caption -F 'request={json.dumps({'adapter': SOUND_TASK})}' -F 'audio=@{sounds / heard['file']}'"
        f"    # right caption: {heard['caption']}",
    ]


def _first_item(settings: Settings, task: str) -> dict[str, str]:
    lines = (media_folder(settings, task) / ITEMS_FILE).read_text().splitlines()
    item: dict[str, str] = json.loads(lines[0])
    return item
