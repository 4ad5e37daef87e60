"""Hashing, verification and folders that appear all at once or not at all."""

import errno
import hashlib
import multiprocessing
import os
import shutil
import string
from collections import namedtuple

import pytest

from fastface_trt.engines import files as files_module
from fastface_trt.engines.files import (
    describe_file,
    finished_folder,
    sha256_file,
    storage_errors,
    sweep,
    verify_files,
    write_text_durably,
)
from fastface_trt.engines.manifest import FileEntry, Strict
from fastface_trt.errors import EngineMismatch, ExportIncomplete, InvalidRequest, StorageError

fork = multiprocessing.get_context("fork")


class Note(Strict):
    text: str


def write(target, text, name="note.json"):
    with finished_folder(target, name) as draft:
        (draft.path / "sub").mkdir()
        (draft.path / "sub" / "data.bin").write_bytes(text.encode() * 1000)
        assert not (draft.path / name).exists()
        return draft.finish(Note(text=text))


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) * 2 + 7])
def test_hash_is_that_of_hashlib(tmp_path, size):
    data = os.urandom(size)
    (tmp_path / "f").write_bytes(data)
    assert sha256_file(tmp_path / "f") == hashlib.sha256(data).hexdigest()
    entry = describe_file(tmp_path, "f")
    assert entry == describe_file(tmp_path, tmp_path / "f")
    assert (entry.path, entry.bytes) == ("f", size)


def test_verify_says_what_is_wrong_with_which_file(tmp_path):
    for name in "ab":
        (tmp_path / name).write_bytes(b"0123456789")
    entries = [describe_file(tmp_path, name) for name in "ab"]
    verify_files(tmp_path, entries)

    (tmp_path / "b").write_bytes(b"01234")
    with pytest.raises(ExportIncomplete, match=r"/b is truncated: 5 bytes instead of 10") as caught:
        verify_files(tmp_path, entries)
    assert caught.value.hint
    (tmp_path / "b").write_bytes(b"012345678!")
    with pytest.raises(EngineMismatch, match=r"/b is changed.*SHA-256.*Do this"):
        verify_files(tmp_path, entries, EngineMismatch, "Do this.")
    (tmp_path / "b").unlink()
    with pytest.raises(ExportIncomplete, match=r"/b is missing"):
        verify_files(tmp_path, entries)
    entry = FileEntry(path="a/x", bytes=1, sha256="0" * 64)
    with pytest.raises(ExportIncomplete, match=r"a/x is missing"):
        verify_files(tmp_path, [entry])


def test_a_folder_appears_complete_and_is_replaced_as_a_whole(tmp_path):
    target = tmp_path / "made" / "here"
    assert write(target, "one") == target
    assert sorted(p.name for p in target.iterdir()) == ["note.json", "sub"]
    (target / "stale").touch()
    write(target, "two")
    assert Note.model_validate_json((target / "note.json").read_text()).text == "two"
    assert not (target / "stale").exists()
    assert [p.name for p in target.parent.iterdir()] == ["here"]


def test_through_a_link_the_folder_that_is_meant_is_replaced(tmp_path):
    write(tmp_path / "real", "one")
    (tmp_path / "link").symlink_to("real")
    write(tmp_path / "link", "two")
    assert (tmp_path / "link").is_symlink()
    assert "two" in (tmp_path / "real" / "note.json").read_text()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_leaves_the_old_folder_and_nothing_else(tmp_path, error):
    write(tmp_path / "t", "old")

    def write_half():
        with finished_folder(tmp_path / "t", "note.json") as draft:
            (draft.path / "half").write_bytes(b"x")
            raise error

    with pytest.raises(error):
        write_half()
    assert [p.name for p in tmp_path.iterdir()] == ["t"]
    assert "old" in (tmp_path / "t" / "note.json").read_text()


def test_a_block_without_finish_is_a_programming_error(tmp_path):
    with pytest.raises(RuntimeError, match="finish"), finished_folder(tmp_path / "t", "n.json"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_ours_is_never_replaced(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "photo.jpg").touch()
    with pytest.raises(InvalidRequest, match=r"holds files but no note\.json"):
        write(tmp_path / "home", "x")
    assert (tmp_path / "home" / "photo.jpg").exists()
    (tmp_path / "file").touch()
    with pytest.raises(InvalidRequest, match="is a file"):
        write(tmp_path / "file", "x")
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty", "x")
    assert (tmp_path / "empty" / "note.json").exists()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES])
