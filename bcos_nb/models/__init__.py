"""Detectors: the contract, the registry, the backbones, B-cosification, and detectors on disk."""
from bcos_nb.models import resnet as _resnet, xception as _xception, vitc as _vitc  # register their detectors, the study's first
from bcos_nb.models import convnext as _convnext, densenet as _densenet, inception as _inception, vgg as _vgg
from bcos_nb.models.bcosify import bcosify, decay_biases, renew_statistics
from bcos_nb.models.checkpoints import load_checkpoint, load_detector, save_detector
from bcos_nb.models.detector import Detector, create_detector, list_detectors, register_detector

__all__ = ["Detector", "bcosify", "create_detector", "decay_biases", "list_detectors", "load_checkpoint", "load_detector", "register_detector",
           "renew_statistics", "save_detector"]
