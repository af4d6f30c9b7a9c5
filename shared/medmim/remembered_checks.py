"""Checks that read every file once, each process a share, and remember the files that were found good."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import ignite.distributed as idist
from tqdm import tqdm

from medmim.datalists import Item
from medmim.files import replace_file
from medmim.transforms import ScanError

Found = dict[str, Any]


def check_each(
    items: Sequence[Item],
    check: Callable[[Item], Found],
    keys: Collection[str],
    rules: str,
    remember: str | Path | None = None,
) -> list[Found]:
    """What each item is like; only new and changed files are read.

    Args:
        items: scans or radiographs.
        check: what one item is like, plain values; raises ``ScanError`` for one that cannot be used.
        keys: of what ``check`` gives.
        rules: text that changes with what is asked of the files.
        remember: file in which the good ones are remembered (path, size and time of each).

    Raises:
        ScanError: one line for each faulty item, and how many there are.
    """
    known = {} if remember is None else _read_remembered(Path(remember), {"state", *keys})
    share = items[idist.get_rank() :: idist.get_world_size()]
    found: dict[str, Any] = {}
    for item in tqdm(share, desc="checking scans", disable=None, leave=False):
        key = _name(item)
        try:
            state = [rules, *_file_state(item)]
            good = known.get(key, {}).get("state") == state
            found[key] = known[key] if good else {"state": state} | check(item)
        except (ScanError, OSError) as error:
            found[key] = str(error)
    if idist.get_world_size() > 1:
        shares: Any = idist.all_gather(found)
        found = {key: entry for share in shares for key, entry in share.items()}
    entries = [found[_name(item)] for item in items]
    if remember is not None and idist.get_rank() == 0:
        good_ones = {key: entry for key, entry in found.items() if not isinstance(entry, str)}
        replace_file(remember, lambda path: path.write_text(json.dumps(known | good_ones)))
    faults = [entry for entry in entries if isinstance(entry, str)]
    if faults:
        summary = [f"{len(faults)} of {len(items)} scans cannot be used"] if len(faults) > 1 else []
        raise ScanError("\n".join([*faults, *summary]))
    return entries


def _name(item: Item) -> str:
    return json.dumps([item["image"], _label_file(item)])


def has_label_map(item: Item) -> bool:
    """Whether the label is a file; that of a classification is a list of numbers."""
    return isinstance(item.get("label"), str)


def _label_file(item: Item) -> str | None:
    return item["label"] if has_label_map(item) else None


def _read_remembered(path: Path, whole: set[str]) -> dict[str, Found]:
    """What an earlier run found good; nothing when the file is missing or damaged: all is read again."""
    try:
        known = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    entries = known.items() if isinstance(known, dict) else ()
    return {key: entry for key, entry in entries if isinstance(entry, dict) and entry.keys() == whole}


def _file_state(item: Item) -> list[int]:
    paths = [item["image"]] if isinstance(item["image"], str) else list(item["image"])
    label = _label_file(item)
    stats = [os.stat(path) for path in [*paths, *([label] if label else [])]]
    return [number for stat in stats for number in (stat.st_size, stat.st_mtime_ns)]
