"""The notebooks of experiments on data as it lies on people's disks: a file that is cut short, a test set without real frames."""
import json
import shutil
from pathlib import Path

import pandas as pd
import papermill
import pytest

from bcos_nb.data import forge_dataset, read_catalog

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A miniature with a training beside it: the small detector that comes with the project."""
    root = tmp_path_factory.mktemp("broken")
    forge_dataset(root / "data", identities=10, frames_per_video=8, size=64, seed=0)
    (root / "train").mkdir()
    for kind in ("safetensors", "json"):
        shutil.copy(ROOT / f"data/examples/bcos.{kind}", root / f"train/detector.{kind}")
    (root / "train/metrics.json").write_text("{}")
    (root / "train/params.json").write_text(json.dumps(dict(data=str(root / "data"), dataset="FaceForensics++", compression="c23")))
    return root


def execute(small, name, **parameters):
    run = small / name
    papermill.execute_notebook(ROOT / f"nbs/experiments/{name}.ipynb", small / f"{name}.ipynb", kernel_name="python3", progress_bar=False, parameters=dict(
        run_dir=str(run), detector=str(small / "train"), data=str(small / "data"), image_size=64, frames_per_video=8) | parameters)
    return run


def test_a_frame_cut_short_is_left_out_and_counted(small):
    catalog = read_catalog(small / "data", split="test", compression="c23")
    broken = small / "data" / catalog["frame"].iloc[3]
    whole = broken.read_bytes()
    broken.write_bytes(whole[:300])
    try:
        run = execute(small, "detect", compressions=["c23"])
    finally:
        broken.write_bytes(whole)
    scores, metrics = pd.read_parquet(run / "scores.parquet"), json.loads((run / "metrics.json").read_text())
    assert len(scores) == len(catalog) - 1 and metrics["unreadable"] == {"FaceForensics++ c23": 1}
    assert set(catalog["frame"]) - set(scores["frame"]) == {catalog["frame"].iloc[3]}


def test_a_test_set_of_one_class_is_told_before_any_is_scored(small):
    root = small / "fakes"
    shutil.copytree(small / "data", root)
    listed = root / "dataset_json/FaceForensics++.json"
    content = json.loads(listed.read_text())
    for label in content["FaceForensics++"]:
        if "real" in label:
            content["FaceForensics++"][label]["test"] = {compression: {} for compression in content["FaceForensics++"][label]["test"]}
    listed.write_text(json.dumps(content))
    (small / "detect/scores.parquet").unlink(missing_ok=True)
    with pytest.raises(papermill.PapermillExecutionError, match="FaceForensics.. c40: its test split holds fakes only.*Take it out of test_sets"):
        execute(small, "detect", compressions=["c23"], test_sets=[dict(data=str(root), dataset="FaceForensics++", compression="c40")])
    assert not (small / "detect/scores.parquet").exists()
