"""Training: losses, optimisers, guidance, and the loop."""
from bcos_nb.training.guidance import guidance_loss, inside_share, outside_share
from bcos_nb.training.loop import FitConfig, fit, make_config, predict_logits
from bcos_nb.training.losses import class_weights, cross_entropy
from bcos_nb.training.optim import make_optimizer, warmup_cosine

__all__ = ["FitConfig", "class_weights", "cross_entropy", "fit", "guidance_loss", "inside_share", "make_config", "make_optimizer", "outside_share", "predict_logits", "warmup_cosine"]
