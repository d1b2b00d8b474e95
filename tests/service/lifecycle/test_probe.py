"""What a probe's outputs are made of: the inputs reach every part, jobs run alone in the background, and leave no trace."""

import asyncio
from dataclasses import replace

import pytest
import torch

from adapters.config import BASE_ADAPTER
from adapters.errors import NonFiniteTensor
from adapters.package import Package
from service.backbone.base import Backbone
from service.lifecycle.probe import LOWEST_PROBABILITY, Outputs, check_inputs, inputs_for, lodged, outputs_of
from service.loader import Pin
from service.pipelines.stage_set import AnyStages
from service.types import BASE_INFO, RequestContext, StageOutput
from tests.service.lifecycle.packages import KINDS, package_of, stages_of
from tests.service.test_bank import holders
from tests.service.worlds import context


def outputs(name: str, backbone: Backbone, stages: AnyStages, request: RequestContext, **changes: bool) -> Outputs:
    """What a kind gives, asked by a request; with other options of the pipeline than the package has, where given."""
    package = package_of(backbone, KINDS[name])
    config = package.config.model_copy(update={"options": {**package.config.options, **changes}})

    async def story() -> Outputs:
        async with lodged(package, stages) as pin:
            return await outputs_of(inputs_for(config, backbone), config, pin, stages, request)

    return asyncio.run(story())


@pytest.mark.parametrize("name", KINDS)
def test_inputs_fit_the_backbone_they_are_drawn_for(name: str, backbone: Backbone) -> None:
    config = KINDS[name].config(backbone)
    inputs = inputs_for(config, backbone)
    check_inputs(inputs, config, backbone)
    special = set(backbone.config.special_ids.model_dump().values())
    assert not {word for row in (*inputs.texts(), *inputs.answers()) for word in row[1:-1]} & special


@pytest.mark.parametrize("name", ["retrieval-frames", "retrieval-frames-kv-heads"])
def test_frames_weigh_differently_in_a_probe(name: str, backbone: Backbone, stages: AnyStages) -> None:
    weighed = outputs(name, backbone, stages, context())
    unweighed = outputs(name, backbone, stages, context(), frame_aware_attention=False)
    assert torch.equal(weighed["frames"], unweighed["frames"])
    assert float((weighed["match"] - unweighed["match"]).abs().max()) > 1e-5


def test_scores_stand_at_the_places_of_their_answers(backbone: Backbone, stages: AnyStages) -> None:
    """A ranking gives the likeliest first; reversed candidates give the same numbers reversed."""
    package = package_of(backbone, KINDS["vqa"])
    inputs = inputs_for(package.config, backbone)
    assert inputs.answer_ids is not None
    backwards = replace(inputs, answer_ids=inputs.answer_ids.flip(0))

    async def story() -> list[Outputs]:
        async with lodged(package, stages) as pin:
            return [await outputs_of(each, package.config, pin, stages, context()) for each in (inputs, backwards)]

    forth, back = asyncio.run(story())
    for name in ("scores", "first_words"):
        torch.testing.assert_close(forth[name], back[name].flip(1), rtol=1e-5, atol=1e-5)
        assert len(set(forth[name].flatten().tolist())) == forth[name].numel()


def test_an_answer_too_unlikely_for_float32_has_a_finite_logarithm(backbone: Backbone, stages: AnyStages) -> None:
    package = package_of(backbone, KINDS["vqa"])
    certain = {n: t * (1e4 if "cross_modal.bias" in n else 1.0) for n, t in package.tensors.items()}
    found = asyncio.run(_outputs(replace(package, tensors=certain), backbone, stages))
    assert bool(torch.isfinite(found["first_words"]).all())
    assert float(found["first_words"].min()) >= torch.tensor(LOWEST_PROBABILITY).log().item() - 1e-3


def test_a_probe_runs_on_the_adapter_as_it_is_served(backbone: Backbone, stages: AnyStages) -> None:
    """Laid out as requests will meet it: what is checked is what will run."""
    package = package_of(backbone, KINDS["vqa"])

    async def story() -> None:
        async with lodged(package, stages) as pin:
            served, lodging = stages.bank.fold(package).tensors, stages.bank.adapter(pin.digest).tensors
            assert {name: tensor.stride() for name, tensor in lodging.items()} == {
                name: tensor.stride() for name, tensor in served.items()
            }

    asyncio.run(story())


async def _outputs(package: Package, backbone: Backbone, stages: AnyStages) -> Outputs:
    async with lodged(package, stages) as pin:
        return await outputs_of(inputs_for(package.config, backbone), package.config, pin, stages, context())


@pytest.mark.parametrize("name", ["vqa-kv", "retrieval-frames-kv-heads"])
def test_two_runs_alone_agree_to_the_bit(name: str, backbone: Backbone, stages: AnyStages) -> None:
    request = context(background=True, alone=True)
    one, two = (outputs(name, backbone, stages, request) for _ in range(2))
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_jobs_that_run_alone_give_what_they_give_in_company(backbone: Backbone, stages: AnyStages) -> None:
    alone = outputs("retrieval-frames", backbone, stages, context(alone=True))
    together = outputs("retrieval-frames", backbone, stages, context())
    for key, output in alone.items():
        torch.testing.assert_close(output, together[key], rtol=1e-5, atol=1e-5)


def test_every_job_of_a_lone_request_is_a_batch_of_its_own(backbone: Backbone) -> None:
    with stages_of(backbone) as stages:
        inputs = inputs_for(KINDS["retrieval"].config(backbone), backbone)
        base = Pin(BASE_INFO, BASE_ADAPTER, None)

        async def story(request: RequestContext) -> list[StageOutput]:
            texts = [stages.text(ids, base, request) for ids in inputs.texts() * 8]
            return list(await asyncio.gather(*texts))

        def num_batches() -> float:
            registry = stages.engine._metrics.registry
            return registry.get_sample_value("bank_batch_jobs_count", {"stage": "text"}) or 0.0

        asyncio.run(story(context(alone=True)))
        assert num_batches() == 16


def test_an_adapter_lodges_under_a_name_of_its_own_and_leaves(backbone: Backbone, stages: AnyStages) -> None:
    package = package_of(backbone, KINDS["vqa"])
    bank = stages.bank

    async def story() -> None:
        async with lodged(package, stages) as one, lodged(package, stages) as two:
            assert one.digest != two.digest
            assert not one.digest.startswith("sha256:")
            assert holders(bank) == 2 and {one.digest, two.digest} <= bank.residency()["host"].keys()
            await outputs_of(inputs_for(package.config, backbone), package.config, one, stages, context())
            assert one.digest in bank.residency()["device"]
        assert not {one.digest, two.digest} & {*bank.residency()["host"], *bank.residency()["device"]}

    asyncio.run(story())
    assert holders(bank) == 0


def test_an_adapter_the_dtype_cannot_hold_does_not_lodge(backbone: Backbone, lower: AnyStages) -> None:
    package = package_of(backbone, KINDS["vqa"])
    huge = replace(package, tensors={name: 1e6 * tensor for name, tensor in package.tensors.items()})

    async def story() -> None:
        async with lodged(huge, lower):
            pass

    if lower.backbone.dtype == torch.bfloat16:
        asyncio.run(story())
    else:
        with pytest.raises(NonFiniteTensor, match="float16"):
            asyncio.run(story())
    assert holders(lower.bank) == 0
