from adapters.artifacts.local import LocalArtifactStore
from adapters.package import read_package
from loadtest.bench.models import BLIP_SIZES
from loadtest.bench.worlds import random_world
from service.folders import HomeFolders, open_registry


def test_packages_may_share_their_weights_on_the_disk_and_are_different_adapters_all_the_same() -> None:
    names = [f"a-{number}" for number in range(6)]
    with random_world(BLIP_SIZES["tiny"]) as world:
        world.add_adapters(["own"], 4, seed=9)
        alone = world.disk_bytes()
        world.add_adapters(names, 4, num_weights=2)
        assert alone < world.disk_bytes() < 5 * alone
        registry = open_registry(world.settings)
        snapshot = registry.snapshot()
        registry.close()
        records = [snapshot.adapters[name][0] for name in names]
        assert [record.status for record in records] == ["ready"] * 6
        assert len({record.weights_digest for record in records}) == 6
        store = LocalArtifactStore(HomeFolders(world.settings.home).artifacts)
        weights = []
        for record in records:
            store.verify(record.package_digest)
            package = read_package(store.path(record.package_digest), dims=world.dims)
            assert (package.weights_digest, package.package_digest) == (record.weights_digest, record.package_digest)
            weights.append(package.tensors["adapters.0.down_proj.weight"])
        first, second, third, *_ = weights
        assert first.equal(third) and not first.equal(second)
