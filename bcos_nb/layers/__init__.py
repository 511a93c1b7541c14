"""B-cos layers, norms, attention, encodings, and the network as one linear map."""
from bcos_nb.layers.attention import Attention
from bcos_nb.layers.bcos import BcosConv2d, BcosLinear, DynamicLinearModule
from bcos_nb.layers.dynamic_linear import DynamicLinear, dynamic_linear, evaluating, explanation_mode
from bcos_nb.layers.encoding import AddInverse, LogitLayer, Standardize
from bcos_nb.layers.norms import (
    NORMS,
    AllNorm2d,
    AllNormUncentered2d,
    BatchNorm2d,
    BatchNormUncentered2d,
    DetachableGNInstanceNorm2d,
    DetachableGNLayerNorm2d,
    DetachableGroupNorm2d,
    DetachableLayerNorm,
    DetachablePositionNorm2d,
    GNInstanceNormUncentered2d,
    GNLayerNormUncentered2d,
    GroupNormUncentered2d,
    PositionNormUncentered2d,
    make_norm,
    norm_table,
)

__all__ = [
    "NORMS", "AddInverse", "AllNorm2d", "AllNormUncentered2d", "Attention", "BatchNorm2d", "BatchNormUncentered2d", "BcosConv2d", "BcosLinear",
    "DetachableGNInstanceNorm2d", "DetachableGNLayerNorm2d", "DetachableGroupNorm2d", "DetachableLayerNorm", "DetachablePositionNorm2d",
    "DynamicLinear", "DynamicLinearModule", "GNInstanceNormUncentered2d", "GNLayerNormUncentered2d", "GroupNormUncentered2d", "LogitLayer",
    "PositionNormUncentered2d", "Standardize", "dynamic_linear", "evaluating", "explanation_mode", "make_norm", "norm_table",
]
