"""Detection: how well a detector tells real from fake."""
from bcos_nb.detection.metrics import (
    bootstrap_intervals, choose_threshold, detection_metrics, detection_results, score_frames, video_scores,
)

__all__ = ["bootstrap_intervals", "choose_threshold", "detection_metrics", "detection_results", "score_frames", "video_scores"]
