"""Detection: how well a detector tells real from fake."""
from bcos_nb.detection.metrics import detection_metrics, score_frames

__all__ = ["detection_metrics", "score_frames"]
