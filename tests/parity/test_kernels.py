"""Every claim holds under every kernel, in batches where slots of one size lie side by side and are asked the same."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from adapters.families import FAMILIES
from adapters.families.slots import Kernels, OneSlot
from adapters.products import has_onednn
from service.backbone.linear import FrozenLinear
from service.backbone.opt import Opt
from tests.devices import DEVICE
from tests.kernels import SERVED, SETTINGS, STACKED, settings_of, watching
from tests.parity.claims import Claims
from tests.parity.epalm.cases import read_sets
from tests.parity.epalm.claims import Claims as EPalmClaims
from tests.parity.epalm.serving import make_worlds
from tests.parity.serving import serve
from tests.parity.sets import OWN, WHOLE, Case, find_sets, read_set

CASES = [case for folder in find_sets("uniadapter") for case in read_set(folder)]


@pytest.mark.parametrize("name", [name for name in settings_of(DEVICE) if name != SERVED])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_every_claim_holds(case: Case, name: str, tmp_path: Path) -> None:
    """The case's own products all ran by the kernel that the setting is about: no comparison was of another one's."""
    setting = SETTINGS[name]
    with watching(setting) as watch:
        served = serve(case, tmp_path, setting=setting)
        found = [comparison for claimed in case.claimed for comparison in Claims(served).of(claimed)]
        found += Claims(served).companions()
    assert not [str(comparison) for comparison in found if not comparison.holds]
    assert served.metrics.registry.get_sample_value("bank_retried_batches_total") == 0
    for variant in (OWN, WHOLE):
        own = served.slot_tensors(variant)
        kernel = setting.only if setting.only != "grouped" or OneSlot(own).is_aligned else STACKED
        assert watch.of(own, is_word=False) == {kernel}
        assert kernel in watch.of(own, is_word=True) or not served.rows[variant].generate
    if setting.records:
        assert served.recordings is not None and not served.recordings.has_failed
        assert served.recorder is not None and bool(served.recorder.num_played) == bool(served.rows[OWN].generate)


def test_an_epalm_meets_no_kernel() -> None:
    """Its connectors run once a request, so that what it runs under is a language model packed or plain."""
    assert FAMILIES["epalm"].layer_maps() == ()


def test_every_claim_of_epalm_holds_on_a_plain_model() -> None:
    """On a packed one in `test_epalm`."""
    setting = SETTINGS["stacked, nothing packed"]
    assert SETTINGS[SERVED].packs and not setting.packs
    worlds = make_worlds(read_sets(), setting)
    with watching(setting) as watch:
        claims = [EPalmClaims(world, case) for world in worlds for case in world.cases]
        found = [comparison for own in claims for name in own.case.claimed for comparison in own.of(name)]
    assert not [str(comparison) for comparison in found if not comparison.holds]
    assert not watch.kernels and not any(weight.is_mkldnn for world in worlds for weight in _matrices(world.model))
    if has_onednn(DEVICE, torch.float32):
        assert any(weight.is_mkldnn for world in make_worlds(read_sets()) for weight in _matrices(world.model))


def test_every_claim_of_epalm_holds_when_words_are_recorded() -> None:
    (name,) = (name for name, setting in SETTINGS.items() if setting.records)
    worlds = make_worlds(read_sets(), SETTINGS[name])
    claims = [EPalmClaims(world, case) for world in worlds for case in world.cases]
    found = [comparison for own in claims for name in own.case.claimed for comparison in own.of(name)]
    assert not [str(comparison) for comparison in found if not comparison.holds]
    assert any(world.recording is not None and world.recording[1].num_played for world in worlds)
    assert not any(world.recording is not None and world.recording[0].has_failed for world in worlds)


def _matrices(model: Opt) -> Iterator[Tensor]:
    for module in model.modules():
        if isinstance(module, FrozenLinear):
            yield module.weight if module.packed is None else module.packed


def test_every_threshold_of_the_kernels_is_moved() -> None:
    """A kernel more has a threshold more, and needs a setting of its own."""
    for field in dataclasses.fields(Kernels):
        values = {getattr(setting.kernels, field.name) for setting in SETTINGS.values()}
        assert values - {field.default}, f"no setting of tests/kernels.py is about {field.name}"
