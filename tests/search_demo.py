"""Searches hyperparameters on the miniature for the study's Figure 7: `make search` (20 to 40 core-minutes), resumable.

The ordinary network, the study's B-cos form and ours at B = 1.25: 18 combinations each of the study's space, at most 6 epochs, 4 frames a video,
two workers.
Writes data/bench/search.csv, which nbs/reports/search_figures.ipynb shows. The trials stay in runs/search.
"""
import time

import pandas as pd
from measured import ROOT, write

from bcos_nb.data import forge_dataset
from bcos_nb.training.search import SearchConfig, run_search, search_table

SEARCHES = [("ordinary", None, "study"), ("B-cos, B = 1.25, the study's form", 1.25, "study"), ("B-cos, B = 1.25, ours", 1.25, "ours")]
SHARED = dict(trials=18, epochs=6, width=0.25, arch_options={"stem": "fine"}, training={"crop": 64}, image_size=128, frames_per_video=4)

if __name__ == "__main__":
    data, folder, tables = ROOT / "data/miniature", ROOT / "runs/search", []
    if not data.is_dir():
        forge_dataset(data, identities=100, frames_per_video=8, size=128, seed=0)
    for name, b, form in SEARCHES:
        begin = time.monotonic()
        table = search_table(run_search(SearchConfig("resnet10", b, form, data=str(data), **SHARED), folder, workers=2))
        print(f"{name}: {table['seconds'].sum() / 60:.1f} minutes of training, {(time.monotonic() - begin) / 60:.1f} by the clock now", flush=True)
        tables.append(table.assign(search=name, arch="resnet10", b=b, form=form))
    first = ["search", "arch", "b", "form"]
    table = pd.concat(tables)
    write(table[first + [column for column in table.columns if column not in first]].round({"auc": 4}), "search")
