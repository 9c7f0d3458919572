"""States of a disk: damaged files, a full or read-only disk, missing permissions; and how each is repaired."""

import ctypes
import hashlib
import json
import os
import random
import re
import shutil
import sqlite3
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

KEPT = "kept.txt"
"""A file of the user in a folder that is where a file belongs."""
FLIPS = 64
DEEP = 100_000
ODD_VALUES = (None, True, -1, 0, 2**70, 1e308, float("nan"), "", "../..", "é\n\x1b[31m", "x" * 300, [], [[]], {}, {"a": 1})

Damage = Callable[[Path, random.Random], None]


def truncated(path: Path, rng: random.Random) -> None:
    """Cut the file off."""
    os.truncate(path, rng.randrange(1, max(path.stat().st_size, 2)))


def flipped(path: Path, rng: random.Random) -> None:
    """Flip bits."""
    data = bytearray(path.read_bytes())
    for place in rng.sample(range(len(data)), min(FLIPS, len(data))):
        data[place] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def emptied(path: Path, rng: random.Random) -> None:
    """Leave no byte."""
    os.truncate(path, 0)


def missing(path: Path, rng: random.Random) -> None:
    """Delete the file."""
    path.unlink()


def folder(path: Path, rng: random.Random) -> None:
    """Put a folder in its place, with a file of the user."""
    path.unlink(missing_ok=True)
    path.mkdir(parents=True)
    (path / KEPT).write_text("keep me")


def loop(path: Path, rng: random.Random) -> None:
    """Put a link to itself in its place."""
    path.unlink()
    path.symlink_to(path.name)


def other(path: Path, rng: random.Random) -> None:
    """Write other JSON."""
    path.write_text(rng.choice(("[]", "null", '{"a": 1}', '"text"', "{", "1e999", '{"format": {}}', "\ufeff{}", "[NaN]")))


def deep(path: Path, rng: random.Random) -> None:
    """Write JSON that is nested too deeply."""
    path.write_text("[" * DEEP)


def odd(path: Path, rng: random.Random) -> None:
    """Change one value, as an editor would: the checksum is removed."""
    entries = json.loads(path.read_bytes())
    if isinstance(entries, dict):
        entries.pop("checksum", None)
    places = list(_places(entries))
    if places:
        holder, key = rng.choice(places)
        holder[key] = rng.choice(ODD_VALUES)
    path.write_text(json.dumps(entries))


def _places(value: Any) -> Any:
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield value, key
        yield from _places(inner)


def newer(path: Path, rng: random.Random) -> None:
    """Raise the number of the format."""
    _change_format(path, 1)


def older(path: Path, rng: random.Random) -> None:
    """Lower the number of the format."""
    _change_format(path, -1)


def _change_format(path: Path, change: int) -> None:
    if path.suffix == ".json":
        entries = json.loads(path.read_bytes())
        if isinstance(entries, dict) and isinstance(entries.get("format"), int):
            entries["format"] += change
            entries.pop("checksum", None)
        path.write_text(json.dumps(entries))
    elif path.suffix == ".safetensors":

        def changed(match: re.Match[bytes]) -> bytes:
            return b'format%s": %s%d' % (match[1], match[2], (int(match[3]) + change) % 10)

        path.write_bytes(re.sub(rb'format(\\?)": (\\?"?)(\d)', changed, path.read_bytes(), count=1))
    else:
        with sqlite3.connect(path) as connection:
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            connection.execute(f"PRAGMA user_version = {version + change}")
        connection.close()


def nan(path: Path, rng: random.Random) -> None:
    """Write NaN in place of every floating-point number; the checksum fits."""
    data = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    for name, entry in json.loads(data[8:start]).items():
        if name != "__metadata__" and entry["dtype"] in ("F64", "F32", "F16", "BF16"):
            first, end = entry["data_offsets"]
            data[start + first : start + end] = b"\xff" * (end - first)
    if match := re.search(rb'sha256\\": \\"([0-9a-f]{64})', data[:start]):
        data[match.start(1) : match.end(1)] = b"0" * 64
        data[match.start(1) : match.end(1)] = hashlib.sha256(data).hexdigest().encode()
    path.write_bytes(data)


def swapped(path: Path, rng: random.Random) -> None:
    """Put a healthy file of another place of the study there."""
    top = _top(path)
    others = sorted(file for file in top.rglob(f"*{path.suffix}") if file.is_file() and file.read_bytes() != path.read_bytes())
    if others:
        shutil.copy(rng.choice(others), path)


def _top(path: Path) -> Path:
    """Return the study or model that a file belongs to; its folder if none."""
    return next((parent for parent in path.parents if parent.name in ("study", "ran", "model")), path.parent)


