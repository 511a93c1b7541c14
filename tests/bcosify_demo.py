"""Measures B-cosification on the miniature: `make bcosify` (ten minutes on 2 cores, three if the demo has been run).

Takes the demo's ordinary detector, B-cosifies it, fine-tunes it for a quarter of the steps of a training from scratch, and writes data/bench/bcosify.csv,
which nbs/models/bcosify.ipynb shows beside the ordinary detector and the B-cos detector from scratch.
"""
import os
import tempfile
import time
from dataclasses import fields

import pandas as pd
import torch
from measured import ROOT, write

from bcos_nb.batch.grid_run import run_jobs
from bcos_nb.batch.presets import load_preset, preset_jobs
from bcos_nb.data import forge_dataset, load_frames, read_catalog
from bcos_nb.detection import detection_metrics, score_frames
from bcos_nb.games import play_mask_game
from bcos_nb.layers import dynamic_linear
from bcos_nb.models import load_detector
from bcos_nb.models.bcosify import bcosify, decay_biases, renew_statistics
from bcos_nb.training import FitConfig, fit
from bcos_nb.training.loop import epoch_order

B = 2
VARIANTS = {  # what is kept of the ordinary detector; the settings of the fine-tuning, and the share of the biases that each step keeps
    "B-cosified, all kept": (dict(), dict(), None),
    "B-cosified, centring as biases that decay": (dict(norm="uncentred"), dict(), 0.9),
    "B-cosified, without constants": (dict(norm="uncentred", bias="drop"), dict(), None),
    "B-cosified, without ReLU": (dict(activation="drop"), dict(), None),
}


def measured(detector, test):
    """Test AUC, mask score of the B-cos map, completeness error, and how much of a logit is constant."""
    row = {"test_auc": round(detection_metrics(test.labels, score_frames(detector, test)["probability"])["auc"], 3)}
    if detector.b is None:
        return row
    game = play_mask_game(detector, test, ["bcos"], thresholds=[0.0, 0.5])
    game = game[(game["explainer"] == "bcos") & (game["weighting"] == "weighted")].groupby("threshold")["score"].mean()
    linear = dynamic_linear(detector, test.batch(slice(None, None, max(1, len(test) // 64)))["image"], check=False)
    shown = linear.contributions.abs().sum((1, 2))
    return row | {"mask_score_at_0": round(float(game[0.0]), 3), "mask_score_at_0.5": round(float(game[0.5]), 3), "completeness_error": f"{float(linear.error.max()):.0e}",
                  "constant_share": round(float((linear.bias.abs() / (linear.bias.abs() + shown)).median()), 3)}


if __name__ == "__main__":
    os.chdir(ROOT)  # the preset names its dataset from here
    torch.set_num_threads(max(1, (os.cpu_count() or 2) // 2))
    preset = load_preset("demo")
    root = forge_dataset(preset["data"]["root"], **preset["data"]["forge"])
    wanted = [job for job in preset_jobs(preset, ROOT / "runs" / "demo") if job.run_dir.parent.name == "train" and job.run_dir.name.split("-")[1] in ("ordinary", f"b{B}")]
    if bool((run_jobs(wanted)["status"] == "failed").any()):
        raise SystemExit("the demo's trainings failed; run make demo")
    size, compression = preset["data"]["image_size"], preset["training"]["compression"]
    frames = {split: load_frames(read_catalog(root, split=split, compression=compression, frames_per_video=preset["data"]["frames_per_video"]), size, with_mask=split == "test")
              for split in ("train", "val", "test")}
    recipe = {field.name: preset["training"][field.name] for field in fields(FitConfig) if field.name in preset["training"]} | dict(b_start=1.0)
    steps = recipe["epochs"] * len(epoch_order(frames["train"], 0, FitConfig(**recipe)))
    rows, found = [], {load_detector(job.run_dir).b: job for job in wanted}
    for name, b in (("ordinary, from scratch", None), ("B-cos, from scratch", B)):
        rows.append({"detector": name, "steps": steps} | measured(load_detector(found[b].run_dir), frames["test"]))
    some = torch.randperm(len(frames["train"]), generator=torch.Generator().manual_seed(0))[:512]
    for b in (1, 1.25, 1.5, B):
        detector = renew_statistics(bcosify(load_detector(found[None].run_dir), b), frames["train"].batch(some)["image"]).eval()
        rows.append({"detector": f"B-cosified, B = {b}, new statistics only", "steps": 0} | measured(detector, frames["test"]))
    second = torch.tensor((frames["train"].catalog.groupby("video").cumcount() % 2 == 0).to_numpy())  # every other frame: half as many steps an epoch
    for name, (form, settings, rate) in VARIANTS.items():
        torch.manual_seed(0)
        detector, start = bcosify(load_detector(found[None].run_dir), B, **form), time.perf_counter()
        if rate is not None:
            decay_biases(detector, rate)
        config = FitConfig(**recipe | dict(epochs=1) | settings)
        with tempfile.TemporaryDirectory() as folder:
            fit(detector, frames["train"][second], frames["val"], config, folder, progress=False)
        rows.append({"detector": name, "steps": len(epoch_order(frames["train"][second], 0, config))} | measured(detector, frames["test"]) | {"seconds": round(time.perf_counter() - start)})
        print(rows[-1], flush=True)
    write(pd.DataFrame(rows), "bcosify")
