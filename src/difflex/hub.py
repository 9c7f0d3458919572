"""The Hugging Face hub: snapshots of repositories whose files are checked, and commits to them.

The token is the one that `hf auth login` or HF_TOKEN provides; it is read by `huggingface_hub` alone, and never shown or stored.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from glob import escape
from pathlib import Path, PurePosixPath
from typing import Literal, NamedTuple

from difflex.dictionary_config import CONFIG, TENSORS
from difflex.errors import BadInput, BrokenFile, UnknownName
from difflex.files import CHUNK, read_json, write_json
from difflex.records import Site

__all__ = [
    "HubDictionary",
    "HubOrigin",
    "check_repository",
    "commit_files",
    "dictionary_snapshot",
    "list_dictionaries",
    "prepare_repository",
    "read_hub_origin",
    "snapshot",
    "write_hub_origin",
]

NAME = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}")
LOG_IN = "Log in with `hf auth login` or set HF_TOKEN to a token that may use it"
ORIGIN, FORMAT = "hub.json", 1
"""The file beside a pulled dictionary that says where it is from."""
GIT_SHA1, SHA256 = 40, 64
"""Digits of the checksums that the cache of the hub names files by: of small files and of large ones."""


def snapshot(
    name: str,
    revision: str | None = None,
    offline: bool = False,
    files: Sequence[str] = (),
    kind: Literal["model", "dataset"] = "model",
) -> Path:
    """Return the folder of a repository of the hub in the local cache, named by its commit, after downloading what is missing.

    `files` are patterns of the files to download, such as `*/config.json`; all if it is empty. `offline` takes everything from
    the cache. Every file is compared with its checksum; a damaged one is deleted from the cache and refused.
    """
    from huggingface_hub import HfApi, constants, snapshot_download

    check_repository(name)
    offline, patterns = offline or constants.HF_HUB_OFFLINE, list(files) or None
    with _hub_errors(name, revision, offline):
        paths = [] if offline else HfApi().list_repo_files(name, revision=revision, repo_type=kind)
    _check_paths(name, paths)
    with _hub_errors(name, revision, offline):
        options = {"revision": revision, "local_files_only": offline, "allow_patterns": patterns, "repo_type": kind}
        folder = Path(snapshot_download(name, **options))
    places = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    chosen = {place: path for place, path in places.items() if any(fnmatchcase(place, pattern) for pattern in files or "*")}
    if damaged := [place for place, path in chosen.items() if _is_damaged(path)]:
        raise BrokenFile(
            f"{', '.join(damaged[:5])} of {name} did not match the checksum, so the download was damaged, and is deleted. Run it "
            "again."
        )
    return folder


class HubDictionary(NamedTuple):
    """A dictionary of a repository, downloaded to the local cache."""

    repository: str
    commit: str
    site: Site
    label: str
    folder: Path


def dictionary_snapshot(
    name: str, site: Site | str | None = None, label: str | None = None, revision: str | None = None, offline: bool = False
) -> HubDictionary:
    """Download one dictionary of a repository; `site` and `label` may be left out where only one dictionary fits."""
    commit, known = _list_dictionaries(name, revision, offline)
    wanted = None if site is None else Site.parse(site)
    fitting = {place: pair for place, pair in known.items() if wanted in (None, pair[0])}
    if not fitting:
        raise UnknownName.among(f"In {name} the site", str(wanted), dict.fromkeys(str(each) for each, _ in known.values()))
    labelled = {place: pair for place, pair in fitting.items() if label in (None, pair[1])}
    if not labelled:
        raise UnknownName.among(f"In {name} the label", str(label), dict.fromkeys(each for _, each in fitting.values()))
    if len(labelled) > 1:
        names = ", ".join(f"{each}/{one}" for each, one in labelled.values())
        raise BadInput(f"{name} has {len(labelled)} dictionaries that fit. Give the site and the label of one of them: {names}.")
    [(place, (found, one))] = labelled.items()
    folder = snapshot(name, commit if revision else None, offline, [f"{escape(place)}/*"])
    if not (folder / place / TENSORS).is_file():
        raise BrokenFile(f"The dictionary {found}/{one} in {name} has no {TENSORS}: it was not pushed whole. Ask its owner.")
    return HubDictionary(name, folder.name, found, one, folder / place)


def list_dictionaries(name: str, revision: str | None = None, offline: bool = False) -> list[tuple[Site, str]]:
    """Return the sites and labels of all dictionaries of a repository."""
    return [*_list_dictionaries(name, revision, offline)[1].values()]


def _list_dictionaries(name: str, revision: str | None, offline: bool) -> tuple[str, dict[str, tuple[Site, str]]]:
    """Return the commit of a repository, and the site and label of each dictionary by its folder."""
    folder = snapshot(name, revision, offline, [f"*/*/{CONFIG}"])
    configs = {path.parent.relative_to(folder).as_posix(): path for path in sorted(folder.glob(f"*/*/{CONFIG}"))}
    sites = {place: _read_site(path) for place, path in configs.items()}
    known = {place: (site, place.partition("/")[2]) for place, site in sites.items() if site is not None}
    if not known:
        raise UnknownName(
            f"The repository {name} has no dictionaries of difflex: no folder SITE/LABEL with a {CONFIG}. "
            "difflex import reads the formats of other tools."
        )
    return folder.name, known


class HubOrigin(NamedTuple):
    """Where a dictionary of a study was pulled from."""

    repository: str
    commit: str


def write_hub_origin(folder: Path, origin: HubOrigin) -> None:
    """Note in the folder of a dictionary where it was pulled from."""
    write_json(folder / ORIGIN, FORMAT, origin._asdict())


def read_hub_origin(folder: Path) -> HubOrigin | None:
    """Return where the dictionary in `folder` was pulled from; None if it was not."""
    if not (folder / ORIGIN).is_file():
        return None
    entries = read_json(folder / ORIGIN, FORMAT, "Pull the dictionary again.")
    return HubOrigin(str(entries.get("repository")), str(entries.get("commit")))


def check_repository(name: str) -> None:
    """Raise an error unless `name` is OWNER/NAME."""
    if not isinstance(name, str) or not NAME.fullmatch(name) or ".." in name:
        raise BadInput(f"'{str(name)[:200]}' is not the name of a repository. Write OWNER/NAME: acme/flux-dictionaries.")


def prepare_repository(name: str, private: bool, revision: str | None) -> str | None:
    """Make the repository and the branch `revision` unless they exist; return the latest commit there."""
    from huggingface_hub import HfApi

    api = HfApi()
    with _hub_errors(name, None, False):
        api.create_repo(name, private=private or None, exist_ok=True)
        if revision is not None:
            api.create_branch(name, branch=revision, exist_ok=True)
        return api.model_info(name, revision=revision).sha


def commit_files(name: str, files: Mapping[str, Path], message: str, revision: str | None, parent: str | None) -> str:
    """Upload files by their place in the repository in one commit on top of `parent`, and return the commit."""
    from huggingface_hub import CommitOperationAdd, HfApi

    operations = [CommitOperationAdd(place, path) for place, path in files.items()]
    with _hub_errors(name, revision, False):
        commit = HfApi().create_commit(
            name, operations, commit_message=message, revision=revision, parent_commit=parent, repo_type="model"
        )
    return commit.oid


@contextmanager
def _hub_errors(name: str, revision: str | None, offline: bool) -> Iterator[None]:
    """Turn the errors of the client of the hub into one that says what to do."""
    from huggingface_hub import errors

    at = f" at revision {revision}" if revision else ""
    try:
        yield
    except errors.GatedRepoError as error:
        raise UnknownName(f"Access to {name} must be requested on its page on the hub. {LOG_IN}.") from error
    except errors.RevisionNotFoundError as error:
        raise UnknownName(f"The repository {name} has no revision {revision}. Name a branch, a tag or a commit of it.") from error
    except errors.LocalEntryNotFoundError as error:
        where = "is not in the local cache" if offline else "cannot be reached, and is not in the local cache"
        advice = "Run it once without --offline." if offline else "Check the connection to the hub."
        raise UnknownName(f"The repository {name}{at} {where}, or not all of it. {advice}") from error
    except errors.HfHubHTTPError as error:
        raise _refusal(name, error.response.status_code, error) from error
    except Exception as error:  # of whatever package the client uses for HTTP
        reason = _first_line(error.__cause__ or error).rstrip(".")
        raise UnknownName(
            f"The hub cannot be used for {name}{at}: {reason}. Check the connection and run it again: a download that was cut "
            "off continues."
        ) from error


def _refusal(name: str, status: int, error: Exception) -> UnknownName | BadInput:
    """Return the error for a status code of the hub."""
    if status in (401, 403):
        from huggingface_hub import get_token

        state = "The hub does not accept the token, or it may not do this" if get_token() else "There is no token"
        return UnknownName(f"{name} is private, is someone else's or does not exist. {state}. {LOG_IN}.")
    if status == 404:
        return UnknownName(f"The repository {name} does not exist on the hub, or is private. Check its name. {LOG_IN}.")
    if status in (409, 412):
        return BadInput(f"{name} has changed during the push. Nothing was added; run the same command again.")
    return BadInput(f"The hub refuses the request for {name} with status {status}: {_first_line(error)} Try again later.")


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def _check_paths(name: str, paths: Sequence[str]) -> None:
    """Refuse a repository that lists files outside of its folder."""
    for path in paths:
        parts = PurePosixPath(path).parts
        if "\\" in path or "\0" in path or path.startswith("/") or ".." in parts or re.match(r"[A-Za-z]:", path):
            raise BrokenFile(
                f"The repository {name} lists the file {path[:100]!r}, which is outside of its folder. Do not use it."
            )


def _is_damaged(path: Path) -> bool:
    """Compare a file of the cache with the checksum that names its content, and delete it from there if they differ."""
    content = path.resolve()
    expected = content.name
    if not path.is_symlink() or not re.fullmatch(r"[0-9a-f]+", expected) or len(expected) not in (GIT_SHA1, SHA256):
        return False
    checksum = hashlib.sha256() if len(expected) == SHA256 else hashlib.sha1(f"blob {content.stat().st_size}\0".encode())
    with content.open("rb") as file:
        while chunk := file.read(CHUNK):
            checksum.update(chunk)
    if checksum.hexdigest() == expected:
        return False
    path.unlink()
    content.unlink()
    return True


def _read_site(config: Path) -> Site | None:
    """Return the site that the config of a dictionary names; None for a config of another program."""
    try:
        entries = json.loads(config.read_bytes())
        return Site.parse(entries["site"]) if {"format", "kind", "sha256"} <= entries.keys() else None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, UnknownName):
        return None
