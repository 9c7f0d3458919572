"""Measures of features (specificity, sensitivity, causality, texture, colour, locality) and the roles of blocks."""

from difflex.measures.block_roles import BlockRoleResults, BlockRolesConfig, block_roles_table, measure_block_roles
from difflex.measures.records import MEASURES, FeatureMeasures, MeasureConfig, MeasureName, measures_table
from difflex.measures.running import measure_features

__all__ = [
    "MEASURES",
    "BlockRoleResults",
    "BlockRolesConfig",
    "FeatureMeasures",
    "MeasureConfig",
    "MeasureName",
    "block_roles_table",
    "measure_block_roles",
    "measure_features",
    "measures_table",
]
