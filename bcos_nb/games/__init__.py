"""The one localization score, and the two pointing games that use it."""

from bcos_nb.games.departure import DEPARTURES, departed, play_departure
from bcos_nb.games.grid import Grids, build_grids, frame_batch, play_grid_game
from bcos_nb.games.localization import SCORE_COLUMNS, THRESHOLDS, localization_scores, score_table, specificity
from bcos_nb.games.mask import mask_area, masked_fakes, play_mask_game

__all__ = [
    "DEPARTURES",
    "SCORE_COLUMNS",
    "THRESHOLDS",
    "Grids",
    "build_grids",
    "departed",
    "frame_batch",
    "localization_scores",
    "mask_area",
    "masked_fakes",
    "play_departure",
    "play_grid_game",
    "play_mask_game",
    "score_table",
    "specificity",
]
