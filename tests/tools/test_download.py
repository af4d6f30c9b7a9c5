"""``python -m tools download``: MONAI's downloader on tiny archives from a server on this machine."""

import hashlib
import io
import json
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from monai.apps import DecathlonDataset

import tools.download
from medmim.datasets import preset_table
from tools.download import download, find_task, presets_of_tasks

TASK = "Task09_Spleen"
LIST = json.dumps({"name": "Spleen", "licence": "CC-BY-SA 4.0", "training": []})
WHOLE = {f"{TASK}/dataset.json": LIST, f"{TASK}/imagesTr/spleen_1.nii.gz": "a scan"}


def write_tar(path: Path, files: dict[str, str], link: str | None = None) -> None:
    with tarfile.open(path, "w") as archive:
        for name, text in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(text)
            archive.addfile(entry, io.BytesIO(text.encode()))
        if link is not None:
            entry = tarfile.TarInfo(f"{TASK}/link")
            entry.type, entry.linkname = tarfile.SYMTYPE, link
            archive.addfile(entry)


class Silent(SimpleHTTPRequestHandler):
    def log_message(self, *args: Any) -> None: ...


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Path]]:
    """``served(files)`` puts an archive of one task on a server and into MONAI's table; returns its path there."""
    folder = tmp_path / "server"
    folder.mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Silent, directory=str(folder)))
    Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()

    def serve(files: dict[str, str] = WHOLE, md5: str | None = None, **options: Any) -> Path:
        path = folder / f"{TASK}.tar"
        write_tar(path, files, **options)
        md5 = md5 or hashlib.md5(path.read_bytes()).hexdigest()
        url = f"http://127.0.0.1:{server.server_port}/{path.name}"
        monkeypatch.setattr(DecathlonDataset, "resource", DecathlonDataset.resource | {TASK: url})
        monkeypatch.setattr(DecathlonDataset, "md5", DecathlonDataset.md5 | {TASK: md5})
        return path

    yield serve
    server.shutdown()
    server.server_close()


@pytest.fixture
def refused(tmp_path: Path, request: pytest.FixtureRequest) -> Callable[..., str]:
    """Runs the command, which must end with one line and leave nothing behind but what ``left`` names."""

    def run(task: str = TASK, left: tuple[str, ...] = ()) -> str:
        with pytest.raises(SystemExit) as ending:
            download(task, str(tmp_path / "data"))
        message = str(ending.value.code)
        request.node.user_properties.append(("error", message))
        assert message.startswith("error: ")
        assert "\n" not in message
        assert {path.name for path in (tmp_path / "data").glob("*")} == set(left)
        return message

    return run


