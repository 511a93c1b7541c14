"""Measures what each part of the training recipe does: `make ablation` (a quarter of an hour on 2 cores).

Runs the preset `ablation` and writes data/bench/ablation.csv, which nbs/models/resnet.ipynb shows.
"""
import json
import os
import sys
from pathlib import Path

import pandas as pd

from bcos_nb.batch.grid_run import run_jobs
from bcos_nb.batch.presets import load_preset, preset_jobs
from bcos_nb.data import forge_dataset

ROOT = Path(__file__).resolve().parent.parent
RUNS = ROOT / "runs" / "ablation"
RECIPE = {"arch": "resnet10", "b": 2, "energy_stem": True, "zero_mean": 0.5, "max_out": 2, "b_start": 1.25, "balance": "pairs"}


def rows():
    for metrics in sorted(RUNS.glob("train/*/metrics.json")):
        run = metrics.parent
        params = json.loads((run / "params.json").read_text())
        built = json.loads((run / "detector.json").read_text())
        history = pd.read_parquet(run / "history.parquet")
        row = {key: built.get(key, RECIPE[key]) for key in ("arch", "b", "energy_stem", "zero_mean", "max_out")}
        row |= {key: params["training"].get(key) for key in ("b_start", "balance")}
        row["val_auc_epoch_1"], row["val_auc_epoch_2"] = history["val_auc"].round(3)[:2]
        for game in RUNS.glob("mask_game/*/metrics.json"):
            found = json.loads(game.read_text())
            if Path(json.loads((game.parent / "params.json").read_text())["detector"]).name == run.name and "bcos" in found["scores"]:
                row["mask_area"] = round(found["mask_area"], 3)
                row["mask_score_at_0"], row["mask_score_at_0.5"] = (round(found["scores"]["bcos"][f"weighted@{at}"], 3) for at in ("0.0", "0.5"))
        changed = [f"{key}={row[key]}" for key in RECIPE if row[key] != RECIPE[key] and not (row["b"] is None and key not in ("b", "energy_stem"))]
        yield {"network": "the recipe" if not changed else ", ".join(changed)} | {key: row.get(key) for key in (
            "val_auc_epoch_1", "val_auc_epoch_2", "mask_area", "mask_score_at_0", "mask_score_at_0.5")}


if __name__ == "__main__":
    preset = load_preset("ablation")
    os.chdir(ROOT)  # the preset names its dataset from here
    forge_dataset(preset["data"]["root"], **preset["data"]["forge"])
    jobs = [job for job in preset_jobs(preset, RUNS) if job.run_dir.parent.name == "train"
            or job.run_dir.parent.name == "mask_game" and "ordinary" not in job.run_dir.name]
    done = run_jobs(jobs)
    table = pd.DataFrame(rows()).sort_values("network", key=lambda names: names != "the recipe", kind="stable")
    out = ROOT / "data" / "bench" / "ablation.csv"
    out.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(out, index=False)
    print(table.to_string(index=False))
    sys.exit(bool((done["status"] == "failed").any()))
