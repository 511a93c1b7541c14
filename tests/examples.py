"""Writes data/examples: three forged faces of the miniature and two small detectors trained on it, for the explainers' notebooks.

    make demo                   if data/miniature is not there yet
    python tests/examples.py    five minutes on 2 cores
"""
import tempfile
from pathlib import Path

import torch
from torchvision.io import write_png

from bcos_nb.batch.presets import load_preset
from bcos_nb.data import load_frames, read_catalog
from bcos_nb.detection import score_frames
from bcos_nb.models import create_detector, save_detector
from bcos_nb.training import FitConfig, fit

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "data" / "examples"
METHODS = ("Deepfakes", "Face2Face", "NeuralTextures")


def main():
    preset = load_preset("demo")
    settings = {name: value for name, value in preset["training"].items() if name != "compression"} | dict(epochs=8)
    frames = {split: load_frames(read_catalog(ROOT / "data" / "miniature", split=split, compression="c23"), 128) for split in ("train", "val", "test")}
    FOLDER.mkdir(parents=True, exist_ok=True)
    sure = torch.ones(len(frames["test"]), dtype=torch.float64)
    for name, b in (("ordinary", None), ("bcos", 2)):
        torch.manual_seed(0)
        detector = create_detector("resnet10", b=b, width=0.25, stem="fine", **({"energy_stem": True, "max_out": 1} if b else {}))
        with tempfile.TemporaryDirectory() as place:
            history = fit(detector, frames["train"], frames["val"], FitConfig(**settings), place)
        save_detector(detector.eval(), FOLDER / f"{name}.safetensors")
        scores = score_frames(detector, frames["test"])
        sure = torch.minimum(sure, torch.as_tensor(scores["probability"].to_numpy()))
        print(name, history[["epoch", "val_auc"]].to_string(index=False))
    catalog, people = frames["test"].catalog, set()
    for method in METHODS:  # the fake of each method that both are surest of, of three people
        source = catalog["source_frame"].str.rsplit("/", n=1).str[0]
        rows = torch.as_tensor(((catalog["method"] == method) & ~source.isin(people)).to_numpy()).nonzero()[:, 0]
        chosen = rows[sure[rows].argmax()]
        people.add(source.iloc[int(chosen)])
        write_png(frames["test"].images[chosen], str(FOLDER / f"{method}.png"))
        write_png(frames["test"].masks[chosen], str(FOLDER / f"{method}_mask.png"))
        print(method, catalog["frame"].iloc[int(chosen)], f"p(fake) of both at least {float(sure[chosen]):.3f}")


if __name__ == "__main__":
    main()
