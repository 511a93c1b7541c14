"""The ipywidgets that the exploring notebooks show."""
from bcos_nb.widgets.canvas import MapCanvas, Panel
from bcos_nb.widgets.explanations import ExplanationCache
from bcos_nb.widgets.explorer import AttributionExplorer, OwnImagesExplorer
from bcos_nb.widgets.grids import GridExplorer
from bcos_nb.widgets.opening import Opened, find_runs, open_detectors, open_examples, open_runs, train_taste
from bcos_nb.widgets.own_images import OwnImages
from bcos_nb.widgets.thresholds import ThresholdExplorer

__all__ = ["AttributionExplorer", "ExplanationCache", "GridExplorer", "MapCanvas", "Opened", "OwnImages", "OwnImagesExplorer", "Panel", "ThresholdExplorer",
           "find_runs", "open_detectors", "open_examples", "open_runs", "train_taste"]
