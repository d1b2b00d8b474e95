import asyncio
import errno
import gc
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from concurrent.futures import Future
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from service.errors import CorruptMedia, MediaTimeout, MediaTooLarge, NotReady, Overloaded, UnsupportedMedia
from service.media import MediaLimits, MediaWorkers, Preprocessing, decode_image, decode_video, thumbnail
from tests.service.media import tasks
from tests.service.media.clips import make_clip

PREP = Preprocessing(48)
REPOSITORY = Path(__file__).parents[3]
PATIENCE_S = 60.0  # for what must happen, on however slow a machine


@pytest.fixture(scope="module")
def pool() -> Iterator[MediaWorkers]:
    """One worker that lives through the module, unless a test kills it."""
    with MediaWorkers(1) as workers:
        workers.start()
        yield workers


def picture() -> bytes:
    file = BytesIO()
    Image.linear_gradient("L").resize((80, 60)).convert("RGB").save(file, "PNG")
    return file.getvalue()


def is_alive(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


def wait_until(condition: Any) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.01)


def num_open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_a_worker_gives_what_a_direct_call_gives(pool: MediaWorkers) -> None:
    clip = make_clip(num_frames=10)

    async def decode_all() -> tuple[Any, Any, Any]:
        return await asyncio.gather(pool.image(picture(), PREP), pool.video(clip, PREP, 3), pool.thumbnail(clip, 64))

    pixels, video, small = asyncio.run(decode_all())
    assert (pixels == decode_image(picture(), PREP)).all()
    expected = decode_video(clip, PREP, 3)
    assert (video.frames == expected.frames).all()
    assert (video.times_s, video.duration_s) == (expected.times_s, expected.duration_s)
    assert small == thumbnail(clip, 64)
    assert pool.call_sync(thumbnail, clip, size=64) == small


def test_refusals_arrive_with_their_class_and_message(pool: MediaWorkers) -> None:
    with pytest.raises(UnsupportedMedia, match="not a JPEG") as caught:
        asyncio.run(pool.image(b"text", PREP))
    assert caught.value.message.startswith("not a JPEG")
    with pytest.raises(CorruptMedia):
        asyncio.run(pool.image(picture()[:60], PREP))


def test_the_limits_of_the_pool_hold() -> None:
    with MediaWorkers(1, MediaLimits(max_pixels=80 * 60 - 1)) as workers, pytest.raises(MediaTooLarge):
        asyncio.run(workers.image(picture(), PREP))


def test_paths_are_read_in_the_worker(pool: MediaWorkers, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture())
    assert (asyncio.run(pool.image(tmp_path / "a.png", PREP)) == decode_image(picture(), PREP)).all()


def test_large_arrays_arrive_whole_and_writable(pool: MediaWorkers) -> None:
    sent = [
        np.random.default_rng(0).integers(0, 255, 30_000_001).astype(np.uint8),
        np.arange(5.0)[::-1],
        np.empty((0, 3)),
    ]
    received = pool.call_sync(tasks.echo, sent)
    for before, after in zip(sent, received, strict=True):
        assert (before == after).all()
    received[0][0] = 1
    first = pool.call_sync(tasks.arrays, 2, 1000)
    second = pool.call_sync(tasks.arrays, 1, 500_000)
    assert (first[1] == 1).all()  # not overwritten by the next answer
    assert (second[0] == 0).all()


def test_calls_leave_nothing_open(pool: MediaWorkers) -> None:
    pool.call_sync(tasks.pid)
    shared, before = set(os.listdir("/dev/shm")), num_open_files()
    for _ in range(20):
        pool.call_sync(tasks.arrays, 3, 100_000)
    assert num_open_files() == before
    wait_until(lambda: set(os.listdir("/dev/shm")) <= shared)  # other processes' come and go


def test_a_worker_imports_little(pool: MediaWorkers) -> None:
    with MediaWorkers(1) as fresh:
        modules = fresh.call_sync(tasks.loaded_modules)
    assert {"av", "PIL", "numpy"} <= modules
    assert not modules & {"torch", "transformers", "fastapi", "redis", "faiss", "pytest", "asyncio"}


def test_a_hung_call_times_out_and_only_that_call(tmp_path: Path) -> None:
    with MediaWorkers(2, MediaLimits(timeout_s=4.0)) as workers:
        workers.start()
        hung = workers.submit(tasks.spin_deaf)
        others = [workers.submit(tasks.sleep, 0.01) for _ in range(20)]
        pids = {other.result(PATIENCE_S) for other in others}
        assert not hung.done()
        with pytest.raises(MediaTimeout, match="longer than 4 s"):
            hung.result(PATIENCE_S)
        survivor = pids.pop()
        assert not pids
        holders = [workers.submit(tasks.meet, tmp_path, 2) for _ in range(2)]
        both = {holder.result(PATIENCE_S) for holder in holders}
        assert survivor in both
        assert len(both) == 2  # the killed one was replaced


