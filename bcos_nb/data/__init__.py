"""Data: the built-in miniature dataset, the catalogue of datasets on disk, and loading frames and masks."""
from importlib import import_module

# Loaded on first use: forging does not need torch, and its worker processes start faster without it.
_WHERE = {
    "forge_dataset": "forge", "METHODS": "forgeries", "TRACES": "forgeries",
    "read_catalog": "catalog", "METHOD_OF_LABEL": "catalog",
    "check_data": "check", "mend_data": "check", "Findings": "check",
    "FrameDataset": "frames", "Frames": "frames", "load_frames": "frames", "read_batches": "frames", "read_picture": "frames",
    "pack_frames": "cache", "PackedFrames": "cache", "open_frames": "cache",
    "Augmentation": "augment", "AUGMENTATIONS": "augment", "augment_batch": "augment", "make_augmentation": "augment",
    "RepeatedSampler": "augment", "SeededFrames": "augment",
    "prepare_videos": "preprocess",
}
__all__ = list(_WHERE)


def __getattr__(name):
    if name in _WHERE:
        return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *__all__])
