"""`difflex export-activations` and `difflex import-activations`: activations for and from other tools."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, final

from tyro.conf import Positional, arg

from difflex.choices import StoredDtype
from difflex.commands.flags import COUNT
from difflex.commands.inputs import check_site
from difflex.errors import UnknownName
from difflex.records import Site
from difflex.study import Command, Study


@final
@dataclass(frozen=True, kw_only=True)
class ExportActivationsCommand(Command):
    """Write the stored activations of a site to files that other tools read."""

    study: Annotated[Positional[Path], arg(metavar="STUDY")]
    """A study with activations."""
    site: Annotated[str, arg(metavar="SITE")]
    """The site of the activations: double.18."""
    to: Literal["safetensors", "npy", "parquet"]
    """safetensors: a file for each shard; npy: one NumPy array, read by memory map; parquet: tables that `datasets` reads."""
    out: Annotated[Path, arg(metavar="FOLDER")]
    """The folder to write."""

    def __call__(self) -> list[Path]:
        from difflex.activation_files import export_activations
        from difflex.store import Store

        study, site = Study.open(self.study), Site.parse(self.site)
        if site not in (stores := study.stores()):
            raise UnknownName.among("The site", self.site, map(str, stores), "difflex harvest stores others.")
        store = Store.open(stores[site])
        paths = export_activations(store, self.to, self.out)
        print(f"{self.out}: {store.count() + store.count('held-out'):,} rows of width {store.width} in {len(paths)} files")
        return []


@final
@dataclass(frozen=True, kw_only=True)
class ImportActivationsCommand(Command):
    """Store activations from files of other tools in a study, to train on them; an import that was stopped continues."""

    source: Annotated[Positional[Path], arg(metavar="PATH")]
    """A folder of `difflex export-activations`, or a folder or file of others: .safetensors, .npy or .parquet."""
    out: Annotated[Path, arg(metavar="STUDY")]
    """The study, of the same model; it is begun if there is none."""
    site: Annotated[str | None, arg(metavar="SITE", help_behavior_hint="(default: that of the export)")] = None
    """Where the activations are read: double.18."""
    model: Annotated[str | None, arg(metavar="MODEL", help_behavior_hint="(default: that of the export)")] = None
    """The model of the activations: a name inside the package, a folder, or a hub model."""
    revision: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="(default: none)")] = None
    """The revision of a hub model."""
    key: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="(default: the only one)")] = None
    """The tensor or the column with the activations."""
    tokens_per_image: Annotated[int, COUNT] = 1
    """Rows of an image, where the arrays are [row, width]: all rows of an image are in the same split."""
    dtype: Annotated[StoredDtype | None, arg(help_behavior_hint="(default: that of the files, or bf16)")] = None
    """How the rows are stored."""

    def __call__(self) -> list[Path]:
        from difflex.activation_files import ImportOptions, import_activations

        options = ImportOptions(
            site=None if self.site is None else Site.parse(self.site),
            model=self.model,
            revision=self.revision,
            key=self.key,
            tokens=self.tokens_per_image,
            dtype=self.dtype,
        )

        if options.site is not None and self.model is not None:
            check_site(self.model, self.revision, options.site)

        def begin(model: str, revision: str | None) -> None:
            Study.begin(self.out, model, revision)

        store = import_activations(self.source, self.out / "activations", options, begin)
        print(
            f"{store.folder}: {store.count():,} training rows and {store.count('held-out'):,} held-out rows of width "
            f"{store.width} in {store.dtype}, {store.source}"
        )
        return [store.folder / "manifest.json"]
