"""Files are old or new, never half written."""

import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from medmim.files import WriteError, remove_leftovers, replace_file, save_tensors


def in_a_fork(action: Callable[[], str]) -> tuple[int, str]:
    """Exit status of a process of its own that does something, and what that returned."""
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        try:
            os.write(writing, action().encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        said = pipe.read()
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), said


def test_file_is_written_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "file.txt"
    for text in ("first", "second"):
        replace_file(str(path), lambda temporary, text=text: temporary.write_text(text))
        assert path.read_text() == text
        assert list(path.parent.iterdir()) == [path]


def test_old_file_is_there_while_the_new_one_is_written(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")

    def write(temporary: Path) -> None:
        assert temporary != path
        assert temporary.parent == path.parent
        temporary.write_text("new")
        assert path.read_text() == "old"

    replace_file(path, write)
    assert path.read_text() == "new"


@pytest.mark.parametrize("error", [OSError("disk full"), RuntimeError("a bug"), KeyboardInterrupt()])
@pytest.mark.parametrize("keep", [False, True])
def test_failure_leaves_the_old_file_and_no_rest(tmp_path: Path, error: BaseException, keep: bool) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")

    def write(temporary: Path) -> None:
        temporary.write_text("ha")
        raise error

    with pytest.raises(WriteError if isinstance(error, OSError) else type(error)):  # others are none of the disk's
        replace_file(path, write, tmp_path / "before.txt" if keep else None)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_message_names_file_and_reason(tmp_path: Path) -> None:
    def write(temporary: Path) -> None:
        try:
            raise OSError(28, "No space left on device")
        finally:  # as torch.save does
            raise RuntimeError("unexpected pos 64 vs 0")

    path = tmp_path / "checkpoint.pt"
    with pytest.raises(WriteError) as error:
        replace_file(path, write)
    assert str(error.value).startswith(f"{path}: cannot be written (No space left on device); nothing is left of it: ")
    path.touch()
    with pytest.raises(WriteError, match="; the one before is untouched: "):
        replace_file(path, write)


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="needs a limit on the size of files")
@pytest.mark.parametrize("what", ["tensors", "bytes"])
def test_full_disk(tmp_path: Path, what: str, record_property: Callable) -> None:
    """The system refuses to write more, for real."""
    path = tmp_path / "file.pt"
    path.write_bytes(b"the one before")

    def write() -> str:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            if what == "tensors":
                save_tensors(path, {"weight": torch.zeros(1_000_000)}, keep=path.with_name("previous.pt"))
            else:
                replace_file(path, lambda temporary: temporary.write_bytes(bytes(1_000_000)))
        except WriteError as error:
            return str(error)
        return "written"

    _, said = in_a_fork(write)
    assert said.startswith(f"{path}: cannot be written (File too large); the one before is untouched: free space")
    assert "\n" not in said
    assert path.read_bytes() == b"the one before"
    assert list(tmp_path.iterdir()) == [path]
    record_property("error", said)


def test_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match=r"cannot be written \((Not a directory|File exists)\); nothing is left of it"):
        save_tensors(tmp_path / "file" / "below" / "a.pt", {})


def test_replaced_file_is_kept(tmp_path: Path) -> None:
    path, before = tmp_path / "file.txt", tmp_path / "before.txt"
    states = []
    for text in ("first", "second", "third"):
        replace_file(path, lambda temporary, text=text: temporary.write_text(text), keep=before)
        states.append((path.read_text(), before.read_text() if before.exists() else None))
    assert states == [("first", None), ("second", "first"), ("third", "second")]
    assert sorted(tmp_path.iterdir()) == [before, path]


def test_one_of_two_files_is_whole_at_any_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, before = tmp_path / "file.txt", tmp_path / "before.txt"
    for text in ("first", "second"):
        replace_file(path, lambda temporary, text=text: temporary.write_text(text), keep=before)
    seen, replace = [], Path.replace

    def watch(self: Path, target: Path) -> Path:
        seen.append({p.read_text() for p in (path, before) if p.exists()})
        result = replace(self, target)
        seen.append({p.read_text() for p in (path, before) if p.exists()})
        return result

    monkeypatch.setattr(Path, "replace", watch)
    replace_file(path, lambda temporary: temporary.write_text("third"), keep=before)
    assert seen == [{"first", "second"}, {"second"}, {"second"}, {"second", "third"}]


def test_content_is_on_the_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done, fsync, replace = [], os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: (done.append("flush"), fsync(descriptor)))
    monkeypatch.setattr(Path, "replace", lambda self, target: (done.append("rename"), replace(self, target))[1])
    replace_file(tmp_path / "file.txt", lambda temporary: temporary.write_text("text"))
    assert done == ["flush", "rename", "flush"]  # the file, its name, the folder


def test_leftovers_of_killed_processes_are_removed(tmp_path: Path) -> None:
    path = tmp_path / "check[1].pt"
    keep = [path, tmp_path / ".check[1].pt", tmp_path / ".other.pt.77.tmp", tmp_path / "check[1].pt.77.tmp"]
    for file in [*keep, tmp_path / ".check[1].pt.77.tmp", tmp_path / ".check[1].pt.4242.tmp"]:
        file.touch()
    remove_leftovers(path, tmp_path / "missing.pt")
    assert sorted(tmp_path.iterdir()) == sorted(keep)


def test_leftover_has_the_name_that_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "file.pt"
    path.write_text("old")

    def write(temporary: Path) -> None:
        temporary.write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)

    assert in_a_fork(lambda: replace_file(path, write))[0] == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 2
    remove_leftovers(path)
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {"file.pt": "old"}


def test_equal_content_gives_equal_bytes(tmp_path: Path) -> None:
    content = {"weight": torch.arange(5.0), "epoch": 3, "name": "a"}
    for name in ("first.pt", "another_name.pt", "third.pt"):
        save_tensors(tmp_path / name, content if name != "third.pt" else content | {"epoch": 4})
    first, second, third = ((tmp_path / name).read_bytes() for name in ("first.pt", "another_name.pt", "third.pt"))
    assert first == second != third
    assert torch.equal(torch.load(tmp_path / "first.pt", weights_only=True)["weight"], torch.arange(5.0))
