"""Trains every B-cos backbone on the miniature and measures it: `make backbones` (under an hour on 2 cores).

Runs the preset `backbones` and writes data/bench/backbones.csv. Minutes are those of the training,
one thread each where two run at a time.
"""
import sys

import pandas as pd
from measured import detectors_of, mask_scores, run_preset, write


def row_of(found):
    params, trained, detected = found["params"], found["train"], found.get("detect") or {}
    chosen = {"width": round(params["width"], 3), **params["arch_options"], **({"crop": crop} if (crop := params["training"]["crop"]) != 80 else {})}
    variant = chosen.pop("variant", "default")
    options = ", ".join(f"{key}={value}" for key, value in chosen.items())
    return {
        "arch": params["arch"], "form": variant, "b": params["b"], "options": options, "epochs": trained["epochs"], "minutes": round(trained["seconds"] / 60, 1),
        "parameters": trained["parameters"], "val_auc": round(trained["val_auc"], 3), "test_auc": round(detected["c23"]["auc"], 3) if detected else None,
        "completeness_error": f"{detected['completeness_error']:.0e}" if detected else None,
    } | mask_scores(found)


if __name__ == "__main__":
    complete = run_preset("backbones", ["mask_game", "detect"])
    write(pd.DataFrame(map(row_of, detectors_of("backbones"))).sort_values("arch"), "backbones")
    sys.exit(not complete)
