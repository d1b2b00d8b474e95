"""Processes that die, freeze or run out of disk at the worst moments: nothing is lost, and nothing is half visible."""

import asyncio
import re
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from adapters.errors import RegistryUnavailable
from adapters.package import pack_tar, package_files, with_probe, write_files
from service.client import Client, ServiceError
from service.gallery.sources import Source
from service.home import build_gallery
from service.http.operator_schemas import OperationReply
from service.lifecycle.lifecycle import EXPIRY_S
from service.pipelines.galleries import BuildOptions
from tests.service.lifecycle.packages import Kind, package_of, probed, stages_of
from tests.service.lifecycle.replicas import WAIT_S, Cluster, Replica, until
from tests.service.worlds import World, picture

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def cluster(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(world, tmp_path_factory.mktemp("cluster")) as cluster:
        cluster.begin()
        yield cluster


@pytest.fixture
def pair(cluster: Cluster) -> tuple[Replica, Replica]:
    """Both replicas, running and up to date."""
    cluster.settle()
    return cluster.replicas[0], cluster.replicas[1]


@pytest.fixture(scope="module")
def packages(world: World, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Packages with probes, of which a server finds nothing wrong."""
    made = []
    with stages_of(world.backbone) as stages:
        for seed in range(5):
            package = probed(package_of(world.backbone, Kind(), seed=900 + seed), stages)
            assert package.probe is not None
            files = package_files(package.config, package.tensors, "# A test\n")
            made.append(tmp_path_factory.mktemp("probed") / "package")
            write_files(made[-1], with_probe(files, package.probe))
    return made


def versions(answers: list[Replica], name: str) -> list[int | None]:
    return [replica.ask(name).adapter.version for replica in answers]


# --- replicas that are killed ----------------------------------------------------------------------------------------


def test_a_push_whose_replica_dies_leaves_nothing_and_succeeds_elsewhere(
    cluster: Cluster, pair: tuple[Replica, Replica], packages: list[Path], tmp_path: Path
) -> None:
    first, second = pair
    stored = set((cluster.folder / "artifacts" / "sha256").iterdir())
    with (tmp_path / "package.tar").open("w+b") as file:
        pack_tar(packages[0], file)
        file.seek(0)
        data = file.read()
    address = httpx.URL(first.url)
    with socket.create_connection((address.host, address.port or 0)) as connection:
        head = f"PUT /v1/adapters/cut HTTP/1.1\r\nHost: {address.netloc.decode()}\r\n"
        head += f"Content-Type: application/x-tar\r\nContent-Length: {len(data)}\r\n\r\n"
        connection.sendall(head.encode() + data[: len(data) // 2])
        until(lambda: list(first.home.glob("adapter-bank-push-*/package.tar")))
        first.kill()
    cluster.begin()
    first.settle()
    assert not list(first.home.glob("adapter-bank-push-*"))
    assert "cut" not in cluster.registry.snapshot().adapters
    assert set((cluster.folder / "artifacts" / "sha256").iterdir()) == stored
    with second.client() as client:
        pushed = client.push(packages[0], "cut")
        assert client.wait(pushed.id, timeout_s=WAIT_S).status == "succeeded"
    assert second.ask("cut").adapter.version == 1


def test_what_a_dead_replica_was_validating_is_validated_by_another(
    cluster: Cluster, pair: tuple[Replica, Replica], packages: list[Path]
) -> None:
    first, second = pair
    dead = cluster.id_of(first)
    cluster.register("busy", seed=100)
    names = [f"staged-{number}" for number in range(len(packages))]
    second.freeze()  # so that all of them are the other one's
    with first.client() as client:
        for name, package in zip(names, packages, strict=True):
            client.push(package, name)

    def held() -> list[str]:
        return [v.key for v in cluster.registry.snapshot().versions if (v.status, v.validator) == ("validating", dead)]

    with Asking((first,), "busy"):  # what is validated waits for those who ask
        first.kill_while(held)
    orphans = held()
    second.thaw()
    cluster.begin()
    until(lambda: all(cluster.registry.snapshot().version(name, 1).status == "ready" for name in names))
    lines = cluster.registry.audit(limit=1000)
    for orphan in orphans:
        claims = [line.actor for line in lines if (line.action, line.subject) == ("validate", orphan)]
        assert claims[-1] == dead and claims[0] != dead
    assert all(cluster.registry.snapshot().aliases_of(name) == {"prod": 1} for name in names)


def test_a_promotion_whose_replica_dies_before_the_commit_is_carried_out(
    cluster: Cluster, pair: tuple[Replica, Replica]
) -> None:
    first, second = pair
    cluster.register("early", seed=101)
    cluster.register("early", seed=102)
    assert versions([first, second], "early") == [1, 1]
    with first.client() as client:
        second.freeze()  # so that it cannot be committed yet
        started = client.promote("early", 2, expect=1)
        until(lambda: cluster.rollout(started.id).ready)
        assert cluster.rollout(started.id).phase == "preparing"
        first.kill()
    cluster.begin()
    assert cluster.registry.snapshot().aliases_of("early") == {"prod": 1}
    second.thaw()
    until(lambda: cluster.rollout(started.id).phase == "committed")
    cluster.settle()
    assert versions([first, second], "early") == [2, 2]


def test_a_promotion_whose_replica_dies_right_after_the_commit_stands(
    cluster: Cluster, pair: tuple[Replica, Replica]
) -> None:
    first, second = pair
    cluster.register("late", seed=103)
    cluster.register("late", seed=104)
    with first.client() as client:
        started = client.promote("late", 2)
        first.kill_while(lambda: cluster.rollout(started.id).phase == "committed")
    cluster.begin()
    cluster.caught_up()
    assert second.ask("late").adapter.version == 2
    cluster.settle()
    assert versions([first, second], "late") == [2, 2]
    moves = [line for line in cluster.registry.audit(limit=1000) if line.subject == "late@prod" and line.after == "2"]
    assert [line.action for line in moves] == ["set_alias", "start_rollout"]


def build(cluster: Cluster, name: str, adapter: str, num_items: int) -> None:
    """Build a gallery as a command line does that shares the folder of galleries."""
    media = cluster.folder / f"media-{name}"
    media.mkdir()
    for number in range(num_items):
        (media / f"{number}.png").write_bytes(picture(number))
    sources = [Source(path.name, "image", path) for path in sorted(media.iterdir())]
    cluster.settings.home.mkdir(exist_ok=True)
    if not (cluster.settings.home / "galleries").exists():
        (cluster.settings.home / "galleries").symlink_to(cluster.folder / "galleries")
    asyncio.run(build_gallery(cluster.settings, name, adapter, sources, BuildOptions("image")))


def test_galleries_that_a_dead_replica_was_embedding_are_embedded_by_another(
    cluster: Cluster, pair: tuple[Replica, Replica]
) -> None:
    cluster.register("find", "retrieval", seed=105)
    build(cluster, "photos", "find", num_items=40)
    cluster.register("find", "retrieval", seed=106)
    with pair[0].client() as client:
        started = client.promote("find", 2)
    ids = {replica_id: url for url, replica_id in cluster.serving().items()}
    migrator = until(lambda: cluster.rollout(started.id).migrator)
    victim = next(replica for replica in pair if replica.url == ids[migrator])
    other = next(replica for replica in pair if replica is not victim)
    work = cluster.folder / "galleries" / "photos"
    victim.kill_while(lambda: cluster.rollout(started.id).phase == "migrating" and list(work.glob(".build-*")))
    assert other.search("photos").gallery_version == 1
    cluster.begin()
    until(lambda: not cluster.rollout(started.id).is_active)
    rollout = cluster.rollout(started.id)
    assert (rollout.phase, rollout.token > 1, rollout.migrator != migrator) == ("committed", True, True)
    cluster.settle()
    digest = cluster.registry.snapshot().version("find", 2).weights_digest
    for replica in pair:
        found = replica.search("photos")
        assert (found.adapter.digest, found.num_items) == (digest, 40)
    assert not list(work.glob(".build-*"))


# --- replicas that stand still ---------------------------------------------------------------------------------------


def test_a_replica_that_stood_still_answers_with_the_new_version_at_once(
    cluster: Cluster, pair: tuple[Replica, Replica]
) -> None:
    first, second = pair
    cluster.register("still", seed=107)
    cluster.register("still", seed=108)
    cluster.register("seek", "retrieval", seed=109)
    build(cluster, "stills", "seek", num_items=4)
    cluster.register("seek", "retrieval", seed=110)
    cluster.settle()
    assert first.ask("still").adapter.version == 1
    assert first.search("stills").gallery_version == 1
    first.freeze()
    began = time.monotonic()
    with second.client() as client:
        started = [client.promote("still", 2), client.promote("seek", 2)]
        assert all(cluster.id_of(first) in cluster.rollout(operation.id).required for operation in started)
    until(lambda: all(cluster.rollout(operation.id).phase == "committed" for operation in started))
    assert time.monotonic() - began > EXPIRY_S / 2
    with ThreadPoolExecutor(2) as threads:  # they wait at its door while it stands still
        answer, found = threads.submit(first.ask, "still"), threads.submit(first.search, "stills")
        time.sleep(0.3)
        first.thaw()
        assert answer.result().adapter.version == 2
        assert found.result().gallery_version == cluster.registry.snapshot().live_version("stills") == 2


# --- a registry that is away -----------------------------------------------------------------------------------------


class Asking:
    """Somebody who asks replicas all the time; how long each answer took, and what went wrong."""

    def __init__(self, replicas: tuple[Replica, ...], adapter: str) -> None:
        self.seconds: list[float] = []
        self.failures: list[BaseException] = []
        self._adapter = adapter
        self._is_over = threading.Event()
        self._threads = [threading.Thread(target=self._ask_on, args=(replica,)) for replica in replicas]

    def __enter__(self) -> "Asking":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join(WAIT_S)

    def _ask_on(self, replica: Replica) -> None:
        while not self._is_over.wait(0.05):
            start = time.monotonic()
            try:
                assert replica.ask(self._adapter).adapter.version == 1
            except BaseException as error:
                self.failures.append(error)
            self.seconds.append(time.monotonic() - start)


def refusal(replica: Replica, name: str, version: int) -> str | None:
    """The code with which a write is refused; None when it is not. The write would be refused anyway."""
    reply = httpx.post(f"{replica.url}/v1/adapters/{name}/versions/{version}/retire", timeout=WAIT_S)
    if reply.status_code == 409:  # an alias names it
        return None
    assert reply.status_code == 503 and reply.headers["Retry-After"]
    code: str = reply.json()["error"]["code"]
    return code


def registry_up(replica: Replica) -> float:
    found = re.search(r"^bank_registry_up (\S+)$", replica.get("/metrics").text, re.MULTILINE)
    assert found is not None
    return float(found[1])


def registry_error(replica: Replica) -> str | None:
    ready = replica.get("/health/ready")
    assert ready.status_code == 200
    error: str | None = ready.json()["registry_error"]
    return error


def test_a_registry_that_came_back_empty_is_restored_by_its_replicas(
    cluster: Cluster, pair: tuple[Replica, Replica]
) -> None:
    cluster.register("kept", seed=111)
    cluster.register("kept", seed=112)
    cluster.settle()
    before = cluster.registry.snapshot()
    lines = cluster.registry.audit(limit=10_000)
    with Asking(pair, "kept") as asking:
        cluster.redis.kill()
        until(lambda: all(registry_error(replica) and registry_up(replica) == 0 for replica in pair))
        assert [refusal(replica, "kept", 1) for replica in pair] == ["registry_unavailable"] * 2
        cluster.redis.erase()
        cluster.redis.start()
        assert [refusal(replica, "kept", 1) for replica in pair] == ["registry_lost"] * 2

        def is_back() -> bool:
            try:
                return cluster.registry.snapshot().revision.epoch != before.revision.epoch
            except RegistryUnavailable:
                return False

        until(is_back)
        until(lambda: all(registry_error(replica) is None and registry_up(replica) == 1 for replica in pair))
    assert asking.seconds and not asking.failures
    after = cluster.registry.snapshot()
    assert after.records == before.records
    restored, *kept = cluster.registry.audit(limit=10_000)
    assert restored.action == "restore" and tuple(kept) == lines
    with pair[0].client() as client:
        assert client.wait(client.promote("kept", 2, expect=1).id, timeout_s=WAIT_S).status == "succeeded"
    cluster.caught_up()
    assert versions(list(pair), "kept") == [2, 2]


def test_a_registry_that_hangs_holds_nobody_up(cluster: Cluster, pair: tuple[Replica, Replica]) -> None:
    first, _ = pair
    cluster.register("steady", seed=113)
    cluster.settle()
    assert versions(list(pair), "steady") == [1, 1]
    with Asking(pair, "steady") as asking, ThreadPoolExecutor(12) as threads:
        cluster.redis.pause()
        try:
            until(lambda: all(registry_error(replica) and registry_up(replica) == 0 for replica in pair))
            asking.seconds.clear()
            unknown = [threads.submit(first.get, "/v1/adapters/nobody") for _ in range(12)]
            assert refusal(first, "steady", 1) == "registry_unavailable"
            assert {reply.result().status_code for reply in unknown} == {404}
        finally:
            cluster.redis.resume()
        until(lambda: all(registry_error(replica) is None and registry_up(replica) == 1 for replica in pair))
    assert not asking.failures
    assert asking.seconds and max(asking.seconds) < 5, asking.seconds
    assert refusal(first, "steady", 1) is None


# --- a disk that is full ---------------------------------------------------------------------------------------------


def test_a_push_that_finds_no_room_leaves_nothing(
    cluster: Cluster, pair: tuple[Replica, Replica], packages: list[Path]
) -> None:
    first, _ = pair
    first.limit_files(10_000)
    with first.client() as client:
        with pytest.raises(ServiceError) as refused:
            client.push(packages[0], "roomless")
        assert (refused.value.status, refused.value.code) == (507, "insufficient_room")
        assert "roomless" not in cluster.registry.snapshot().adapters
        assert not list(first.home.glob("adapter-bank-push-*"))
        first.limit_files(None)
        assert client.wait(client.push(packages[0], "roomless").id, timeout_s=WAIT_S).status == "succeeded"


def test_an_artifact_that_does_not_fit_is_not_registered(cluster: Cluster, packages: list[Path]) -> None:
    (cluster.folder / "full").mkdir()
    mount = 'mount -t tmpfs -o size=16k tmpfs "$0" && exec "$@"'
    wrapper = ("unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount, str(cluster.folder / "full"))
    if shutil.which("unshare") is None or subprocess.run([*wrapper, "true"], capture_output=True).returncode != 0:
        pytest.skip("no file system of one's own can be mounted here")
    url = f"{cluster.redis.url}?namespace=full"
    replica = cluster.replica("c", wrapper=wrapper, artifacts_url=cluster.folder / "full", registry_url=url)
    replica.start()
    replica.settle()
    try:
        with replica.client() as client, pytest.raises(ServiceError) as refused:
            client.push(packages[0], "roomless")
        assert (refused.value.status, refused.value.code) == (503, "artifact_unavailable")
        assert "No space left on device" in refused.value.message
        assert replica.get("/v1/adapters").json()["adapters"] == []
        assert not list(replica.home.glob("adapter-bank-push-*"))
        below = Path(f"/proc/{replica.process.pid}/root{cluster.folder / 'full'}")
        assert [path.name for path in below.rglob("*")] == ["sha256"]
    finally:
        replica.stop()


# --- operators who do the same thing twice ---------------------------------------------------------------------------


def test_of_two_operators_who_promote_at_once_one_is_told_what_the_other_does(
    cluster: Cluster, pair: tuple[Replica, Replica]
) -> None:
    for seed in (114, 115, 116):
        cluster.register("wanted", seed=seed)

    def promote(replica: Replica, version: int) -> OperationReply | ServiceError:
        with Client(replica.url, timeout_s=WAIT_S) as client:
            try:
                return client.promote("wanted", version, expect=1)
            except ServiceError as error:
                return error

    with ThreadPoolExecutor(2) as threads:
        outcomes = list(threads.map(promote, pair, (2, 3)))
    (won,) = (outcome for outcome in outcomes if isinstance(outcome, OperationReply))
    (lost,) = (outcome for outcome in outcomes if isinstance(outcome, ServiceError))
    assert (lost.status, lost.code) == (409, "conflict")
    on_its_way = f"wanted@prod is on its way to version {won.to_version} (operation {won.id}"
    assert on_its_way in lost.message or f"wanted@prod names version {won.to_version}, not version 1" in lost.message
    until(lambda: cluster.rollout(won.id).phase == "committed")
    assert cluster.registry.snapshot().aliases_of("wanted") == {"prod": won.to_version}


def test_a_rollback_that_is_sent_twice_goes_back_once(cluster: Cluster, pair: tuple[Replica, Replica]) -> None:
    first, second = pair
    for seed in (117, 118, 119):
        cluster.register("back", seed=seed)
    with first.client() as one, second.client() as two:
        for version in (2, 3):
            assert one.wait(one.promote("back", version).id, timeout_s=WAIT_S).status == "succeeded"
        sent = one.roll_back("back", key="again")
        assert (sent.from_version, sent.to_version) == (3, 2)
        again = two.roll_back("back", key="again")
        assert (again.id, again.to_version, cluster.registry.snapshot().aliases_of("back")) == (sent.id, 2, {"prod": 2})
        with pytest.raises(ServiceError, match="names version 2, not version 3 as expected"):
            two.roll_back("back", expect=3)
        assert one.roll_back("back", expect=2).to_version == 1
        with pytest.raises(ServiceError, match="names version 1, not version 2 as expected"):
            two.roll_back("back", expect=2)
    cluster.caught_up()
    assert versions([first, second], "back") == [1, 1]
