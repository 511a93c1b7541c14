"""B-cos layers, norms, encodings, and the network as one linear map."""
from bcos_nb.layers.bcos import BcosConv2d, BcosLinear, DynamicLinearModule
from bcos_nb.layers.dynamic_linear import DynamicLinear, dynamic_linear, evaluating, explanation_mode
from bcos_nb.layers.encoding import AddInverse, LogitLayer, Standardize
from bcos_nb.layers.norms import NORMS, BatchNorm2d, BatchNormUncentered2d, make_norm

__all__ = [
    "NORMS", "AddInverse", "BatchNorm2d", "BatchNormUncentered2d", "BcosConv2d", "BcosLinear", "DynamicLinear",
    "DynamicLinearModule", "LogitLayer", "Standardize", "dynamic_linear", "evaluating", "explanation_mode", "make_norm",
]
