"""One interface, every explainer behind it."""

from bcos_nb.explainers.attribution import (
    EXPLAINERS,
    Attribution,
    Explainer,
    Question,
    check_explainers,
    explain,
    explain_many,
    register_explainer,
    usable_explainers,
)
from bcos_nb.explainers.bcos import alpha_maps, colour_images
from bcos_nb.explainers.cam import CAMS
from bcos_nb.explainers.windows import explain_windows
from bcos_nb.explainers.lime import LocalModels, local_models, superpixels
from bcos_nb.explainers.captum_methods import CAPTUM
from bcos_nb.explainers.rise import soft_masks
from bcos_nb.explainers.baselines import mean_mask, randomised  # after the explainers that they are the controls of

__all__ = [
    "CAMS",
    "CAPTUM",
    "EXPLAINERS",
    "Attribution",
    "Explainer",
    "LocalModels",
    "Question",
    "alpha_maps",
    "check_explainers",
    "colour_images",
    "explain",
    "explain_many",
    "explain_windows",
    "local_models",
    "mean_mask",
    "randomised",
    "register_explainer",
    "soft_masks",
    "superpixels",
    "usable_explainers",
]
