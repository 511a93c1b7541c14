"""Runs a preset and gathers what each of its detectors reached; what the measuring scripts beside this file share."""
import json
import os
import platform
from pathlib import Path

import pandas as pd
import torch

from bcos_nb.batch.grid_run import run_jobs
from bcos_nb.batch.presets import load_preset, preset_jobs
from bcos_nb.data import forge_dataset

ROOT = Path(__file__).resolve().parent.parent


def read(path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


def run_preset(name, experiments):
    """Runs these experiments of a preset's B-cos detectors, and all its trainings; True if all are complete."""
    preset = load_preset(name)
    os.chdir(ROOT)  # the preset names its dataset from here
    forge_dataset(preset["data"]["root"], **preset["data"]["forge"])
    wanted = [job for job in preset_jobs(preset, ROOT / "runs" / name) if job.run_dir.parent.name == "train"
              or job.run_dir.parent.name in experiments and "ordinary" not in job.run_dir.name]
    done = run_jobs(wanted)
    return not bool((done["status"] == "failed").any())


def detectors_of(name):
    """For every complete training of a preset's present rows: its parameters, arguments, history, and metrics by experiment."""
    runs = ROOT / "runs" / name
    current = {job.run_dir.name for job in preset_jobs(load_preset(name), runs)}
    for metrics in sorted(runs.glob("train/*/metrics.json")):
        run = metrics.parent
        if run.name not in current:
            continue
        found = dict(params=read(run / "params.json"), built=read(run / "detector.json"), history=pd.read_parquet(run / "history.parquet"), train=read(metrics))
        for other in runs.glob("*/*/metrics.json"):
            if other.parent.parent.name != "train" and Path(read(other.parent / "params.json")["detector"]).name == run.name and other.parent.name in current:
                found[other.parent.parent.name] = read(other)
        yield found


def mask_scores(found):
    """Mean mask area, and the mask score of the B-cos map at thresholds 0 and 0.5; empty without the game."""
    game = found.get("mask_game")
    if game is None or "bcos" not in game["scores"]:
        return {}
    scores = game["scores"]["bcos"]
    return {"mask_area": round(game["mask_area"], 3), "mask_score_at_0": round(scores["weighted@0.0"], 3), "mask_score_at_0.5": round(scores["weighted@0.5"], 3)}


def write(table, name):
    """Writes a table to data/bench and prints it."""
    path = ROOT / "data" / "bench" / f"{name}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(path, index=False)
    print(table.to_string(index=False))
    print(f"written to {path.relative_to(ROOT)}; {machine()}")


def machine():
    """What the numbers were measured on."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()}, {os.cpu_count()} cores"
    return f"{device}, torch {torch.__version__}"
