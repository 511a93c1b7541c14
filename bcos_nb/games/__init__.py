"""The one localization score, and the two pointing games that use it."""

from bcos_nb.games.grid import GRID_MEASURES, Grids, build_grids, frame_batch, play_grid_game
from bcos_nb.games.departure import DEPARTURES, departed, play_departure
from bcos_nb.games.faithfulness import draw_faithfulness, faithfulness_areas, faithfulness_curves, play_faithfulness
from bcos_nb.games.grid import Grids, build_grids, frame_batch, play_grid_game
from bcos_nb.games.localization import SCORE_COLUMNS, THRESHOLDS, localization_scores, score_table, specificity
from bcos_nb.games.mask import mask_area, masked_fakes, play_mask_game
from bcos_nb.games.measures import MEASURES, OtherRegions, forgery_strength, score_maps
from bcos_nb.games.statistics import box_data, compare_explainers, describe_samples, score_intervals

__all__ = [
    "GRID_MEASURES",
    "MEASURES",
    "DEPARTURES",
    "SCORE_COLUMNS",
    "THRESHOLDS",
    "Grids",
    "OtherRegions",
    "build_grids",
    "forgery_strength",
    "box_data",
    "build_grids",
    "compare_explainers",
    "describe_samples",
    "departed",
    "draw_faithfulness",
    "faithfulness_areas",
    "faithfulness_curves",
    "frame_batch",
    "localization_scores",
    "mask_area",
    "masked_fakes",
    "play_departure",
    "play_faithfulness",
    "play_grid_game",
    "play_mask_game",
    "score_maps",
    "score_intervals",
    "score_table",
    "specificity",
]
