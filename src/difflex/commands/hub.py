"""`difflex push` and `difflex pull`: dictionaries of a study in a repository of the Hugging Face hub."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, final

from tyro.conf import FlagCreatePairsOff, Positional, arg

from difflex.dictionary_config import read_config
from difflex.errors import BadInput, UnknownName
from difflex.hub import HubDictionary, check_repository, dictionary_snapshot, list_dictionaries
from difflex.study import Command, Study


@final
@dataclass(frozen=True, kw_only=True)
class PushCommand(Command):
    """Push dictionaries to a repository of the hub, with a card that says what was measured; others that are there stay."""

    study: Annotated[Positional[Path], arg(metavar="STUDY")]
    """A study with dictionaries."""
    repository: Annotated[Positional[str], arg(metavar="OWNER/NAME")]
    """The repository, which is made if there is none. The token is that of `hf auth login` or HF_TOKEN."""
    dictionary: Annotated[tuple[str, ...], arg(metavar="SITE/LABEL...", help_behavior_hint="(default: all of the study)")] = ()
    """The dictionaries: double.18/topk-8192-k32."""
    private: FlagCreatePairsOff[bool] = False
    """Make a new repository private."""
    revision: Annotated[str | None, arg(metavar="BRANCH", help_behavior_hint="(default: main)")] = None
    """The branch, which is made if there is none."""
    license: Annotated[str | None, arg(metavar="ID", help_behavior_hint="(default: that of the card)")] = None
    """The licence of the dictionaries, as the hub writes it: apache-2.0."""
    dry_run: FlagCreatePairsOff[bool] = False
    """Write the files and the card to --out, and use no network."""
    out: Annotated[Path | None, arg(metavar="FOLDER", help_behavior_hint="(default: NAME)")] = None
    """The folder of a dry run."""

    def __call__(self) -> list[Path]:
        from difflex.publication import push, stage, write_repository

        check_repository(self.repository)
        if self.out is not None and not self.dry_run:
            raise BadInput("--out is the folder of a dry run. Add --dry-run, or leave --out out to push.")
        study = Study.open(self.study)
        refs = study.select_dictionaries((), self.dictionary)
        if any(Path(str(read_config(study.dictionary(*ref)).model)).is_absolute() for ref in refs):
            print(f"Note: the model is the folder {study.model}; others can read its path in the configs of the dictionaries.")
        with tempfile.TemporaryDirectory() as name:
            if self.dry_run:
                out = self.out or Path(self.repository.partition("/")[2])
                files = stage(study, refs, self.repository, Path(name), out if out.is_dir() else None, self.license)
                write_repository(files, out)
                print(
                    f"{out}: {len(files)} files of {len(refs)} dictionaries and the card {out / 'README.md'}. Nothing was pushed."
                )
                return []
            commit = push(study, refs, self.repository, Path(name), self.private, self.revision, self.license)
        print("\n".join(map(str, refs)))
        print(f"Pushed to {self.repository} at {commit}. difflex pull {self.repository} --out FOLDER gets them.")
        return []


@final
@dataclass(frozen=True, kw_only=True)
class PullCommand(Command):
    """Copy dictionaries of a repository of the hub into a study, with what was measured of them."""

    repository: Annotated[Positional[str], arg(metavar="OWNER/NAME")]
    """The repository that `difflex push` wrote."""
    out: Annotated[Path, arg(metavar="STUDY")]
    """The folder of the study, of the same model; it is begun if there is none."""
    dictionary: Annotated[tuple[str, ...], arg(metavar="SITE/LABEL...", help_behavior_hint="(default: all)")] = ()
    """The dictionaries: double.18/topk-8192-k32."""
    revision: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="(default: main)")] = None
    """A branch, a tag or a commit."""
    offline: FlagCreatePairsOff[bool] = False
    """Take the files from the local cache of the hub only."""

    def __call__(self) -> list[Path]:
        from difflex.publication import pull_dictionary

        known = {
            f"{site}/{label}": (site, label) for site, label in list_dictionaries(self.repository, self.revision, self.offline)
        }
        for name in self.dictionary:
            if name not in known:
                raise UnknownName.among(f"In {self.repository} the dictionary", name, known)
        sources: list[HubDictionary] = [
            dictionary_snapshot(self.repository, *known[name], self.revision, self.offline) for name in self.dictionary or known
        ]
        made = []
        for source in sources:
            config = read_config(source.folder)
            if config.model is None:
                raise BadInput(f"{source.site}/{source.label} names no model, and a study is about one. Load it from Python.")
            study = Study.open_or_plan(self.out, config.model, config.revision)
            state = "pulled" if pull_dictionary(study, source) else "up to date"
            print(f"{source.site}/{source.label}: {state}, {source.repository} at {source.commit}")
            made.append(study.dictionary(source.site, source.label) / "config.json")
        return made