def unreadable(path: Path, rng: random.Random) -> None:
    """Take away the permission to read and write it."""
    path.chmod(0)


def locked_folder(path: Path, rng: random.Random) -> None:
    """Take away the permission to write in its folder."""
    path.parent.chmod(0o555)


def closed_folder(path: Path, rng: random.Random) -> None:
    """Take away the permission to enter its folder."""
    path.parent.chmod(0)


def locked_study(path: Path, rng: random.Random) -> None:
    """Take away all permissions to write in the study."""
    top = _top(path)
    for place in sorted(top.rglob("*")):
        if not place.is_symlink():
            place.chmod(0o555 if place.is_dir() else 0o444)
    top.chmod(0o555)


def occupied(path: Path, rng: random.Random) -> None:
    """Put a folder where a result belongs."""
    if not path.exists():
        folder(path, rng)


def blocked(path: Path, rng: random.Random) -> None:
    """Put a file where the folder of a result belongs."""
    if not path.parent.exists():
        path.parent.parent.mkdir(parents=True, exist_ok=True)
        path.parent.write_text("keep me")


EVERY: tuple[Damage, ...] = (truncated, flipped, emptied, missing, folder, loop, swapped)
"""Damages of any file."""
OF_KIND: dict[str, tuple[Damage, ...]] = {
    ".json": (other, deep, odd, odd, newer, older),
    ".safetensors": (newer, older, nan),
    ".sqlite": (newer, older),
}
"""Further ones by the ending of the file."""


def damages(path: str) -> tuple[Damage, ...]:
    """Return what can happen to the file at `path`."""
    return EVERY + OF_KIND.get(Path(path).suffix, ())


def copy(original: Path, target: Path) -> None:
    """Copy a folder with its links."""
    shutil.copytree(original, target, symlinks=True, dirs_exist_ok=True)


def restore(original: Path, target: Path, place: str | None) -> None:
    """Give back all permissions in `target`, and make `place` in it what it is in `original`."""
    for root, _, names in os.walk(target):
        for path in (root, *(os.path.join(root, name) for name in [*os.listdir(root), *names])):
            if not os.path.islink(path):
                os.chmod(path, 0o755 if os.path.isdir(path) else 0o644)
    if place is None:
        return
    path, healthy = target / place, original / place
    while not path.parent.is_dir():
        path.parent.unlink() if path.parent.exists() else path.parent.mkdir(parents=True)
    if not healthy.exists() and (path.is_file() or not path.exists()):
        return  # a result, which may be there already
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    for ending in ("", "-wal", "-shm"):  # the log of a damaged database does not belong to the healthy one
        path.with_name(path.name + ending).unlink(missing_ok=True)
    if healthy.exists():
        shutil.copy2(healthy, path)


class Mounts:
    """File systems of this process alone: a small one that can be full, and one that cannot be written."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self.allowed = sys.platform == "linux" and self._unshare()

    def _unshare(self) -> bool:
        user, mount, private = 0x10000000, 0x20000, 0x4000 | 0x40000
        owner, group = os.getuid(), os.getgid()
        if self._libc.unshare(mount | (user if owner else 0)) != 0:
            return False
        if owner:
            Path("/proc/self/setgroups").write_text("deny")
            Path("/proc/self/uid_map").write_text(f"0 {owner} 1")
            Path("/proc/self/gid_map").write_text(f"0 {group} 1")
        return self._mount(None, Path("/"), None, private, None)

    def _mount(self, source: Path | None, target: Path, kind: str | None, flags: int, options: str | None) -> bool:
        words = [None if word is None else os.fsencode(word) for word in (source, target, kind)]
        return self._libc.mount(*words, ctypes.c_ulong(flags), None if options is None else options.encode()) == 0

    def small(self, target: Path) -> None:
        """Mount an empty file system in memory on `target`."""
        assert self._mount(Path("none"), target, "tmpfs", 0, "size=1g"), "no tmpfs"

    def leave_free(self, target: Path, free: int | None) -> None:
        """Let the file system on `target` have `free` bytes left; None: plenty."""
        status = os.statvfs(target)
        used = (status.f_blocks - status.f_bfree) * status.f_frsize
        size = 2**30 if free is None else max(used + free, 4096)
        assert self._mount(None, target, None, 32, f"size={size}"), "no other size"

    def read_only(self, target: Path, on: bool) -> None:
        """Let nothing be written in `target`, or everything again."""
        bind, remount, readonly = 4096, 32, 1
        if on:
            assert self._mount(target, target, None, bind, None), "no bind mount"
        assert self._mount(None, target, None, bind | remount | (readonly if on else 0), None), "no remount"

    def unmount(self, target: Path) -> None:
        """Undo the last mount on `target`."""
        self._libc.umount2(os.fsencode(target), 2)
