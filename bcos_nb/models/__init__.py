"""Detectors: the contract, the registry, the backbones, and detectors on disk."""
from bcos_nb.models import resnet as _resnet  # registers its detectors
from bcos_nb.models.checkpoints import load_detector, save_detector
from bcos_nb.models.detector import Detector, create_detector, list_detectors, register_detector

__all__ = ["Detector", "create_detector", "list_detectors", "load_detector", "register_detector", "save_detector"]
