"""One engine over the small world's backbone, for tests that only run adapters on it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from service.backbone.base import Backbone
from service.backbone.folder import load_backbone
from service.pipelines.stage_set import AnyStages
from tests.service.lifecycle.packages import stages_of
from tests.service.worlds import World


@pytest.fixture(scope="session")
def backbone(world: World) -> Backbone:
    """Float32."""
    return world.backbone


@pytest.fixture(scope="session")
def folder(world: World) -> Path:
    """The folder of that backbone."""
    return world.settings.backbone_folder


@pytest.fixture(scope="session")
def stages(backbone: Backbone) -> Iterator[AnyStages]:
    """Slots for three adapters, of rank 4 and 8."""
    with stages_of(backbone) as stages:
        yield stages


@pytest.fixture(scope="session", params=["bfloat16", "float16"])
def lower(request: pytest.FixtureRequest, folder: Path) -> Iterator[AnyStages]:
    """The same backbone served in a lower precision."""
    with stages_of(load_backbone(folder, dtype=request.param)) as stages:
        yield stages
