"""Measures what each part of the training recipe does: `make ablation` (a quarter of an hour on 2 cores).

Runs the preset `ablation` and writes data/bench/ablation.csv, which nbs/models/resnet.ipynb shows.
"""
import sys

import pandas as pd
from measured import detectors_of, mask_scores, run_preset, write

RECIPE = {"arch": "resnet10", "b": 2, "energy_stem": True, "zero_mean": 0.5, "max_out": 2, "stem_max_out": 2, "b_start": 1.25, "balance": "pairs"}


def row_of(found):
    has = {key: found["built"].get(key, RECIPE[key]) for key in RECIPE} | {key: found["params"]["training"].get(key) for key in ("b_start", "balance")}
    changed = [f"{key}={has[key]}" for key in RECIPE if has[key] != RECIPE[key] and not (has["b"] is None and key not in ("b", "energy_stem"))]
    aucs = found["history"]["val_auc"].round(3)
    return {"network": ", ".join(changed) or "the recipe", "val_auc_epoch_1": aucs[0], "val_auc_epoch_2": aucs[1]} | mask_scores(found)


if __name__ == "__main__":
    complete = run_preset("ablation", ["mask_game"])
    table = pd.DataFrame(map(row_of, detectors_of("ablation")))
    write(table.sort_values("network", key=lambda names: names != "the recipe", kind="stable"), "ablation")
    sys.exit(not complete)
