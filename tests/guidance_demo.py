"""Measures guidance on the miniature: `make guidance` (half an hour on one core; what is done already is not done again).

Trains the demo's B-cos ResNet-10 with several weights λ of the guided loss, three seeds each, and writes data/bench/guidance.csv,
which nbs/training/guidance.ipynb shows: AUC on the test split, and the mask score of the B-cos map beside that of the mean mask.
"""
import argparse
import json
import os
import time
from dataclasses import fields

import pandas as pd
import torch
from measured import ROOT, read, write

from bcos_nb.batch.presets import load_preset
from bcos_nb.data import forge_dataset, load_frames, read_catalog
from bcos_nb.detection import detection_metrics, score_frames
from bcos_nb.explainers.baselines import mean_mask
from bcos_nb.games import play_mask_game
from bcos_nb.models import create_detector
from bcos_nb.models.checkpoints import write_atomically
from bcos_nb.training import FitConfig, fit, inside_share

WEIGHTS, SEEDS, B = (0.0, 0.3, 1.0, 3.0), (0, 1, 2), 2


def measured(detector, test, control):
    """Test AUC, and what the maps of the test fakes have inside their masks."""
    auc = detection_metrics(test.labels, score_frames(detector, test)["probability"])["auc"]
    game = play_mask_game(detector, test, ["bcos"], thresholds=[0.0, 0.5], controls={"mean mask": control})
    scores = game[game["weighting"] == "weighted"].groupby(["explainer", "threshold"])["score"].mean()
    return {"test_auc": auc, "mask_score_at_0": scores["bcos", 0.0], "mask_score_at_0.5": scores["bcos", 0.5], "mean_mask_at_0": scores["mean mask", 0.0],
            "mean_mask_at_0.5": scores["mean mask", 0.5], "inside_share": inside_share(detector, test), "mask_area": game.attrs["mask_area"]}


def trained(weight, seed, preset, frames, run):
    """A row of the table, from a training that goes on where it was cut off."""
    if (run / "row.json").is_file():
        return read(run / "row.json")
    options = dict(preset["detectors"]["options"])
    torch.manual_seed(seed)
    detector = create_detector(preset["detectors"]["arch"][0], b=B, **options)
    recipe = {field.name: preset["training"][field.name] for field in fields(FitConfig) if field.name in preset["training"]}
    begun = time.process_time()
    history = fit(detector, frames["train"], frames["val"], FitConfig(**recipe | dict(guidance=weight, seed=seed)), run, progress=False)
    row = {"guidance": weight, "seed": seed} | measured(detector, frames["test"], frames["control"]) | {
        "val_auc_epoch_1": history["val_auc"].iloc[0], "processor_seconds": round(time.process_time() - begun)}
    row = {name: value if isinstance(value, int) else round(float(value), 4) for name, value in row.items()}
    write_atomically(run / "row.json", lambda path: path.write_text(json.dumps(row), encoding="utf-8"))
    return row


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=float, nargs="+", default=WEIGHTS)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    asked = parser.parse_args()
    os.chdir(ROOT)  # the preset names its dataset from here
    preset = load_preset("demo")
    data, compression = preset["data"], preset["training"]["compression"]
    root = forge_dataset(data["root"], **data["forge"])
    frames = {split: load_frames(read_catalog(root, split=split, compression=compression, frames_per_video=data["frames_per_video"]), data["image_size"])
              for split in ("train", "val", "test")}
    frames["control"] = mean_mask(frames["train"])
    rows = []
    for seed in asked.seeds:
        for weight in asked.weights:
            rows.append(trained(weight, seed, preset, frames, ROOT / "runs" / "guidance" / f"lambda-{weight:g}-seed-{seed}"))
            write(pd.DataFrame(rows).sort_values(["guidance", "seed"]), "guidance")  # as far as it goes
