from __future__ import annotations

import hashlib
import http.server
import logging
import multiprocessing
import os
import pickle
import random
import re
import shutil
import signal
import sys
import threading
from collections import Counter
from contextlib import suppress
from pathlib import Path
from time import sleep

import fsspec
import pytest

from infimed.contracts import DataFault, UserError
from infimed.data import remote as remote_module
from infimed.data.cache import Cache
from infimed.data.files import OpenFiles
from infimed.data.remote import BLOCK, discreet
from infimed.data.store import Request, Store, is_remote


def noise(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


def in_child(work, *args: object) -> multiprocessing.Process:
    """Run `work` in a forked process that exits 0 when it returns True."""
    child = multiprocessing.get_context("fork").Process(target=lambda: os._exit(0 if work(*args) else 1), daemon=True)
    child.start()
    return child


class Server:
    """A web server on this machine: ranges, ETags, listings; `faults[path]` says how the next answers go wrong."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.faults: dict[str, list[str | int]] = {}
        self.asked: list[tuple[str, str, str]] = []  # method, path, range
        self.busy = Counter()
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def do_HEAD(self) -> None:
                outer.answer(self, body=False)

            def do_GET(self) -> None:
                outer.answer(self, body=True)

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def answer(self, handler: http.server.BaseHTTPRequestHandler, *, body: bool) -> None:
        path = handler.path.partition("?")[0]
        asked = handler.headers.get("Range", "")
        self.asked.append((handler.command, handler.path, asked))
        faults = self.faults.get(path if body else f"HEAD {path}")
        fault = faults.pop(0) if faults else ""
        data, status = self.files.get(path), 200
        if path.endswith("/"):
            links = sorted({name[len(path) :].split("/")[0] for name in self.files if name.startswith(path)})
            data = "".join(f'<a href="{link}">{link}</a>' for link in links).encode()
        if isinstance(fault, int) or data is None:
            data, status = b"no", fault or 404
        total = len(data)
        etag = hashlib.sha256(data).hexdigest()[:8]
        if asked and status == 200 and fault != "whole":
            first, last = (int(number) for number in re.fullmatch(r"bytes=(\d+)-(\d+)", asked).groups())
            data, status = data[first : last + 1], 206
            if first >= total:
                data, status = b"", 416
        if fault == "short":
            data = data[: len(data) // 2]
        handler.send_response(status)
        handler.send_header("Content-Type", "text/html" if path.endswith("/") else "application/octet-stream")
        handler.send_header("Content-Length", str(len(data)))
        handler.send_header("ETag", etag)
        handler.send_header("Accept-Ranges", "bytes")
        handler.end_headers()
        if body and fault == "cut":
            handler.wfile.write(data[: len(data) // 2])
            handler.close_connection = True
        elif body:
            handler.wfile.write(data)

    def ranges(self, path: str) -> list[str]:
        return [asked for method, found, asked in self.asked if method == "GET" and found.partition("?")[0] == path]


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


@pytest.fixture
def waits(monkeypatch):
    """Record the waits between retries in place of waiting."""
    waits: list[float] = []
    monkeypatch.setattr(remote_module, "sleep", waits.append)
    return waits


@pytest.fixture
def files(tmp_path):
    paths = [tmp_path / f"{name}.tar" for name in "ab"]
    for number, path in enumerate(paths):
        path.write_bytes(noise(300_000, seed=number))
    return paths


# --- local files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("no_wait", ["as it is", None, "cold"])
def test_local_reads_come_back_in_the_order_asked_whether_near_or_far(files, monkeypatch, no_wait):
    if no_wait is None:
        monkeypatch.setattr("infimed.data.files._NO_WAIT", None)
    elif no_wait == "cold":
        monkeypatch.setattr("infimed.data.files.File.is_near", lambda *_, probe: False)
    draw = random.Random(1)
    requests = [Request(str(draw.choice(files)), draw.randrange(290_000), draw.randrange(9_000)) for _ in range(50)]
    expected = [Path(r.path).read_bytes()[r.offset : r.offset + r.size] for r in requests]
    assert Store().read(requests) == expected
    assert Store(threads=1).read(requests) == expected
    assert Store().read([]) == []


def test_a_read_behind_the_end_is_short_and_a_missing_file_is_a_fault(files):
    short, beyond, missing, good = Store().read(
        [
            Request(str(files[0]), 299_990, 50),
            Request(str(files[0]), 400_000, 5),
            Request("nowhere.tar", 0, 5),
            Request(str(files[1]), 0, 5),
        ]
    )
    assert (len(short), beyond, len(good)) == (10, b"", 5)
    assert isinstance(missing, DataFault) and missing.reason == "unreadable" and "nowhere.tar" in missing.detail


def test_few_files_stay_open_and_one_that_was_dropped_can_still_be_read(tmp_path):
    for number in range(70):
        (tmp_path / f"{number}").write_bytes(bytes([number] * 10))
    open_files = OpenFiles()
    first = open_files.local(str(tmp_path / "0"))
    before = len(os.listdir("/proc/self/fd")) if sys.platform == "linux" else 0
    for number in range(70):
        open_files.local(str(tmp_path / str(number)))
    assert first.read(0, 10) == bytes(10)
    if sys.platform == "linux":
        assert len(os.listdir("/proc/self/fd")) - before == 64


def test_a_pickled_store_and_a_forked_one_read_on(files):
    store = Store(threads=3)
    requests = [Request(str(files[0]), 100, 10), Request(str(files[1]), 0, 10)]
    expected = store.read(requests)
    with store._lock:  # as when another thread of the parent holds it at the moment of the fork
        child = in_child(lambda: store.read(requests) == expected and list(store._pool().map(len, expected)) == [10, 10])
    child.join(20)
    assert child.exitcode == 0
    assert pickle.loads(pickle.dumps(store)).read(requests) == expected


def test_local_tars_are_listed_by_file_folder_and_pattern_also_under_names_that_look_like_patterns(tmp_path):
    for name in ("b.tar", "a.tar", "c[1].tar", "note.txt"):
        (tmp_path / name).touch()
    store = Store()
    assert [Path(path).name for path in store.list(str(tmp_path))] == ["a.tar", "b.tar", "c[1].tar"]
    assert [Path(path).name for path in store.list(f"{tmp_path}/[ab].tar")] == ["a.tar", "b.tar"]
    assert store.list(f"{tmp_path}/c[1].tar") == [f"{tmp_path}/c[1].tar"]
    assert store.list(f"{tmp_path}/nosuch*") == []
    assert store.exists(f"{tmp_path}/a.tar") and not store.exists(f"{tmp_path}/z.tar")
    assert store.fetch(f"{tmp_path}/note.txt") == tmp_path / "note.txt"
    with pytest.raises(UserError, match=r"z\.tar: No such file"):
        store.size(f"{tmp_path}/z.tar")


# --- remote stores ---------------------------------------------------------------------------------------------------


def test_remote_ranges_equal_the_file_over_http_memory_and_file_urls(server, tmp_path):
    data = noise(3 * BLOCK + 12_345)
    server.files["/set/a.tar"] = data
    fsspec.filesystem("memory").pipe("/set/a.tar", data)
    (tmp_path / "a.tar").write_bytes(data)
    draw = random.Random(2)
    places = [(draw.randrange(len(data)), draw.choice([0, 5, 60_000, BLOCK + 7])) for _ in range(20)] + [(0, len(data)), (len(data) + 9, 4)]
    for url in (f"{server.url}/set/a.tar", "memory://set/a.tar", f"file://{tmp_path}/a.tar"):
        for options in ({}, {"cache": tmp_path / "cache"}, {"cache": tmp_path / "cache", "access": "shards"}):
            store = Store(**options)
            assert store.read([Request(url, *place) for place in places]) == [data[at : at + size] for at, size in places], (url, options)
            assert store.size(url) == len(data)
    assert is_remote("s3://bucket/a.tar") and not is_remote("/data/a.tar") and not is_remote("a:b.tar")


def test_neighbours_are_fetched_together_and_nothing_longer_than_a_block(server):
    server.files["/a.tar"] = noise(3 * BLOCK)
    url = f"{server.url}/a.tar"
    near = [Request(url, 1000 * n, 900) for n in range(50)]
    far = [Request(url, 2 * BLOCK, 10), Request(url, BLOCK // 2, 10)]
    long = [Request(url, 5, 2 * BLOCK)]
    found = Store().read([*far, *near])
    assert found == [server.files["/a.tar"][r.offset : r.offset + r.size] for r in [*far, *near]]
    assert sorted(server.ranges("/a.tar")) == [
        "bytes=0-49899",
        f"bytes={BLOCK // 2}-{BLOCK // 2 + 9}",
        f"bytes={2 * BLOCK}-{2 * BLOCK + 9}",
    ]
    server.asked.clear()
    Store().read(long)
    assert set(server.ranges("/a.tar")) == {f"bytes=5-{BLOCK + 4}", f"bytes={BLOCK + 5}-{2 * BLOCK + 4}"}


def test_bytes_in_flight_are_bounded_by_read_ahead(monkeypatch):
    fsspec.filesystem("memory").pipe("/flight.tar", noise(8 * BLOCK))
    lock, now, most = threading.Lock(), [0], [0]
    release = threading.Event()
    read = remote_module.Remote.read

    def counted(self, path, start, stop):
        with lock:
            now[0] += stop - start
            most[0] = max(most[0], now[0])
            if now[0] >= 2 * BLOCK:
                release.set()
        release.wait(5)
        sleep(0.02)  # long enough for a reader too many to come
        try:
            return read(self, path, start, stop)
        finally:
            with lock:
                now[0] -= stop - start

    monkeypatch.setattr(remote_module.Remote, "read", counted)
    Store(threads=8, read_ahead=2 * BLOCK).read([Request("memory://flight.tar", 0, 8 * BLOCK)])
    assert most[0] == 2 * BLOCK


@pytest.mark.parametrize("fault", [503, 429, "short", "cut"])
@pytest.mark.parametrize("cached", [False, True])
def test_what_passes_is_tried_again_with_growing_waits(server, waits, tmp_path, fault, cached):
    server.files["/a.tar"] = noise(5000)
    server.faults["/a.tar"] = [fault] * 3
    store = Store(retries=3, cache=tmp_path if cached else None)
    assert store.read([Request(f"{server.url}/a.tar", 100, 3000)]) == [server.files["/a.tar"][100:3100]]
    assert len(waits) == 3
    assert all(0.25 * 2**n <= wait <= 0.5 * 2**n for n, wait in enumerate(waits))


def test_spent_retries_and_final_answers_are_faults_of_that_file_alone(server, waits):
    server.files |= {"/a.tar": noise(5000), "/b.tar": noise(5000), "/c.tar": noise(5000)}
    server.faults |= {"/a.tar": [500] * 9, "/b.tar": [403] * 9}
    names = ("a", "b", "nosuch", "c")
    spent, forbidden, missing, good = Store(retries=2).read([Request(f"{server.url}/{name}.tar", 10, 20) for name in names])
    assert good == server.files["/c.tar"][10:30]
    assert [fault.reason for fault in (spent, forbidden, missing)] == ["unreadable"] * 3
    assert "500" in spent.detail and "2 retries" in spent.detail and "403" in forbidden.detail and "not found" in missing.detail
    assert len(waits) == 2  # for a.tar alone
    assert Counter(path for _, path, _ in server.asked) == {"/a.tar": 3, "/b.tar": 1, "/nosuch.tar": 1, "/c.tar": 1}


def test_a_size_that_cannot_be_had_for_a_moment_is_asked_for_again_and_a_forbidden_one_is_said_so(server, waits):
    server.files["/a.tar"] = noise(500)
    server.faults |= {"HEAD /a.tar": [503], "/a.tar": [503]}
    assert Store().size(f"{server.url}/a.tar") == 500
    assert len(waits) == 1
    server.faults |= {"HEAD /a.tar": [403], "/a.tar": [403]}
    with pytest.raises(UserError, match="403"):
        Store(retries=0).size(f"{server.url}/a.tar")


@pytest.mark.parametrize("cached", [False, True])
def test_a_request_fails_as_a_whole_when_a_part_of_it_does(server, tmp_path, cached):
    server.files["/a.tar"] = noise(3 * BLOCK)
    server.faults["/a.tar"] = [403]
    store = Store(threads=1, cache=tmp_path if cached else None)
    failed, good = store.read([Request(f"{server.url}/a.tar", 0, 2 * BLOCK), Request(f"{server.url}/a.tar", 2 * BLOCK, 10)])
    assert isinstance(failed, DataFault) and good == server.files["/a.tar"][2 * BLOCK : 2 * BLOCK + 10]


def test_a_failed_programme_is_no_fault_of_the_data(monkeypatch, waits):
    fsspec.filesystem("memory").pipe("/bug.tar", b"12345")
    monkeypatch.setattr(type(fsspec.filesystem("memory")), "cat_file", lambda *_, **__: None)
    with pytest.raises(TypeError):
        Store().read([Request("memory://bug.tar", 0, 3)])
    assert waits == []


def test_secrets_of_an_address_are_neither_shown_nor_logged(server, waits, caplog):
    caplog.set_level(logging.INFO, logger="infimed")
    server.files["/a.tar"] = b"x" * 100
    server.faults["/a.tar"] = [503, 403]
    url = server.url.replace("://", "://name:pass@") + "/a.tar?X-Signature=hush&b=1"
    (fault,) = Store().read([Request(url, 0, 10)])
    text = caplog.text + str(fault)
    assert "503" in caplog.text and "403" in str(fault) and "/a.tar" in text
    assert not any(secret in text for secret in ("hush", "pass", "X-Signature"))
    for call in (Store().size, Store().fetch):
        with pytest.raises(UserError) as refused:
            call(f"{server.url}/nosuch.tar?sig=hush")
        assert "hush" not in str(refused.value) and refused.value.__cause__ is None and refused.value.__suppress_context__
    assert discreet("GET s3://k:s@b/x?y=1 then 'http://h/?z'") == "GET s3://b/x then 'http://h/'"


def test_a_store_without_ranges_is_named_with_the_way_to_read_it(server):
    server.files["/a.tar"] = noise(5000)
    for place in ((100, 50), (4000, 900), (4990, 6000)):
        server.faults["/a.tar"] = ["whole"]
        with pytest.raises(UserError, match=r"data\.access=shards"):
            Store().read([Request(f"{server.url}/a.tar", *place)])


def test_remote_tars_are_listed_by_file_folder_and_pattern(server, tmp_path):
    names = ("a.tar", "b.tar", "b.index.safetensors")
    for name in names:
        server.files[f"/set/{name}"] = b"12345"
        fsspec.filesystem("memory").pipe(f"/listed/{name}", b"12345")
        (tmp_path / name).write_bytes(b"12345")
    for folder in (f"{server.url}/set/", "memory://listed", f"file://{tmp_path}"):
        store, folder = Store(), folder.rstrip("/")
        found = store.list(folder + "/")
        assert [path.rpartition("/")[2] for path in found] == ["a.tar", "b.tar"], folder
        assert store.read([Request(path, 1, 2) for path in found]) == [b"23", b"23"]
        assert store.list(f"{folder}/*.tar") == found
        assert len(store.list(f"{folder}/b*")) == 2
        assert store.list(f"{folder}/a.tar") == [f"{folder}/a.tar"]
        assert store.list(f"{folder}/nosuch.tar") == store.list(f"{folder}/no*such.tar") == []
        assert store.exists(f"{folder}/b.tar") and not store.exists(f"{folder}/z.tar")
    assert Store().list("memory://nowhere") == []


def test_nothing_is_executed_from_a_path_and_what_is_not_installed_is_named(monkeypatch, tmp_path):
    with pytest.raises(UserError, match="not run"):
        Store().list(f"pipe:touch {tmp_path}/x.tar")
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="not run"):
        Store().list("simplecache::memory://a.tar")
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(UserError, match=r"s3://bucket/a.tar: .*pip install 'infimed\[remote\]'"):
        Store().list("s3://bucket/a.tar?secret")
    with pytest.raises(UserError, match="nosuch"):
        Store().list("nosuch://bucket/a.tar")


def test_every_wrong_option_is_named(tmp_path):
    with pytest.raises(UserError) as wrong:
        Store(threads=0, access="shards", retries=-1, read_ahead=5)
    assert [line.split("=")[0] for line in str(wrong.value).splitlines()] == ["data.read_threads", "data.access", "retries", "read_ahead"]
    with pytest.raises(UserError, match=r"data\.cache_gb"):
        Store(cache=tmp_path, cache_bytes=100)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"data\.cache="):
        Store(cache=tmp_path / "file")


# --- indexes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("access", ["ranges", "shards"])
def test_a_fetched_file_is_kept_until_it_changes_at_its_place(server, tmp_path, access):
    url, path = f"{server.url}/a.index.safetensors", "/a.index.safetensors"
    server.files[path] = first = noise(BLOCK + 100)
    store = Store(cache=tmp_path, access=access)
    assert store.fetch(url).read_bytes() == first
    server.asked.clear()
    assert store.fetch(url) == Store(cache=tmp_path, access=access).fetch(url)
    assert server.ranges(path) == []
    server.files[path] = second = noise(BLOCK + 100, seed=1)
    assert store.fetch(url).read_bytes() == second


def test_without_a_cache_fetched_files_go_when_the_process_that_made_them_ends(monkeypatch):
    ends = []
    monkeypatch.setattr("atexit.register", lambda *args, **options: ends.append((args, options)))
    fsspec.filesystem("memory").pipe("/one.index", b"12345")
    store = Store()
    path = store.fetch("memory://one.index")
    assert path.read_bytes() == b"12345" and store.fetch("memory://one.index") == path
    [((remove, folder), options)] = ends
    in_child(lambda: remove(folder, **options) is None).join(20)
    assert path.exists()
    remove(folder, **options)
    assert not path.parent.exists()


# --- the cache -------------------------------------------------------------------------------------------------------


def blocks(folder: Path) -> list[Path]:
    return sorted((folder / "blocks").glob("*.block"))


def total(folder: Path) -> int:
    """Add up the blocks, while other processes may be at it."""
    found = 0
    for path in blocks(folder):
        with suppress(FileNotFoundError):
            found += path.stat().st_size
    return found


def test_a_block_is_fetched_once_and_serves_other_reads_stores_and_processes(server, tmp_path):
    server.files["/a.tar"] = data = noise(2 * BLOCK + 100)
    requests = [Request(f"{server.url}/a.tar", n * 50_000, 60_000) for n in range(200)]
    expected = [data[r.offset : r.offset + r.size] for r in requests]
    assert Store(cache=tmp_path).read(requests) == expected
    assert sorted(server.ranges("/a.tar")) == [
        f"bytes=0-{BLOCK - 1}",
        f"bytes={BLOCK}-{2 * BLOCK - 1}",
        f"bytes={2 * BLOCK}-{2 * BLOCK + 99}",
    ]
    server.asked.clear()
    child = in_child(lambda: Store(cache=tmp_path).read(requests) == expected)
    child.join(20)
    assert child.exitcode == 0 and server.ranges("/a.tar") == []


def test_processes_that_want_the_same_blocks_fetch_each_once_and_read_the_same(server, tmp_path):
    server.files["/a.tar"] = data = noise(6 * BLOCK)

    def read(seed: int) -> bool:
        draw, store = random.Random(seed), Store(cache=tmp_path, threads=3)
        for _ in range(20):
            requests = [Request(f"{server.url}/a.tar", draw.randrange(len(data) - 70_000), 70_000) for _ in range(4)]
            if store.read(requests) != [data[r.offset : r.offset + r.size] for r in requests]:
                return False
        return True

    children = [in_child(read, seed) for seed in range(3)]
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0, 0, 0]
    assert len(server.ranges("/a.tar")) == 6
    assert not list((tmp_path / "blocks").glob("*.part"))


@pytest.mark.parametrize("threads", [1, 3])
def test_the_cache_stays_below_its_cap_while_two_processes_fill_it(tmp_path, threads):
    size, cap = 10_000, 105_000

    def fill(seed: int) -> bool:
        cache, draw = Cache(tmp_path / "blocks", max_bytes=cap), random.Random(seed)
        for _ in range(150):
            name = f"{draw.randrange(40):040x}"
            file = cache.open(name, size, lambda part, name=name: part.write_bytes(name.encode() * 250))
            right = os.pread(file, size, 0) == name.encode() * 250
            os.close(file)
            if not right or total(tmp_path) > cap:
                return False
        return True

    children = [in_child(fill, seed) for seed in range(threads + 1)]
    for child in children:
        child.join(60)
    assert {child.exitcode for child in children} == {0}
    assert cap * 0.8 < total(tmp_path) <= cap


def test_what_was_longest_unused_goes_first_and_other_files_stay(tmp_path):
    (tmp_path / "mine.block").write_bytes(b"x" * 99)
    (tmp_path / "notes.part").write_bytes(b"x" * 99)
    cache = Cache(tmp_path, max_bytes=50)
    names = [f"{n:040x}" for n in range(6)]

    def use(name: str) -> None:
        os.close(cache.open(name, 10, lambda part: part.write_bytes(bytes(10))))

    for age, name in enumerate(names[:5]):
        use(name)
        os.utime(cache.path(name), (age + 1, age + 1))
    use(names[0])
    use(names[5])
    assert [name for name in names if not cache.path(name).exists()] == [names[1], names[2]]  # to 50 - 10 - slack
    assert (tmp_path / "mine.block").exists() and (tmp_path / "notes.part").exists()


def test_a_torn_block_is_fetched_again(server, tmp_path):
    server.files["/a.tar"] = data = noise(BLOCK + 50)
    request = Request(f"{server.url}/a.tar", BLOCK - 5, 20)
    for damage in (0, 7, 2 * BLOCK):
        assert Store(cache=tmp_path).read([request]) == [data[BLOCK - 5 : BLOCK + 15]]
        for path in blocks(tmp_path):
            os.truncate(path, damage)
    assert Store(cache=tmp_path).read([request]) == [data[BLOCK - 5 : BLOCK + 15]]
    assert len(server.ranges("/a.tar")) == 8


def test_a_new_version_of_an_object_is_not_read_from_blocks_of_the_old(server, tmp_path):
    request = Request(f"{server.url}/a.tar", 5, 20)
    for seed in range(2):
        server.files["/a.tar"] = noise(500, seed=seed)
        assert Store(cache=tmp_path).read([request]) == [server.files["/a.tar"][5:25]]


def test_the_cache_survives_a_kill_in_the_middle_of_a_block(tmp_path):
    cache, name = Cache(tmp_path, max_bytes=1000), f"{7:040x}"
    reader, writer = os.pipe()

    def hang(part: Path) -> None:
        part.write_bytes(b"half")
        os.write(writer, b"!")
        signal.pause()

    child = in_child(lambda: cache.open(name, 100, hang))
    assert os.read(reader, 1) == b"!"
    os.kill(child.pid, signal.SIGKILL)
    child.join(20)
    assert not cache.path(name).exists()
    os.close(cache.open(f"{8:040x}", 900, lambda part: part.write_bytes(bytes(900))))
    file = cache.open(name, 100, lambda part: part.write_bytes(b"whole" * 20))
    assert os.pread(file, 100, 0) == b"whole" * 20
    os.close(file)
    (tmp_path / f"{9:040x}.part").write_bytes(b"of one that was killed")
    os.close(cache.open(f"{10:040x}", 900, lambda part: part.write_bytes(bytes(900))))  # makes room
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".part"] == []


@pytest.mark.parametrize("ledger", [None, b"", b"rubbish", b"%020d" % 10**15])
def test_a_lost_or_wrong_ledger_is_counted_anew(tmp_path, ledger):
    cache = Cache(tmp_path, max_bytes=100)
    for number in range(9):
        os.close(cache.open(f"{number:040x}", 10, lambda part: part.write_bytes(bytes(10))))
    (tmp_path / "blocks.bytes").unlink()
    if ledger is not None:
        (tmp_path / "blocks.bytes").write_bytes(ledger)
    for number in range(9, 30):
        os.close(cache.open(f"{number:040x}", 10, lambda part: part.write_bytes(bytes(10))))
        assert sum(path.stat().st_size for path in tmp_path.glob("*.block")) <= 100


def test_a_cache_that_cannot_be_written_to_is_given_up_with_one_warning(server, tmp_path, caplog):
    server.files["/a.tar"] = data = noise(3 * BLOCK)
    store = Store(cache=tmp_path, threads=1)
    shutil.rmtree(tmp_path / "blocks")
    requests = [Request(f"{server.url}/a.tar", n * BLOCK, 100) for n in range(3)]
    assert store.read(requests) == [data[r.offset : r.offset + 100] for r in requests]
    assert store.read(requests) == [data[r.offset : r.offset + 100] for r in requests]
    assert len(caplog.records) == 1 and "goes on without it" in caplog.text


# --- whole shards ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["cut", "short"])
@pytest.mark.parametrize("opener", ["curl", "fsspec"])
def test_whole_shards_are_fetched_once_in_sequence(server, tmp_path, monkeypatch, waits, opener, fault):
    if opener == "curl" and not shutil.which("curl"):
        pytest.skip("webdataset's opener runs curl")
    if opener == "fsspec":
        monkeypatch.setattr(remote_module.shutil, "which", lambda _: None)
    server.files["/a.tar"] = data = noise(2 * BLOCK)
    server.faults["/a.tar"] = [fault]
    store = Store(cache=tmp_path, access="shards")
    requests = [Request(f"{server.url}/a.tar", n * 90_000, 1000) for n in (5, 3, 60)]
    for _ in range(2):
        assert store.read(requests) == [data[r.offset : r.offset + r.size] for r in requests]
    assert server.ranges("/a.tar") == ["", ""]  # the first was not whole
    assert len(waits) == 1 and [path.stat().st_size for path in blocks(tmp_path)] == [len(data)]


def test_a_shard_beyond_the_cap_names_the_option(server, tmp_path):
    server.files["/a.tar"] = noise(2 * BLOCK)
    with pytest.raises(UserError, match=r"data\.cache_gb"):
        Store(cache=tmp_path, cache_bytes=BLOCK, access="shards").read([Request(f"{server.url}/a.tar", 0, 10)])
