"""Trains the study's hyperparameters and ours on the miniature, three seeds each: `make recipes` (about an hour and a half on 2 cores).

Runs the preset `recipes` and writes data/bench/recipes.csv from whatever runs there are; `--seeds 0` does the first seed only.
Started again it goes on.
"""
import argparse
import copy
import os
import sys

import pandas as pd
from measured import ROOT, read, write

from bcos_nb.batch.grid_run import run_jobs
from bcos_nb.batch.presets import detector_rows, load_preset, preset_jobs
from bcos_nb.data import forge_dataset

RUNS = ROOT / "runs" / "recipes"


def jobs_of(seed):
    """Trainings and detection runs of one seed; (entry's preset, arch, b) of each training."""
    preset = copy.deepcopy(load_preset("recipes"))
    preset["training"]["seed"] = seed
    found = []
    for entry in preset["detectors"]:
        jobs = [job for job in preset_jobs(preset | {"detectors": [entry]}, RUNS) if job.run_dir.parent.name in ("train", "detect")]
        found += [(entry["preset"], row["arch"], row["b"], train, detect)
                  for row, train, detect in zip(detector_rows({"detectors": [entry]}), jobs[: len(jobs) // 2], jobs[len(jobs) // 2:])]
    return found


def table_of(runs):
    """A row for each detector and source: mean and sd over the seeds that are complete, and what became of the others."""
    rows = []
    for source, arch, b, train, detect in runs:
        row = dict(arch=arch, b=b, source=source, reason=None)
        if (train.run_dir / "failure.json").is_file() and not (train.run_dir / "metrics.json").is_file():
            row["reason"] = read(train.run_dir / "failure.json")["error"]
        if (detect.run_dir / "metrics.json").is_file():
            trained = read(train.run_dir / "metrics.json")
            row |= dict(test_auc=read(detect.run_dir / "metrics.json")["c23"]["auc"], val_auc=trained["val_auc"], minutes=trained["seconds"] / 60)
        rows.append(row)
    table = pd.DataFrame(rows).reindex(columns=["arch", "b", "source", "test_auc", "val_auc", "minutes", "reason"])
    groups = table.groupby(["arch", "b", "source"], dropna=False, sort=False)
    return pd.DataFrame(dict(
        seeds=groups["test_auc"].count(), diverged=groups["reason"].apply(lambda reasons: int(reasons.str.contains("no longer a number").sum())),
        test_auc=groups["test_auc"].mean().round(3), test_auc_sd=groups["test_auc"].std().round(3),
        val_auc=groups["val_auc"].mean().round(3), val_auc_sd=groups["val_auc"].std().round(3), minutes=groups["minutes"].mean().round(1),
    )).reset_index()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    chosen = parser.parse_args()
    os.chdir(ROOT)  # the preset names its dataset from here
    data = load_preset("recipes")["data"]
    forge_dataset(data["root"], **data["forge"])
    complete = True
    for seed in chosen.seeds:
        jobs = [job for *_, train, detect in jobs_of(seed) for job in (train, detect)]
        complete &= not bool((run_jobs(jobs)["status"] == "failed").any())
        write(table_of([run for seed in (0, 1, 2) for run in jobs_of(seed)]), "recipes")
    sys.exit(not complete)
