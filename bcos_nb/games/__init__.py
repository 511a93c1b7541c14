"""The one localization score, and the two pointing games that use it."""

from bcos_nb.games.localization import SCORE_COLUMNS, THRESHOLDS, localization_scores, score_table, specificity

__all__ = ["SCORE_COLUMNS", "THRESHOLDS", "localization_scores", "score_table", "specificity"]
