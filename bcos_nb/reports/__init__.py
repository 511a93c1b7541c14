"""The study's numbers, and every table and figure of it from your own runs, side by side."""
from bcos_nb.reports.departure_figures import departure_figure, departure_means
from bcos_nb.reports.figures import (
    b_colour, curve_colour, detection_against_localization, figure_png, grid_examples, heat_overlay, hero_figure, maps_across_b,
    mask_illustration, post_hoc_panel, threshold_curves, training_curves,
)
from bcos_nb.reports.localization_tables import (
    Games, draw_boxes, draw_curves, figure_boxes, figure_curves, figure_pictures, localization_table_cells, measure_cells, method_cells, plain_localization,
    read_games, write_localization,
)
from bcos_nb.reports.page import notebook_page, write_report
from bcos_nb.reports.paper import paper_detection, paper_localization, read_paper
from bcos_nb.reports.tables import (
    Examples, Runs, detection_table, detector_name, explainer_name, findings, load_runs, localization_table, mean_scores, method_table,
)

__all__ = [
    "Examples", "Games", "Runs", "b_colour", "curve_colour", "departure_figure", "departure_means", "detection_against_localization",
    "detection_table", "detector_name", "draw_boxes", "draw_curves", "explainer_name", "figure_boxes", "figure_curves", "figure_pictures",
    "figure_png", "findings", "grid_examples", "heat_overlay", "hero_figure", "load_runs", "localization_table", "localization_table_cells",
    "maps_across_b", "mask_illustration", "mean_scores", "measure_cells", "method_cells", "method_table", "notebook_page",
    "paper_detection", "paper_localization", "plain_localization", "post_hoc_panel", "read_games", "read_paper", "threshold_curves",
    "training_curves", "write_localization", "write_report",
]