def test_download(served: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    served()
    temporary = tempfile.tempdir
    download("spleen", str(tmp_path / "data"))
    folder = tmp_path / "data" / TASK
    found = {str(path.relative_to(tmp_path / "data")): path.read_text() for path in folder.rglob("*") if path.is_file()}
    assert found == WHOLE
    assert list((tmp_path / "data").iterdir()) == [folder]  # neither the archive nor anything half done
    assert tempfile.tempdir == temporary
    captured = capsys.readouterr()
    assert captured.err == ""
    assert captured.out.splitlines() == [
        f"{folder}: downloaded",
        "",
        "licence: CC-BY-SA 4.0",
        "cite:    Antonelli et al., The Medical Segmentation Decathlon, Nature Communications 13, 4128 (2022)",
        "",
        "Train next:",
        "  cd bundles/convvit_unetr_segmentation",
        f"  python -m monai.bundle run --config_file configs/train.yaml --dataset msd09_spleen --dataset_dir {folder}",
    ]


def test_the_bundle_to_train_next_is_there() -> None:
    bundles = Path(tools.download.__file__).parents[1] / "bundles"
    assert (bundles / tools.download.BUNDLE).is_dir()
    assert (bundles / tools.download.BUNDLE_OF_REGIONS).is_dir()


def test_what_is_there_is_not_downloaded_again(
    served: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    archive = served()
    download(TASK, str(tmp_path / "data"))
    archive.unlink()
    capsys.readouterr()
    download(TASK, str(tmp_path / "data"))
    out = capsys.readouterr().out
    assert out.startswith(f"{tmp_path / 'data' / TASK}: there already\n")
    assert "--dataset msd09_spleen" in out


def test_a_folder_without_list_is_not_taken_for_the_data(
    served: Callable[..., Path], tmp_path: Path, refused: Callable[..., str]
) -> None:
    served()
    (tmp_path / "data" / TASK / "imagesTr").mkdir(parents=True)
    message = refused(left=(TASK,))
    assert message.startswith(f"error: {tmp_path / 'data' / TASK}: there already, but without dataset.json: remove it")


def test_an_archive_that_lies_there_is_used_and_kept(
    served: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    archive = served()
    (tmp_path / "data").mkdir()
    archive.rename(tmp_path / "data" / archive.name)
    download(TASK, str(tmp_path / "data"))
    assert {path.name for path in (tmp_path / "data").iterdir()} == {TASK, f"{TASK}.tar"}


def test_leftovers_of_a_killed_run_are_removed(served: Callable[..., Path], tmp_path: Path) -> None:
    served()
    leftover = tmp_path / "data" / f".{TASK}.partial" / TASK / "old"
    leftover.mkdir(parents=True)
    download(TASK, str(tmp_path / "data"))
    assert [path.name for path in (tmp_path / "data").iterdir()] == [TASK]
    assert not (tmp_path / "data" / TASK / "old").exists()


def test_a_task_without_preset(
    served: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    served()
    monkeypatch.setattr(tools.download, "presets_of_tasks", dict)
    download(TASK, str(tmp_path / "data"))
    out = capsys.readouterr().out
    assert "There is no preset for it: write one of your own" in out
    assert "--dataset my_preset.yaml" in out


# ---------------------------------------------------------------------------------------------------------- refused


def test_another_hash(served: Callable[..., Path], refused: Callable[..., str]) -> None:
    served(md5="0" * 32)
    message = refused()
    assert DecathlonDataset.resource[TASK] in message
    assert f"another md5 than {'0' * 32}" in message
    assert message.endswith("nothing was kept: try again")


def test_another_hash_of_an_archive_that_lies_there(
    served: Callable[..., Path], tmp_path: Path, refused: Callable[..., str]
) -> None:
    served()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / f"{TASK}.tar").write_bytes(b"half of it")
    message = refused(left=(f"{TASK}.tar",))
    assert message.startswith(f"error: {tmp_path / 'data' / TASK}.tar: another md5")
    assert message.endswith("remove it")


@pytest.mark.parametrize("name", ["../evil.txt", f"{TASK}/../../evil.txt", "absolute"])
def test_an_archive_that_would_leave_its_folder(
    served: Callable[..., Path], tmp_path: Path, refused: Callable[..., str], name: str
) -> None:
    served(WHOLE | {str(tmp_path / "evil.txt") if name == "absolute" else name: "evil"})
    message = refused(left=(f"{TASK}.tar",))
    assert f"{TASK}.tar: not extracted (Unsafe path detected in archive" in message
    assert not (tmp_path / "evil.txt").exists()


def test_an_archive_with_a_link(served: Callable[..., Path], refused: Callable[..., str]) -> None:
    served(link="/etc/passwd")
    assert "not extracted (Symbolic link detected" in refused(left=(f"{TASK}.tar",))


@pytest.mark.parametrize("files", [{}, {f"{TASK}/imagesTr/1.nii.gz": "a"}, {"Task01_BrainTumour/dataset.json": LIST}])
def test_an_archive_of_something_else(
    served: Callable[..., Path], refused: Callable[..., str], files: dict[str, str]
) -> None:
    served(files)
    assert f"not extracted (it holds no {TASK}/dataset.json)" in refused(left=(f"{TASK}.tar",))


def test_no_archive(served: Callable[..., Path], refused: Callable[..., str]) -> None:
    path = served()
    path.write_bytes(b"this is not a tar" * 100)
    DecathlonDataset.md5[TASK] = hashlib.md5(path.read_bytes()).hexdigest()
    assert f"{TASK}.tar: not extracted (" in refused(left=(f"{TASK}.tar",))


def test_missing_on_the_server(served: Callable[..., Path], refused: Callable[..., str]) -> None:
    served().unlink()
    message = refused()
    assert message.startswith(f"error: {DecathlonDataset.resource[TASK]}: not downloaded (HTTP Error 404")


def test_no_server(served: Callable[..., Path], refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    served()
    monkeypatch.setitem(DecathlonDataset.resource, TASK, f"http://127.0.0.1:9/{TASK}.tar")
    assert refused().startswith(f"error: http://127.0.0.1:9/{TASK}.tar: not downloaded (")


def test_connection_that_breaks(
    served: Callable[..., Path], refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    served()
    monkeypatch.setattr(Silent, "copyfile", lambda self, source, out: out.write(source.read(100)))
    assert "not downloaded (" in refused()


def test_a_damaged_list(served: Callable[..., Path], tmp_path: Path, refused: Callable[..., str]) -> None:
    served(WHOLE | {f"{TASK}/dataset.json": "[]"})
    assert "not readable as a Decathlon list" in refused(left=(TASK,))


def test_a_folder_that_cannot_be_made(served: Callable[..., Path], tmp_path: Path) -> None:
    served()
    (tmp_path / "data").write_text("a file")
    with pytest.raises(SystemExit, match=r"^error: "):
        download(TASK, str(tmp_path / "data"))


# ------------------------------------------------------------------------------------------------------------ names


@pytest.mark.parametrize("task", ["Task09_Spleen", "task09_spleen", "spleen", "Spleen", "msd09_spleen"])
def test_names_of_a_task(task: str) -> None:
    assert find_task(task) == "Task09_Spleen"


@pytest.mark.parametrize(
    ("task", "near"),
    [("splen", "Task09_Spleen"), ("Task9_Spleen", "Task09_Spleen"), ("msd08_hepaticvessel", "Task08_HepaticVessel")],
)
def test_unknown_names_offer_the_nearest(refused: Callable[..., str], task: str, near: str) -> None:
    message = refused(task)
    assert message.startswith(f"error: {task}: no such task (did you mean {near}")
    assert all(name in message for name in DecathlonDataset.resource)


def test_a_name_like_no_other(refused: Callable[..., str]) -> None:
    assert refused("xyz").startswith("error: xyz: no such task; there are Task01_BrainTumour, ")


@pytest.mark.parametrize("name", ["btcv", "amos22", "phantom"])
def test_other_presets_say_where_their_data_are(refused: Callable[..., str], name: str) -> None:
    assert refused(name).endswith(f"its source: {preset_table()[name].source}")


def test_each_preset_of_the_decathlon_belongs_to_one_task() -> None:
    tasks = {name: preset.name for name, preset in presets_of_tasks().items()}
    assert tasks == {
        "Task01_BrainTumour": "msd_brain_tumour",
        "Task03_Liver": "msd03_liver",
        "Task04_Hippocampus": "hippocampus",
        "Task06_Lung": "msd06_lung",
        "Task07_Pancreas": "msd07_pancreas",
        "Task08_HepaticVessel": "msd08_hepatic_vessel",
        "Task09_Spleen": "msd09_spleen",
        "Task10_Colon": "msd10_colon",
    }
    assert all(preset.license == "CC-BY-SA-4.0" for preset in presets_of_tasks().values())
