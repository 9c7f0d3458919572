"""A benchmark of editing by representations: nine edit types, the protocol of RIEBench (arXiv 2410.22366)."""

from difflex.effects.edit_bench.drawn import drawn_world
from difflex.effects.edit_bench.items import EditType, masked_world
from difflex.effects.edit_bench.results import ALL, EditArm, EditBenchConfig, EditBenchResults, ImageScorer, edit_bench_table
from difflex.effects.edit_bench.running import run_edit_benchmark

__all__ = [
    "ALL",
    "EditArm",
    "EditBenchConfig",
    "EditBenchResults",
    "EditType",
    "ImageScorer",
    "drawn_world",
    "edit_bench_table",
    "masked_world",
    "run_edit_benchmark",
]