def test_a_call_may_time_out_while_it_is_awaited() -> None:
    async def run(workers: MediaWorkers) -> None:
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                ticks += 1
                await asyncio.sleep(0.01)

        ticker = asyncio.create_task(tick())
        with pytest.raises(MediaTimeout):
            await workers.call(tasks.spin_deaf)
        ticker.cancel()
        assert ticks > 3  # the event loop went on

    with MediaWorkers(1, MediaLimits(timeout_s=0.5)) as workers:
        workers.start()
        asyncio.run(run(workers))


@pytest.mark.parametrize(
    ("function", "argument", "error"),
    [
        (tasks.leave, 3, CorruptMedia),
        (tasks.leave, 0, CorruptMedia),
        (tasks.die_by, signal.SIGSEGV, CorruptMedia),
        (tasks.die_by, signal.SIGABRT, CorruptMedia),
        (tasks.die_by, signal.SIGKILL, MediaTooLarge),  # what the kernel sends when memory runs out
    ],
)
def test_a_crash_costs_its_own_call(pool: MediaWorkers, function: Any, argument: int, error: type[Exception]) -> None:
    before, num_files = pool.call_sync(tasks.pid), num_open_files()
    crashing = pool.submit(function, argument)
    following = pool.submit(tasks.pid)
    with pytest.raises(error) as caught:
        crashing.result(PATIENCE_S)
    assert caught.value.worker_died  # type: ignore[attr-defined]
    after = following.result(PATIENCE_S)
    assert after != before
    assert not is_alive(before)
    assert num_open_files() == num_files


def test_a_worker_killed_while_idle_is_replaced(pool: MediaWorkers) -> None:
    before = pool.call_sync(tasks.pid)
    os.kill(before, signal.SIGKILL)
    wait_until(lambda: not is_alive(before))
    assert pool.call_sync(tasks.pid) != before


def test_memory_is_limited(pool: MediaWorkers) -> None:
    before = pool.call_sync(tasks.pid)
    with pytest.raises(MediaTooLarge, match="memory") as caught:
        pool.call_sync(tasks.allocate, 10 * 2**30)
    assert not caught.value.worker_died
    assert pool.call_sync(tasks.allocate, 2**20) == 2**20
    assert pool.call_sync(tasks.pid) == before


def test_a_picture_that_needs_too_much_memory_is_too_large() -> None:
    file = BytesIO()
    Image.new("L", (9_000, 9_000)).save(file, "PNG")
    roomy = MediaLimits(max_pixels=10**8, memory_bytes=300 * 2**20)
    with MediaWorkers(1, roomy) as workers, pytest.raises(MediaTooLarge):
        asyncio.run(workers.image(file.getvalue(), PREP))


def test_signals_of_the_terminal_do_not_end_a_worker(pool: MediaWorkers) -> None:
    worker = pool.call_sync(tasks.pid)
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(worker, number)
    assert pool.call_sync(tasks.pid) == worker


def test_errors_of_the_function_arrive_with_its_traceback(pool: MediaWorkers) -> None:
    with pytest.raises(ValueError, match="seven") as caught:
        pool.call_sync(tasks.fail, "seven")
    assert "in fail" in caught.value.__notes__[0]
    with pytest.raises(RuntimeError, match="Unportable"):
        pool.call_sync(tasks.fail_unportably)


def test_what_cannot_be_pickled_fails_alone(pool: MediaWorkers) -> None:
    before = pool.call_sync(tasks.pid)
    with pytest.raises(Exception, match="pickle"):
        pool.call_sync(tasks.echo, test_what_cannot_be_pickled_fails_alone.__code__)
    with pytest.raises(Exception, match="pickle"):
        pool.call_sync(tasks.return_unpicklable)
    assert pool.call_sync(tasks.pid) == before


def hold(workers: MediaWorkers, folder: Path) -> "Future[None]":
    """Occupy one worker until `folder / "go"` exists."""
    held = workers.submit(tasks.wait_for_after, folder / "begun", folder / "go")
    wait_until((folder / "begun").exists)
    return held


def test_a_cancelled_call_is_dropped_from_the_queue(pool: MediaWorkers, tmp_path: Path) -> None:
    async def run() -> None:
        dropped = asyncio.create_task(pool.call(tasks.touch, tmp_path / "dropped"))
        kept = asyncio.create_task(pool.call(tasks.touch, tmp_path / "kept"))
        await asyncio.sleep(0)
        dropped.cancel()
        with pytest.raises(asyncio.CancelledError):
            await dropped
        (tmp_path / "go").touch()
        await kept

    held = hold(pool, tmp_path)
    asyncio.run(run())
    held.result(PATIENCE_S)
    assert (tmp_path / "kept").exists()
    assert not (tmp_path / "dropped").exists()


