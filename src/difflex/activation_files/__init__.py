"""Activations in files that other tools read and write: safetensors shards, NumPy arrays, Parquet tables.

An export also has an `index.json`, which lists the files and says what the rows are of, and `shots.jsonl`, a shot on each line.
An import also takes folders of others, whose rows then have no prompts.
"""

from difflex.activation_files.exporting import ActivationFormat, export_activations
from difflex.activation_files.importing import ImportOptions, import_activations

__all__ = ["ActivationFormat", "ImportOptions", "export_activations", "import_activations"]
