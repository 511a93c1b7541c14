"""Measures how a detector of the miniature FaceForensics++ does on the other datasets' counterparts: `make transfer` (twenty minutes on 2 cores).

Trains the demo's ordinary detector, unless it is there or `--detector` names one, forges the counterparts beside the miniature, and writes
data/bench/transfer.csv, which nbs/data/counterparts.ipynb shows. The counterparts' traces were tuned, with this detector and part of these
frames, so that the loss of AUC lies where the study's does: the numbers say that the counterparts do what they are made for, nothing else.
"""
import argparse
import os
import sys
import warnings

import numpy as np
import pandas as pd
from measured import ROOT, write
from sklearn.metrics import roc_auc_score

from bcos_nb.batch.grid_run import run_jobs
from bcos_nb.batch.presets import load_preset, preset_jobs
from bcos_nb.data import forge_dataset, load_frames, read_catalog
from bcos_nb.data.counterparts import COUNTERPARTS
from bcos_nb.models import load_detector
from bcos_nb.training import predict_logits


def ordinary_detector(preset, root):
    """The demo's ordinary detector: where its run has put it, trained if need be."""
    jobs = [job for job in preset_jobs(preset, ROOT / "runs" / "demo", root) if job.run_dir.parent.name == "train" and "ordinary" in job.run_dir.name]
    done = run_jobs(jobs[:1])
    if (done["status"] == "failed").any():
        sys.exit(f"The training failed: {done['error'].iloc[0]}")
    return jobs[0].run_dir / "detector.safetensors"


def row_of(detector, root, dataset, size, frames_per_video):
    """AUC of the detector's fake logit on a dataset's test split, of frames and of videos' mean logits."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        catalog = read_catalog(root, dataset, "test", "c23" if COUNTERPARTS[dataset].levels else None, frames_per_video=frames_per_video)
    logits = predict_logits(detector, load_frames(catalog, size, with_mask=False)).numpy()
    table = catalog.assign(score=logits[:, 1] - logits[:, 0])
    videos = table.groupby("video").agg(label=("label", "first"), score=("score", "mean"))
    by_method = {method: roc_auc_score(part["label"], part["score"]) for method in COUNTERPARTS[dataset].methods for part in [table[table["method"].isin(["real", method])]]}
    return {
        "dataset": dataset, "compression": catalog.attrs["compression"] or "own", "frames": len(table), "videos": len(videos),
        "auc": round(roc_auc_score(table["label"], table["score"]), 3), "video_auc": round(roc_auc_score(videos["label"], videos["score"]), 3),
        "auc_by_method": "; ".join(f"{method} {auc:.3f}" for method, auc in by_method.items()),
        "real_score": round(float(table.query("label == 0")["score"].mean()), 2), "fake_score": round(float(table.query("label == 1")["score"].mean()), 2),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--detector", help="a detector.safetensors trained on the miniature")
    parser.add_argument("--root", help="folder of the datasets; default: the demo's")
    chosen, preset = parser.parse_args(), load_preset("demo")
    os.chdir(ROOT)
    root = chosen.root or preset["data"]["root"]
    forge_dataset(root, dataset="all", **preset["data"]["forge"] | dict(identities=None, frames_per_video=None))
    detector = load_detector(chosen.detector or ordinary_detector(preset, root)).eval()
    rows = [row_of(detector, root, name, preset["data"]["image_size"], preset["data"]["frames_per_video"]) for name in COUNTERPARTS]
    table = pd.DataFrame(rows)
    write(table, "transfer")
    gap = table["auc"].iloc[0] - table["auc"].iloc[1:].mean()
    print(f"in-domain AUC {table['auc'].iloc[0]:.3f}, mean of the others {np.mean(table['auc'].iloc[1:]):.3f}, lost {gap:.3f}")
    sys.exit(not 0.05 <= gap <= 0.35)