@pytest.mark.parametrize("function", ["fsync", "replace", "rename"])
def test_a_full_or_read_only_disk_is_a_storage_error(tmp_path, monkeypatch, code, function):
    write(tmp_path / "t", "old")

    def fail(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(files_module.os, function, fail)
    with pytest.raises(StorageError) as caught:
        write(tmp_path / "t", "new")
    monkeypatch.undo()
    assert caught.value.hint
    assert [p.name for p in tmp_path.iterdir()] == ["t"]
    assert "old" in (tmp_path / "t" / "note.json").read_text()


def test_a_failing_second_rename_puts_the_old_folder_back(tmp_path, monkeypatch):
    write(tmp_path / "t", "old")
    rename = os.rename

    def fail_for_drafts(old, new):
        if ".partial-" in str(old):
            raise OSError(errno.EIO, "Input/output error")
        rename(old, new)

    monkeypatch.setattr(os, "rename", fail_for_drafts)
    with pytest.raises(StorageError):
        write(tmp_path / "t", "new")
    assert [p.name for p in tmp_path.iterdir()] == ["t"]
    assert "old" in (tmp_path / "t" / "note.json").read_text()


def test_the_manifest_is_written_after_everything_else_is_on_the_disk(tmp_path, monkeypatch):
    if not os.path.exists("/proc/self/fd"):
        pytest.skip("needs /proc to name open files")
    events = []
    fsync, rename = os.fsync, os.rename

    def note_flush(handle):
        name = os.path.basename(os.readlink(f"/proc/self/fd/{handle}"))
        events.append("flush " + name.partition("-")[0].rstrip(string.digits))
        fsync(handle)

    def note_rename(old, new):
        rename(old, new)
        events.append(f"name {os.path.basename(new)}")

    monkeypatch.setattr(os, "fsync", note_flush)
    monkeypatch.setattr(os, "rename", note_rename)
    monkeypatch.setattr(os, "replace", note_rename)
    (tmp_path / "parent").mkdir()
    write(tmp_path / "parent" / "t", "x")
    assert sorted(events[:3]) == ["flush .t.partial", "flush data.bin", "flush sub"]
    assert events[3:] == [
        "flush .fastface",
        "name note.json",
        "flush .t.partial",
        "name t",
        "flush parent",
    ]


def test_a_writer_that_hides_the_full_disk_is_found_out(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")(10, 10, 0)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(StorageError, match="is full"), storage_errors(tmp_path):
        raise RuntimeError("basic_ios::clear: iostream error")


def test_an_error_about_another_place_is_not_blamed_on_the_target(tmp_path):
    with pytest.raises(PermissionError), storage_errors(tmp_path):
        raise PermissionError(errno.EACCES, "Permission denied", "/elsewhere/weights")
    with pytest.raises(StorageError), storage_errors(tmp_path):
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "x"))


def test_text_is_written_whole_or_not(tmp_path, monkeypatch):
    write_text_durably(tmp_path / "f", "old")

    def fail(*_):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(files_module.os, "fsync", fail)
    with pytest.raises(OSError, match="full"):
        write_text_durably(tmp_path / "f", "new")
    assert (tmp_path / "f").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def die_in_the_block(target):
    with finished_folder(target, "note.json") as draft:
        (draft.path / "half").write_bytes(b"x")
        os._exit(9)


def die_between_the_renames(target):
    rename = os.rename

    def rename_and_die(*paths):
        rename(*paths)
        os._exit(9)

    os.rename = rename_and_die
    write(target, "new")


def run(function, *arguments):
    process = fork.Process(target=function, args=arguments)
    process.start()
    process.join()
    assert process.exitcode == 9


def test_a_kill_leaves_a_draft_that_the_next_writer_removes(tmp_path):
    run(die_in_the_block, tmp_path / "t")
    run(die_in_the_block, tmp_path / "other")
    assert len(list(tmp_path.glob(".t.partial-*"))) == 1
    assert not (tmp_path / "t").exists()
    write(tmp_path / "t", "new")
    assert not list(tmp_path.glob(".t.*"))
    assert list(tmp_path.glob(".other.partial-*")), "another target's draft is not ours to judge"
    sweep(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["t"]


def test_a_kill_between_the_two_renames_loses_nothing(tmp_path):
    write(tmp_path / "t", "old")
    run(die_between_the_renames, tmp_path / "t")
    assert not (tmp_path / "t").exists(), "absent, not half there"
    sweep(tmp_path, "t")
    assert [p.name for p in tmp_path.iterdir()] == ["t"]
    assert "old" in (tmp_path / "t" / "note.json").read_text()


def test_a_living_writers_draft_is_not_swept(tmp_path):
    with finished_folder(tmp_path / "t", "note.json") as draft:
        process = fork.Process(target=sweep, args=(tmp_path,))
        process.start()
        process.join()
        write(tmp_path / "t", "a second writer")
        assert draft.path.is_dir()
        draft.finish(Note(text="the last one to finish"))
    assert "last one" in (tmp_path / "t" / "note.json").read_text()
    assert [p.name for p in tmp_path.iterdir()] == ["t"]
