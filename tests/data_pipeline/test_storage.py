import contextlib
import itertools
import os
import pickle
import threading
from pathlib import Path

import pytest

from data_pipeline.errors import DataError
from data_pipeline.remote import S3Storage
from data_pipeline.storage import LocalStorage, open_storage


@pytest.fixture
def storage(tmp_path):
    return open_storage(tmp_path / "new" / "folder")


def test_what_is_put_is_listed_and_read(storage):
    assert storage.list() == [] and not storage.exists("a")
    assert storage.put_if_absent("a", b"0123456789")
    assert storage.list() == ["a"] and storage.exists("a")
    assert (storage.get("a"), storage.get_range("a", 2, 5), storage.stat("a")) == (b"0123456789", b"234", (10, ""))


def test_nothing_is_overwritten(storage, tmp_path):
    storage.put_if_absent("a", b"first")
    (tmp_path / "second").write_bytes(b"second")
    assert not storage.put_if_absent("a", b"second") and not storage.put_file_if_absent("a", tmp_path / "second")
    assert storage.get("a") == b"first"


def test_of_many_writers_one_wins(storage):
    results = []
    writers = [
        threading.Thread(target=lambda n=n: results.append(storage.put_if_absent("a", b"%d" % n))) for n in range(8)
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert sorted(results) == [False] * 7 + [True]


@pytest.mark.parametrize("ask", [lambda s: s.get("x"), lambda s: s.stat("x"), lambda s: s.get_range("x", 0, 1)])
def test_a_missing_object_is_named(storage, ask):
    with pytest.raises(DataError, match="folder/x: not found"):
        ask(storage)


def test_a_range_beyond_the_end_is_refused(storage):
    storage.put_if_absent("a", b"0123")
    with pytest.raises(DataError, match=r"requested bytes 2\.\.6, got 2"):
        storage.get_range("a", 2, 6)


def test_a_file_that_another_thread_lets_go_is_read_to_the_end(tmp_path, monkeypatch):
    """Two threads open it at once, and one's stays; or so many others are opened that it is closed."""
    storage, read = LocalStorage(str(tmp_path)), os.pread
    storage.put_if_absent("a", b"0123456789")

    def after_another_came(descriptor, size, start):
        storage._files.clear()
        return read(descriptor, size, start)

    monkeypatch.setattr(os, "pread", after_another_came)
    assert storage.get_range("a", 2, 5) == b"234"


def test_what_killed_writers_left_is_removed(storage):
    storage.put_if_absent("a", b"0")
    with storage.scratch() as folder:
        (folder / "half").write_bytes(b"written")
        storage.clean()
    assert not (storage.path(".tmp")).exists() and storage.list() == ["a"]


def test_folders_are_listed_and_removed_with_all_they_hold(storage):
    assert storage.folders() == []
    for name in ("b", "a", "c"):
        open_storage(f"{storage.root}/{name}").put_if_absent("deep", b"0")
    with storage.scratch():
        assert storage.folders() == ["a", "b", "c"] and storage.list() == []
    for _ in range(2):
        open_storage(f"{storage.root}/b").remove_all()
        assert storage.folders() == ["a", "c"]


def test_a_folder_that_goes_as_it_is_listed_is_listed_as_empty(storage):
    ended, folder = threading.Event(), Path(storage.root)

    def comes_and_goes():
        while not ended.is_set():
            folder.mkdir(parents=True, exist_ok=True)
            folder.rmdir()

    other = threading.Thread(target=comes_and_goes)
    other.start()
    try:
        assert not any(storage.list() + storage.folders() for _ in range(5000))
    finally:
        ended.set()
        other.join(timeout=30)


def test_a_folder_that_another_removes_and_adds_to_is_removed_all_the_same(storage):
    for number in range(300):
        (storage.path(f"{number % 7}") / "deep").mkdir(parents=True, exist_ok=True)
        (storage.path(f"{number % 7}") / "deep" / f"old{number}").touch()
    ends, faults = threading.Event(), []

    def remove():
        try:
            storage.remove_all()
        except BaseException as error:
            faults.append(error)

    def add():
        for number in itertools.count():
            if ends.is_set():
                return
            with contextlib.suppress(OSError):
                (storage.path("0") / "deep").mkdir(parents=True, exist_ok=True)
                (storage.path("0") / "deep" / f"new{number}").touch()

    removers = [threading.Thread(target=remove) for _ in range(4)]
    for thread in (adder := threading.Thread(target=add), *removers):
        thread.start()
    for thread in removers:
        thread.join()
    ends.set()
    adder.join()
    assert not faults and not list(Path(storage.root).rglob("old*"))


def test_what_may_not_be_removed_is_named(storage, monkeypatch):
    storage.put_if_absent("a", b"0")

    def refused(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("os.unlink", refused)
    with pytest.raises(DataError, match="permission denied"):
        storage.remove_all()


def test_an_object_is_removed_once_or_not_there(storage):
    storage.put_if_absent("a", b"0")
    for _ in range(2):
        storage.remove("a")
        assert storage.list() == []
    assert storage.put_if_absent("a", b"1")


def test_a_storage_travels_to_another_process_without_its_open_files(storage):
    storage.put_if_absent("a", b"0123")
    storage.get_range("a", 0, 1)
    assert pickle.loads(pickle.dumps(storage)).get_range("a", 1, 3) == b"12"


def test_the_root_decides_between_local_and_s3(tmp_path):
    assert isinstance(open_storage(tmp_path), LocalStorage)
    assert isinstance(open_storage("s3://bucket/prefix"), S3Storage)
