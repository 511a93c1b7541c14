import json

import numpy as np
import pandas as pd
import pytest
import torch

from bcos_nb.data import Frames
from bcos_nb.explainers import explain
from bcos_nb.games import localization_scores
from bcos_nb.models import create_detector, save_detector
from bcos_nb.widgets import ThresholdExplorer, find_runs, open_runs
from bcos_nb.widgets.thresholds import STEPS, paint, view_frame


@pytest.fixture(scope="module")
def detectors():
    torch.manual_seed(0)
    return {"B = 2": create_detector("resnet10", b=2, width=0.25).eval(), "ordinary": create_detector("resnet10", width=0.25).eval()}


@pytest.fixture(scope="module")
def frames():
    torch.manual_seed(1)
    masks = torch.zeros(4, 1, 64, 64, dtype=torch.uint8)
    masks[1:, :, 10:40, 20:50] = 255
    catalog = pd.DataFrame({"frame": list("abcd"), "mask": "", "video": list("abcd"), "label": [0, 1, 1, 1],
                            "method": ["real", "Deepfakes", "FaceSwap", "FaceSwap"]})
    return Frames((torch.rand(4, 3, 64, 64) * 255).byte(), masks, torch.tensor([0, 1, 1, 1]), list("abcd"), catalog)


@pytest.fixture
def explorer(detectors, frames):
    return ThresholdExplorer(detectors, frames)


def scores_of(detector, frames, row, explainer, threshold):
    maps = explain(detector, frames.images[[row]].float() / 255, explainer).maps
    scores = localization_scores(maps, frames.masks[[row], 0] == 255, (threshold,))
    return [f"{scores[name].item():.4f}" for name in ("weighted", "unweighted")]


@pytest.mark.parametrize("threshold", [0.0, 0.07, 0.29, 0.58, 1.0])
def test_text_is_localization_scores(explorer, detectors, frames, threshold):
    explorer.threshold.value = threshold
    for value in scores_of(detectors["B = 2"], frames, 1, "bcos", threshold):
        assert f">{value}</b>" in explorer.text.value


def test_everything_follows(explorer, detectors, frames):
    pictures = [image.value for image in explorer.images]
    explorer.threshold.value = 0.8
    assert explorer.images[2].value != pictures[2] and explorer.images[:2] and explorer.images[1].value == pictures[1]
    assert list(explorer.curves.data[3].x) == [0.8, 0.8] and explorer.curves.data[4].y[0] == pytest.approx(explorer.score("weighted"))
    explorer.next.click()
    assert explorer.images[0].value != pictures[0] and "Frame 2 of 3" in explorer.verdict.value
    explorer.previous.click(), explorer.previous.click()
    assert "Frame 3 of 3" in explorer.verdict.value
    explorer.method.value = "FaceSwap"
    assert "Frame 1 of 2" in explorer.verdict.value
    explorer.detector.value = "ordinary"
    assert explorer.explainer.value == "gradcam" and f">{scores_of(detectors['ordinary'], frames, 2, 'gradcam', 0.8)[0]}</b>" in explorer.text.value
    assert explorer.message.value == ""


def test_explanations_are_kept_within_bounds(detectors, frames):
    explorer = ThresholdExplorer(detectors, frames, keep=2)
    first = explorer.view
    explorer.step(1), explorer.step(-1)
    assert explorer.view is first
    explorer.step(1), explorer.step(1)
    assert len(explorer.views) == 2


def test_a_real_face_has_no_score(explorer):
    explorer.method.value = "real"
    assert "nothing was forged" in explorer.verdict.value and explorer.text.value.count("–") == 2 and explorer.message.value == ""


def test_errors_are_shown(detectors, frames):
    explorer = ThresholdExplorer(detectors, frames, explainers=["bcos"])
    explorer.detector.value = "ordinary"
    assert "choose another detector" in explorer.message.value
    explorer.detector.value = "B = 2"
    assert explorer.message.value == "" and explorer.view is not None
    with pytest.raises(ValueError, match="no detector"):
        ThresholdExplorer({}, frames)
    with pytest.raises(ValueError, match="no frame"):
        ThresholdExplorer(detectors, frames[torch.zeros(4, dtype=torch.bool)])


def test_pictures(detectors, frames):
    view = view_frame(detectors["B = 2"], frames, 1, "bcos")
    assert paint(view, 0.5)[:3] == b"\xff\xd8\xff" and len(view.scores["weighted"]) == len(STEPS) == 101
    assert np.array_equal(view.inside, (frames.masks[1, 0] == 255).numpy())


def test_runs_are_found_and_refused(tmp_path, monkeypatch):
    run = tmp_path / "runs" / "demo" / "train" / "one"
    run.mkdir(parents=True)
    save_detector(create_detector("resnet10", b=2, width=0.25), run / "detector.safetensors")
    monkeypatch.delenv("BCOS_NB_RUNS", raising=False)
    assert find_runs(tmp_path) is None
    (run / "metrics.json").write_text("{}")
    (tmp_path / "nbs" / "explore").mkdir(parents=True)
    assert find_runs(tmp_path / "nbs" / "explore") == (tmp_path / "runs" / "demo").resolve()
    (run / "params.json").write_text(json.dumps({"data": "data/gone"}))
    with pytest.raises(FileNotFoundError, match="data/gone"):
        open_runs(tmp_path / "runs" / "demo")
    monkeypatch.setenv("BCOS_NB_RUNS", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="BCOS_NB_RUNS"):
        find_runs()
