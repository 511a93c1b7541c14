"""The study's numbers, and every table and figure of it from your own runs, side by side."""
from bcos_nb.reports.beyond_tables import departure_rows, departure_table, faithfulness_figure, faithfulness_rows, faithfulness_table, read_side_tables
from bcos_nb.reports.departure_figures import departure_figure, departure_means
from bcos_nb.reports.detection_tables import all_tables, detection_table, read_results, study_table
from bcos_nb.reports.figures import (
    b_colour, curve_colour, dark_colour, detection_against_localization, figure_png, grid_examples, heat_overlay, hero_figure, maps_across_b,
    mask_illustration, post_hoc_panel, training_curves,
)
from bcos_nb.reports.formats import Cell, Table, agreement, agreements, plain_frame, table_html, table_latex, write_table
from bcos_nb.reports.localization_tables import (
    Games, draw_boxes, draw_curves, figure_boxes, figure_curves, localization_table, localization_table_cells, measure_cells, method_cells, read_games,
)
from bcos_nb.reports.page import notebook_page, write_report
from bcos_nb.reports.paper import paper_detection, paper_localization, read_paper
from bcos_nb.reports.setting_tables import dataset_table, guidance_table, setting_table
from bcos_nb.reports.tables import Examples, Runs, detector_name, explainer_name, list_runs, load_runs, missing_runs

__all__ = [
    "Cell", "Examples", "Games", "Runs", "Table", "agreement", "agreements", "all_tables", "b_colour", "curve_colour", "dark_colour", "dataset_table",
    "departure_figure", "departure_means", "departure_rows", "departure_table", "detection_against_localization", "detection_table", "detector_name",
    "draw_boxes", "draw_curves", "explainer_name", "faithfulness_figure", "faithfulness_rows", "faithfulness_table", "figure_boxes", "figure_curves",
    "figure_png", "grid_examples", "guidance_table", "heat_overlay", "hero_figure", "list_runs", "load_runs", "localization_table",
    "localization_table_cells", "maps_across_b", "mask_illustration", "measure_cells", "method_cells", "missing_runs", "notebook_page",
    "paper_detection", "paper_localization", "plain_frame", "post_hoc_panel", "read_games", "read_paper", "read_results", "read_side_tables",
    "setting_table", "study_table", "table_html", "table_latex", "training_curves", "write_report", "write_table",
]
