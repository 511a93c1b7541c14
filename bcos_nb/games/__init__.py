"""The one localization score, and the two pointing games that use it."""

from bcos_nb.games.grid import GRID_MEASURES, Grids, build_grids, frame_batch, play_grid_game
from bcos_nb.games.localization import SCORE_COLUMNS, THRESHOLDS, localization_scores, score_table, specificity
from bcos_nb.games.mask import mask_area, masked_fakes, play_mask_game
from bcos_nb.games.measures import MEASURES, OtherRegions, forgery_strength, score_maps
from bcos_nb.games.statistics import box_data, compare_explainers, describe_samples, score_intervals

__all__ = [
    "GRID_MEASURES",
    "MEASURES",
    "SCORE_COLUMNS",
    "THRESHOLDS",
    "Grids",
    "OtherRegions",
    "box_data",
    "build_grids",
    "compare_explainers",
    "describe_samples",
    "forgery_strength",
    "frame_batch",
    "localization_scores",
    "mask_area",
    "masked_fakes",
    "play_grid_game",
    "play_mask_game",
    "score_intervals",
    "score_maps",
    "score_table",
    "specificity",
]
