"""Training: losses, optimisers, guidance, presets, and the loop."""
from bcos_nb.training.guidance import guidance_loss, inside_share, outside_share
from bcos_nb.training.loop import FitConfig, fit, make_config, predict_logits
from bcos_nb.training.losses import binary_cross_entropy, class_weights, cross_entropy, make_loss, matching_logit_bias
from bcos_nb.training.optim import make_optimizer, schedule_factor, warmup_cosine
from bcos_nb.training.presets import Preset, preset, preset_table
from bcos_nb.training.processes import fit_in_processes

__all__ = [
    "FitConfig", "Preset", "binary_cross_entropy", "class_weights", "cross_entropy", "fit", "fit_in_processes", "guidance_loss", "inside_share", "make_config", "make_loss", "make_optimizer",
    "matching_logit_bias", "outside_share", "predict_logits", "preset", "preset_table", "schedule_factor", "warmup_cosine",
]