def test_a_running_call_survives_its_callers_cancellation(pool: MediaWorkers, tmp_path: Path) -> None:
    before = pool.call_sync(tasks.pid)

    async def run() -> None:
        running = asyncio.create_task(pool.call(tasks.wait_for_after, tmp_path / "begun", tmp_path / "go"))
        while not (tmp_path / "begun").exists():
            await asyncio.sleep(0.01)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        (tmp_path / "go").touch()

    asyncio.run(run())
    assert pool.call_sync(tasks.pid) == before


def test_a_full_queue_refuses_until_calls_are_cancelled(tmp_path: Path) -> None:
    with MediaWorkers(1, max_queued=2) as workers:
        held = hold(workers, tmp_path)
        first, second = workers.submit(tasks.pid), workers.submit(tasks.pid)
        with pytest.raises(Overloaded) as caught:
            workers.submit(tasks.pid)
        assert caught.value.retry_after_s > 0
        assert first.cancel()
        third = workers.submit(tasks.pid)
        (tmp_path / "go").touch()
        assert second.result(PATIENCE_S) == third.result(PATIENCE_S)
        held.result(PATIENCE_S)


def test_close_ends_everything(tmp_path: Path) -> None:
    gc.collect()
    num_files = num_open_files()
    workers = MediaWorkers(2)
    workers.start()
    pids = {future.result(PATIENCE_S) for future in [workers.submit(tasks.meet, tmp_path, 2) for _ in range(2)]}
    running = [workers.submit(tasks.spin_deaf) for _ in range(2)]
    wait_until(lambda: all(future.running() for future in running))
    queued = workers.submit(tasks.pid)

    workers.close()
    workers.close()

    for future in running:
        with pytest.raises(NotReady):
            future.result(PATIENCE_S)
    with pytest.raises(NotReady):
        queued.result(PATIENCE_S)
    with pytest.raises(NotReady):
        workers.submit(tasks.pid)
    with pytest.raises(NotReady):
        workers.start()
    assert not any(is_alive(pid) for pid in pids)
    assert num_open_files() == num_files


def test_a_pool_needs_a_worker() -> None:
    with pytest.raises(ValueError, match="num_workers"):
        MediaWorkers(0)


def children() -> set[str]:
    """This process's children, whichever thread started them."""
    return {child for listed in Path("/proc/self/task").glob("*/children") for child in listed.read_text().split()}


def test_a_pool_never_used_starts_no_process() -> None:
    before = children()
    with MediaWorkers(2) as workers:
        assert children() == before
        workers.start()
        assert len(children() - before) == 2


def no_files_left() -> None:
    raise OSError(errno.EMFILE, "Too many open files")


@pytest.mark.parametrize(
    ("target", "broken"),
    [
        ("sys.executable", "/bin/false"),
        ("sys.executable", "/no/such/file"),
        ("service.media.workers.Pipe", no_files_left),
    ],
)
def test_a_worker_that_cannot_start_is_not_ready(target: str, broken: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    num_files = num_open_files()
    monkeypatch.setattr(target, broken)
    with MediaWorkers(1) as workers:
        with pytest.raises(NotReady, match="cannot be started"):
            workers.start()
        with pytest.raises(NotReady, match="cannot be started"):
            workers.call_sync(tasks.pid)
        monkeypatch.undo()
        assert workers.call_sync(tasks.pid) > 0
    assert num_open_files() == num_files


def run_script(folder: Path, text: str) -> "subprocess.CompletedProcess[str]":
    script = folder / "main.py"
    script.write_text(textwrap.dedent(text))
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONWARNINGS": "error"}
    return subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=PATIENCE_S)


@pytest.mark.parametrize("busy", [True, False])
def test_workers_die_with_their_parent(busy: bool, tmp_path: Path) -> None:
    finished = run_script(
        tmp_path,
        f"""
        import os, signal
        from service.media import MediaWorkers
        from tests.service.media import tasks
        workers = MediaWorkers(1)
        print(workers.call_sync(tasks.pid), flush=True)
        if {busy}:
            call = workers.submit(tasks.spin_deaf)
            while not call.running(): pass
        os.kill(os.getpid(), signal.SIGKILL)
        """,
    )
    assert finished.returncode == -signal.SIGKILL, finished.stderr
    worker = int(finished.stdout)
    wait_until(lambda: not is_alive(worker))


def test_a_main_module_is_not_run_again_and_ends_quietly(tmp_path: Path) -> None:
    """Without the usual guard: a child that imported it would start a pool of its own."""
    finished = run_script(
        tmp_path,
        """
        from service.media import MediaWorkers
        from tests.service.media import tasks
        print("main")
        with MediaWorkers(2) as workers:
            print(workers.call_sync(tasks.echo, "done"))
        """,
    )
    assert (finished.stdout.split(), finished.stderr, finished.returncode) == (["main", "done"], "", 0)


def test_importing_the_package_loads_no_torch() -> None:
    code = "import sys, service.media; print(sorted({'torch', 'transformers', 'fastapi', 'faiss', 'redis'} & set(sys.modules)))"
    finished = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert finished.stdout.strip() == "[]", finished.stderr
