"""A folder of runs as the experiments write it, with invented numbers that are known beforehand."""
import json
from pathlib import Path

import numpy as np
import pandas as pd
from safetensors.numpy import save_file

B_VALUES = (None, 1.25, 1.75, 2.0, 2.5)
METHODS = ("Deepfakes", "Face2Face", "FaceSwap", "NeuralTextures")
CAMS = ("gradcam", "gradcam++", "xgradcam", "layercam")
THRESHOLDS = tuple(round(step / 10, 1) for step in range(11))
MASK_AREA = 0.18


def frame_path(method: str, video: int, frame: int) -> str:
    return f"rgb/FaceForensics++/manipulated_sequences/{method}/c23/frames/{video:03d}_{video + 1:03d}/{frame:03d}.png"


def mask_score(b: float | None, explainer: str, threshold: float, weighting: str) -> float:
    """The mean score that a table must show; samples scatter around it by a constant of their video."""
    start = {"uniform": MASK_AREA, "mean mask": 0.6}.get(explainer, 0.5 if b is None else 0.3 + 0.05 * b)
    slope = {"uniform": 0.0, "mean mask": 0.1}.get(explainer, 0.2)
    return start + slope * threshold if weighting == "weighted" else MASK_AREA + slope * threshold


def face(rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Something like a face, uint8 [3, H, W], and a mask in it, bool [H, W]."""
    y, x = np.mgrid[:size, :size] / size - 0.5
    oval = (x / 0.28) ** 2 + (y / 0.38) ** 2 < 1
    mask = (x / 0.2) ** 2 + ((y - 0.08) / 0.25) ** 2 < 1
    skin = rng.uniform(120, 220, 3)[:, None, None] * np.array([1, 0.8, 0.7])[:, None, None]
    image = np.where(oval, skin, rng.uniform(40, 200, 3)[:, None, None]) + rng.normal(0, 8, (3, size, size))
    for eye in (-0.1, 0.1):
        image[:, (x - eye) ** 2 + (y + 0.08) ** 2 < 0.0012] = 40
    return np.clip(image, 0, 255).astype(np.uint8), mask


def blob(rng: np.random.Generator, size: int, sharp: float) -> np.ndarray:
    """A map in [0, 1], float16 [H, W]."""
    y, x = np.mgrid[:size, :size] / size - 0.5
    spot = np.exp(-((x - rng.normal(0, 0.05)) ** 2 + (y - rng.normal(0.08, 0.05)) ** 2) * 12 * sharp)
    noisy = spot + 0.1 * rng.random((size, size))
    return (noisy / noisy.max()).astype(np.float16)


def put(folder: Path, params: dict, metrics: dict, tables: dict, tensors: dict | None = None) -> None:
    folder.mkdir(parents=True)
    (folder / "params.json").write_text(json.dumps(params))
    for name, table in tables.items():
        table.to_parquet(folder / f"{name}.parquet")
    if tensors:
        save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, folder / "examples.safetensors")
    (folder / "metrics.json").write_text(json.dumps(metrics))


def score_rows(game: str, b: float | None, explainers, samples: list[str], level) -> pd.DataFrame:
    rows = [dict(game=game, arch="resnet10", b=b, explainer=explainer, dataset="FaceForensics++", compression="c23", sample=sample,
                 threshold=threshold, weighting=weighting, score=level(b, explainer, threshold, weighting) + (0.02 if index % 2 else -0.02))
            for explainer in explainers for index, sample in enumerate(samples)
            for threshold in THRESHOLDS for weighting in ("weighted", "unweighted")]
    return pd.DataFrame(rows).astype({"b": float})


def invent_runs(root: Path, *, b_values=B_VALUES, size: int = 128, seed: int = 0) -> Path:
    """Writes complete runs of four experiments for every B below `root`."""
    samples = [frame_path(method, video, 0) for method in METHODS for video in range(4)]
    faces = [face(np.random.default_rng(seed + k), size) for k in range(len(METHODS))]
    for number, b in enumerate(b_values):
        rng = np.random.default_rng(seed + 100 + number)
        name = f"resnet10-{'ordinary' if b is None else f'b{b:g}'}-c23"
        who = dict(arch="resnet10", b=b, dataset="FaceForensics++", compression="c23", data="data/demo")
        epochs = np.arange(5)
        history = pd.DataFrame({"epoch": epochs, "train_loss": 0.7 * np.exp(-epochs / 3), "val_auc": 0.97 - 0.4 * np.exp(-epochs)})
        put(root / "train" / name, dict(who, width=0.5, seed=0), {"val_auc": 0.96, "epochs": 5, "seconds": 60.0}, {"history": history})
        quality = dict(auc=0.98 - 0.01 * number, f1=0.9, average_precision=0.97, recall=0.88, accuracy=0.86, eer=0.11)
        label = np.tile([0, 1, 1, 1, 1], 8)
        scored = pd.DataFrame({
            "frame": [f"frame{k}" for k in range(40)], "video": [f"video{k // 5}" for k in range(40)], "label": label,
            "method": np.tile(["real", *METHODS], 8), "probability": label * 0.6 + rng.random(40) * 0.4, "logit_real": 0.0, "logit_fake": 1.0})
        scored = pd.concat([scored.assign(dataset="FaceForensics++", compression=compression) for compression in ("c23", "c40")])
        metrics = {"arch": "resnet10", "b": b, "c23": quality, "c40": {**quality, "auc": quality["auc"] - 0.1},
                   "completeness_error": None if b is None else 2e-6}
        put(root / "detect" / name, dict(who, compressions=["c23", "c40"]), metrics, {"scores": scored})
        explainers = CAMS if b is None else ("bcos", *CAMS)
        tensors = {"images": np.stack([image for image, _ in faces]), "masks": np.stack([mask for _, mask in faces]).astype(np.uint8),
                   "logits": np.stack([-np.ones(4), rng.normal(1, 1, 4)], 1).astype(np.float32)}
        tensors |= {f"maps/{one}": np.stack([blob(rng, size, b or 0.7) for _ in faces]) for one in explainers}
        if b is not None:
            colour = tensors["images"].transpose(0, 2, 3, 1) / 255
            tensors["rgba/bcos"] = np.concatenate([colour, tensors["maps/bcos"][..., None]], -1).astype(np.float16)
            tensors["contributions/bcos"] = (tensors["maps/bcos"] - 0.3).astype(np.float16)
        put(root / "mask_game" / name, dict(who, explainers=explainers), {"arch": "resnet10", "b": b, "mask_area": MASK_AREA},
            {"scores": score_rows("mask", b, (*explainers, "uniform", "mean mask"), samples, mask_score)}, tensors)
        grid = np.concatenate([np.concatenate([face(np.random.default_rng(9 + 3 * r + c), size)[0] for c in range(3)], 2) for r in range(3)], 1)
        tensors = {"images": np.stack([grid, grid]), "positions": np.array([4, 7]), "logits": np.zeros((2, 2), np.float32)}
        tensors |= {f"maps/{one}": np.stack([blob(rng, 3 * size, 1.0)] * 2) for one in explainers}
        level = lambda b, explainer, threshold, weighting: 1 / 9 if weighting == "unweighted" else 0.25 + 0.1 * threshold
        put(root / "grid_game" / name, dict(who, explainers=explainers, n=3), {"arch": "resnet10", "b": b},
            {"scores": score_rows("grid", b, explainers, [f"grid{k:03d}" for k in range(10)], level)}, tensors)
    return root


# ---- both games as they are played for the study's tables: several backbones, scenes, measures, further explainers, controls

BACKBONES = {"resnet34": (None, 1.25, 2.5), "xception": (None, 2.5), "vitc_ti": (None, 2.0)}
POST_HOC = (*CAMS, "lime", "saliency")
CONSTANT = ("uniform", "mean mask", "centre", "edges")
SCENES = 8
MEASURES = {"mask": ("weighted", "unweighted", "specificity", "soft", "strength", "iou", "hit"), "grid": ("weighted", "unweighted", "specificity", "iou", "hit")}


def game_level(game: str, b: float | None, explainer: str, weighting: str) -> float:
    """Where the scores of a row lie at threshold 0."""
    base, _, control = explainer.partition(", ")
    level = {"uniform": 0.11, "mean mask": 0.3, "centre": 0.22, "edges": 0.15}.get(base, 0.3 + 0.02 * (*POST_HOC, "bcos").index(base) if base not in CONSTANT else 0)
    level += (0.02 * b if b else 0) - (0.12 if control else 0) + (0.1 if game == "mask" else 0)
    return level + {"weighted": 0, "unweighted": -0.05, "specificity": -0.2, "soft": 0.01, "strength": 0.02, "iou": -0.1, "hit": 0.1}[weighting]


def game_samples(game: str) -> pd.DataFrame:
    """samples.parquet: fakes of four methods made from the same scenes, two frames of each video; or grids, one a scene and method."""
    rows = [dict(sample=frame_path(method, video, frame), video=f"{method}/{video:03d}", scene=f"youtube/{video:03d}", method=method)
            for method in METHODS for video in range(SCENES) for frame in range(2 if game == "mask" else 1)]
    return pd.DataFrame([row | ({"sample": f"grid-{k:04d} {row['sample']}"} if game == "grid" else {}) for k, row in enumerate(rows)])


def game_scores(game: str, arch: str, b: float | None, explainers, samples: pd.DataFrame, seed: int = 0, thresholds=THRESHOLDS) -> pd.DataFrame:
    """Scores that scatter by scene, method and sample around `game_level`, and rise over the threshold."""
    rng, measures, count = np.random.default_rng(seed), MEASURES[game], len(samples)
    scene = samples["scene"].map(dict(zip(samples["scene"].unique(), rng.normal(0, 0.05, SCENES)))) + samples["method"].map({name: 0.01 * k for k, name in enumerate(METHODS)})
    level = np.array([[game_level(game, b, explainer, weighting) for weighting in measures] for explainer in explainers])
    score = level[:, :, None, None] + 0.2 * np.array(thresholds)[:, None] + scene.to_numpy() + rng.normal(0, 0.03, (*level.shape, len(thresholds), count))
    names = pd.MultiIndex.from_product([explainers, measures, thresholds, samples["sample"]], names=["explainer", "weighting", "threshold", "sample"])
    table = pd.DataFrame({"score": score.reshape(-1)}, index=names).reset_index()
    return table.assign(game=game, arch=arch, b=np.nan if b is None else float(b), dataset="FaceForensics++", compression="c23")


def curves_of(arch: str, b: float | None, explainers) -> pd.DataFrame:
    """faithfulness.parquet: p(fake) falls or rises in a line, steeper for later explainers."""
    return pd.DataFrame([dict(arch=arch, b=np.nan if b is None else b, explainer=explainer, dataset="FaceForensics++", compression="c23", sample=f"youtube/{video:03d}/000.png", curve=curve,
                              fraction=step / 4, probability=(0.9 - 0.01 * video) * (max(0, 1 - (1 + k) * step / 4) if curve == "deletion" else min(1, (1 + k) * step / 4)))
                         for k, explainer in enumerate(("uniform", *explainers)) for video in range(4) for curve in ("deletion", "insertion") for step in range(5)])


def steps_of(arch: str, b: float | None, explainers) -> pd.DataFrame:
    """departure.parquet: scores fall step by step, and so does the AUC."""
    return pd.DataFrame([dict(game="departure", arch=arch, b=np.nan if b is None else b, explainer=explainer, dataset="FaceForensics++", compression="c23", sample=f"{frame}", threshold=0.0,
                              weighting="weighted", family=family, region="mask", step=step, value=float(step), chance=0.15, probability=0.9 - 0.1 * step, auc=0.95 - 0.1 * step,
                              score=0.6 - 0.05 * step * (1 + k) + 0.01 * frame)
                         for k, explainer in enumerate(explainers) for family in ("grid", "noise") for step in range(4) for frame in range(3)])


def invent_games(root: Path, *, backbones=BACKBONES, size: int = 48, pictures: bool = True) -> Path:
    """Writes complete runs of both games for every backbone and B below `root`."""
    number = 0
    for arch, exponents in backbones.items():
        for b in exponents:
            name, number = f"{arch}-{'ordinary' if b is None else f'b{b:g}'}-c23", number + 1
            own = POST_HOC if b is None else ("bcos", *POST_HOC)
            rows = (*own, *CONSTANT, *(f"{one}, {wrong}" for wrong in ("random weights", "shuffled labels") for one in own))
            who = dict(arch=arch, b=b, dataset="FaceForensics++", compression="c23", data="data/miniature", detector=f"../../train/{name}")
            put(root / "train" / name, dict(arch=arch, b=b, width=0.25, image_size=size, training={"epochs": 4}), {}, {})
            rng = np.random.default_rng(number)
            faces = [face(np.random.default_rng(k), size) for k in range(9)]
            tensors = {"images": np.stack([image for image, _ in faces[:4]]), "masks": np.stack([mask for _, mask in faces[:4]]).astype(np.uint8), "logits": np.zeros((4, 2), np.float32)}
            tensors |= {f"maps/{one}": np.stack([blob(rng, size, b or 0.7) for _ in range(4)]) for one in own}
            samples = game_samples("mask")
            put(root / "mask_game" / name, dict(who, explainers=own), dict(arch=arch, b=b, mask_area=MASK_AREA),
                {"scores": game_scores("mask", arch, b, rows, samples, number), "samples": samples, "faithfulness": curves_of(arch, b, own[:2])}, tensors if pictures else None)
            grid = np.concatenate([np.concatenate([image for image, _ in faces[3 * r:3 * r + 3]], 2) for r in range(3)], 1)
            tensors = {"images": grid[None], "positions": np.array([4]), "logits": np.zeros((1, 2), np.float32)}
            tensors |= {f"maps/{one}": blob(rng, 3 * size, 1.0)[None] for one in own}
            samples = game_samples("grid")
            put(root / "grid_game" / name, dict(who, explainers=own, n=3), dict(arch=arch, b=b, n=3, chance=1 / 9),
                {"scores": game_scores("grid", arch, b, rows, samples, number), "samples": samples, "departure": steps_of(arch, b, own[:2])}, tensors if pictures else None)
    return root
