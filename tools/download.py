"""Data sets of the Medical Segmentation Decathlon, with MONAI's addresses, hashes and downloader."""

from __future__ import annotations

import json
import logging
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from http.client import HTTPException
from pathlib import Path

from monai.apps import DecathlonDataset
from monai.apps.utils import HashCheckError, download_url, extractall

from medmim.commands import ends_plainly
from medmim.datasets import Preset, preset_table

BUNDLE = "convvit_unetr_segmentation"
BUNDLE_OF_REGIONS = "unetr_brain_tumor_segmentation"


@ends_plainly
def download(task: str, output_dir: str = "data") -> None:
    """Download a data set that is given away without an account: any task of the Medical Segmentation Decathlon.

    Nothing is left in output_dir unless the hash of the archive is right and all of it was extracted. An archive
    TASK.tar that lies in output_dir already is used, and stays there.

    Args:
        task: name of the task or of its preset: Task09_Spleen, msd09_spleen or spleen.
        output_dir: where the folder TASK goes; needs space for the archive and its content.
    """
    name = find_task(str(task))
    folder = Path(str(output_dir)) / name
    if (folder / "dataset.json").is_file():
        print(f"{folder}: there already\n")
    elif folder.exists():
        raise ValueError(
            f"{folder}: there already, but without dataset.json: remove it, or choose another --output_dir"
        )
    else:
        fetch(name, folder)
        print(f"{folder}: downloaded\n")
    print(what_next(name, folder))


def find_task(task: str) -> str:
    """Name of a task in MONAI's table.

    Args:
        task: the name itself, its last word (``spleen``), or the name of a preset; upper and lower case are the same.

    Raises:
        ValueError: for data that this command cannot get; says where they are, or offers the nearest names.
    """
    names = {name.lower(): name for name in DecathlonDataset.resource}
    names |= {name.split("_")[1].lower(): name for name in DecathlonDataset.resource}
    names |= {preset.name: name for name, preset in presets_of_tasks().items()}
    if task.lower() in names:
        return names[task.lower()]
    other = preset_table().get(task.lower())
    if other is not None:
        raise ValueError(f"{other.name}: no task of the Medical Segmentation Decathlon; its source: {other.source}")
    close = list(dict.fromkeys(names[near] for near in get_close_matches(task.lower(), names, n=3)))
    hint = f" (did you mean {' or '.join(close)}?)" if close else ""
    raise ValueError(f"{task}: no such task{hint}; there are {', '.join(DecathlonDataset.resource)}")


def presets_of_tasks() -> dict[str, Preset]:
    """The preset for each task that has one; its ``source`` names the task."""
    presets = preset_table().values()
    return {name: preset for name in DecathlonDataset.resource for preset in presets if name in preset.source}


def fetch(name: str, folder: Path) -> None:
    """Download and extract a task; see :func:`download`.

    MONAI's ``download_and_extract`` would do the two steps in one, but it needs the package requests, and leaves what
    it has extracted when it fails half way.

    Raises:
        ValueError: when that fails, in one line; nothing is left but an archive whose hash is right.
    """
    url, md5 = DecathlonDataset.resource[name], DecathlonDataset.md5[name]
    archive = folder.with_name(f"{name}.tar")
    was_there = archive.exists()
    partial = folder.with_name(f".{name}.partial")  # on the same disk, so that what is whole can be renamed
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    partial.mkdir(parents=True)
    try:
        with quiet_monai(partial):
            download_url(url, archive, hash_val=md5, hash_type="md5", progress=sys.stderr.isatty())
            if not archive.is_file():  # MONAI goes on where it may not write
                raise PermissionError(f"{archive} could not be written: choose another --output_dir")
            extractall(archive, partial)
        if not (partial / name / "dataset.json").is_file():
            raise ValueError(f"it holds no {name}/dataset.json")
        (partial / name).rename(folder)
    except HashCheckError as error:
        what = archive if was_there else url
        do = "remove it" if was_there else "nothing was kept: try again"
        raise ValueError(f"{what}: another md5 than {md5}, so it is damaged or not the right file: {do}") from error
    except (OSError, RuntimeError, ValueError, HTTPException, tarfile.TarError) as error:
        failed = f"{archive}: not extracted" if archive.is_file() else f"{url}: not downloaded"
        raise ValueError(f"{failed} ({' '.join(str(error).split()) or type(error).__name__})") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    if not was_there:
        archive.unlink()


@contextmanager
def quiet_monai(temporary: Path) -> Iterator[None]:
    """MONAI's downloader without its log, and with its temporary files in a folder that has space for them."""
    logger = logging.getLogger("monai.apps")
    level, folder = logger.level, tempfile.tempdir
    logger.setLevel(logging.CRITICAL + 1)
    tempfile.tempdir = str(temporary)
    try:
        yield
    finally:
        tempfile.tempdir = folder
        logger.setLevel(level)


def what_next(name: str, folder: Path) -> str:
    """Licence, citation and the command to train.

    Raises:
        ValueError: when ``dataset.json`` is damaged.
    """
    path = folder / "dataset.json"
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        licence = about.get("licence") or about.get("license") or "not said in its dataset.json"
    except (ValueError, AttributeError) as error:
        raise ValueError(
            f"{path}: not readable as a Decathlon list ({error}): remove {folder}, and try again"
        ) from error
    preset = presets_of_tasks().get(name)
    citation = "" if preset is None else f"cite:    {preset.citation}\n"
    dataset = "my_preset.yaml" if preset is None else preset.name
    own = "There is no preset for it: write one of your own (README, Your own scans).\n" if preset is None else ""
    bundle = BUNDLE if preset is None or not preset.regions else BUNDLE_OF_REGIONS
    train = f"python -m monai.bundle run --config_file configs/train.yaml --dataset {dataset}"
    return (
        f"licence: {licence}\n{citation}\n{own}Train next:\n"
        f"  cd bundles/{bundle}\n  {train} --dataset_dir {folder.resolve()}"
    )
