"""The manifest of preprocess.py: a JSON object per input file and line, in one file or in one file per shard.

    lines = manifests.read_lines(Path("chunks/manifest.jsonl"))    # by source, while preprocess.py runs
    songs = manifests.read_songs(Path("chunks"))                   # of all shards, when it has finished

Until a run has finished, an empty file `NAME.unfinished` lies beside its manifest `NAME` (`manifest.jsonl`, or
`manifest.I-of-N.jsonl` of a shard).
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from continuation import files
from continuation.cli import UsageError
from continuation.dataset import check_id, check_keys

_SONG_KEYS = {
    "id": str,
    "source": str,
    "sha256": str,
    "chunks": int,
    "rms": (int, float),
    "silent_share": (int, float),
    "fingerprint": str,
}


def file_name(shard: tuple[int, int] | None) -> str:
    """Return the name of the manifest of shard (I, N), or of a run without shards."""
    return f"manifest.{shard[0]}-of-{shard[1]}.jsonl" if shard else "manifest.jsonl"


def unfinished_mark(path: Path) -> Path:
    """Return the file that marks a manifest as unfinished, from the start of preprocess.py until all is done."""
    return path.with_name(f"{path.name}.unfinished")


# While preprocess.py runs


def read_lines(path: Path) -> dict[str, dict]:
    """Read the lines of a manifest by source; damaged lines are left out, so that their songs are redone."""
    lines = filter(None, files.read_jsonl(path))
    return {line["source"]: line for line in lines if isinstance(line.get("source"), str)}


def read_all_lines(folder: Path, shard: tuple[int, int] | None) -> dict[str, dict]:
    """Read the lines of all shards by source, since added files may move a song to another shard.

    Raises UsageError when the folder was filled with another number of shards.
    """
    names = [file_name((index, shard[1])) for index in range(shard[1])] if shard else [file_name(None)]
    for path in folder.glob("manifest*.jsonl"):
        if path.name not in names:
            raise UsageError(f"{path} comes from a run with other shards: take another folder")
    lines = {}
    for name in names:
        lines |= read_lines(folder / name)
    return lines


def write_lines(path: Path, lines: dict[str, dict]) -> None:
    """Write the whole manifest, sorted by source."""
    files.write_atomic(path, "".join(json.dumps(lines[source]) + "\n" for source in sorted(lines)))


def append_line(path: Path, line: dict) -> None:
    """Append one line and flush it to the disk; on an error the file is as before."""
    with open(path, "ab", buffering=0) as file:
        size = file.tell()
        data = json.dumps(line).encode("ascii") + b"\n"
        try:
            if file.write(data) != len(data):
                raise OSError(f"{path}: the disk is full")
            os.fsync(file.fileno())
        except OSError:
            file.truncate(size)
            raise


# When preprocess.py has finished


def read_songs(folder: Path) -> list[dict]:
    """Read the lines of all songs with status 'ok', sorted by id.

    Raises UsageError for a missing shard, and for a damaged or duplicate line.
    """
    lines: dict[str, dict] = {}
    for path in find_files(folder):
        for number, line in enumerate(files.read_jsonl(path), 1):
            _check_line(line, f"{path}, line {number},")
            if line["status"] != "ok":
                continue
            if line["id"] in lines:
                raise UsageError(f"{path}: {line['id']} is in two manifests: run preprocess.py on all shards")
            lines[line["id"]] = line
    return [lines[key] for key in sorted(lines)]


def find_files(folder: Path) -> list[Path]:
    """Return manifest.jsonl, or manifest.I-of-N.jsonl for every I.

    Raises UsageError for an incomplete or mixed set, and while songs are missing.
    """
    names = sorted(path.name for path in folder.glob("manifest*.jsonl"))
    if not names:
        raise UsageError(f"{folder} holds no manifest: run preprocess.py first")
    for name in names:
        if (mark := unfinished_mark(folder / name)).exists():
            raise UsageError(f"{mark} says that songs are missing: run preprocess.py again, to its end")
    if names == ["manifest.jsonl"]:
        return [folder / "manifest.jsonl"]
    counts = {match[1] for name in names if (match := re.fullmatch(r"manifest\.\d+-of-(\d+)\.jsonl", name))}
    wanted = [f"manifest.{i}-of-{count}.jsonl" for count in counts for i in range(int(count))]
    if missing := [name for name in wanted if name not in names]:
        raise UsageError(f"{folder} lacks {', '.join(missing)}: run these shards of preprocess.py")
    if len(counts) != 1 or set(names) != set(wanted):
        raise UsageError(f"{folder} holds the manifests of different runs: {', '.join(names)}")
    return [folder / name for name in wanted]


def _check_line(line: dict | None, where: str) -> None:
    if line is None:
        raise UsageError(f"{where} is damaged: run preprocess.py again")
    check_keys(line, {"status": str}, where)
    if line["status"] == "ok":
        check_keys(line, _SONG_KEYS, where)
        check_id(line["id"], where)
        if line["chunks"] < 1:
            raise UsageError(f"{where} is damaged: {line['chunks']} chunks")
