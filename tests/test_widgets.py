import asyncio
import json
import time
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pandas as pd
import pytest
import torch

from bcos_nb.data import Frames, forge_dataset
from bcos_nb.explainers import explain
from bcos_nb.games import localization_scores, specificity
from bcos_nb.models import create_detector, save_detector
from bcos_nb.reports.figures import heat_overlay
from bcos_nb.widgets import AttributionExplorer, ExplanationCache, MapCanvas, Panel, ThresholdExplorer, find_runs, open_runs
from bcos_nb.widgets.canvas import LEVELS, packed_table, restored_attribution, stored_attribution
from bcos_nb.widgets.explanations import named_detectors
from bcos_nb.widgets.explorer import Background, Dropped, frame_sets, hidden_image, look
from bcos_nb.widgets.own_images import make_own
from bcos_nb.widgets.saving import canvas_page
from bcos_nb.widgets.thresholds import STEPS, mean_curves


@pytest.fixture(scope="module")
def detectors():
    torch.manual_seed(0)
    return {"ResNet-10, ordinary": create_detector("resnet10", width=0.25).eval(), "ResNet-10, B = 2": create_detector("resnet10", b=2, width=0.25).eval()}


@pytest.fixture(scope="module")
def frames():
    torch.manual_seed(1)
    masks = torch.zeros(5, 1, 64, 64, dtype=torch.uint8)
    for k in range(1, 5):
        masks[k, :, 8 * k:8 * k + 24, 20:50] = 255
    catalog = pd.DataFrame({"frame": list("abcde"), "mask": "", "video": list("abcde"), "label": [0, 1, 1, 1, 1],
                            "method": ["real", "Deepfakes", "FaceSwap", "FaceSwap", "FaceSwap"], "source_frame": [None, "a", "a", "a", "gone"]})
    return Frames((torch.rand(5, 3, 64, 64) * 255).byte(), masks, torch.tensor([0, 1, 1, 1, 1]), list("abcde"), catalog)


def scores_of(detector, frames, row, explainer, threshold):
    maps = explain(detector, frames.images[[row]].float() / 255, explainer).maps
    return {name: values.item() for name, values in localization_scores(maps, frames.masks[[row], 0] == 255, (threshold,)).items()}


# ---- the canvas

@pytest.mark.parametrize("power", [1, 3, 8])
def test_stored_maps_keep_what_localization_scores_keeps(power):
    generator = torch.Generator().manual_seed(power)
    maps = torch.rand(3, 48, 48, generator=generator) ** power
    maps[0, :10] = (torch.arange(48) / 50).float().clamp(max=1)  # on the slider's steps
    maps[1, :5], maps[2] = 0, torch.nextafter((torch.randint(0, 101, (48, 48), generator=generator) / 100).float(), torch.tensor(0.0)).clamp(min=0)  # just below
    regions = torch.rand(3, 48, 48, generator=generator) > 0.6
    stored = np.stack([stored_attribution(one) for one in maps])
    scores = localization_scores(maps, regions, STEPS)
    for k, threshold in enumerate(STEPS):
        kept = stored >= round(threshold * LEVELS) + 1
        share = (kept & regions.numpy()).sum((1, 2)) / np.maximum(kept.sum((1, 2)), 1)
        assert np.array_equal(share.astype(np.float32), scores["unweighted"][k].numpy()), threshold
        values = restored_attribution(stored) * kept
        weighted = (values * regions.numpy()).sum((1, 2)) / np.maximum(values.sum((1, 2)), 1e-12)
        assert np.abs(weighted - scores["weighted"][k].numpy()).max() < 2e-4


def test_a_table_sends_a_frame_once():
    image, mask = np.zeros((8, 8, 3), np.uint8), np.eye(8, dtype=bool)
    content = packed_table([[Panel(image, np.eye(8), mask=mask), Panel(image, np.eye(8), mask=mask)], ["none here", None]], ["a", "b"], ["r", "s"])
    assert len(content["images"]) == len(content["masks"]) == 1 and [panel["words"] for panel in content["panels"]] == ["", "", "none here"]
    assert np.array_equal(np.unpackbits(np.frombuffer(content["masks"][0]["bits"], np.uint8)).reshape(8, 8), mask)
    with pytest.raises(ValueError, match="one height and width"):
        packed_table([[Panel(image, np.eye(4))]])
    with pytest.raises(ValueError, match="uint8"):
        packed_table([[Panel(image / 255)]])
    with pytest.raises(ValueError, match="in \\[0, 1\\]"):
        packed_table([[Panel(image, np.full((8, 8), np.nan))]])


def test_a_moved_control_sends_no_picture():
    canvas = MapCanvas([[Panel(np.zeros((8, 8, 3), np.uint8), np.eye(8))]])
    sent = []
    canvas.send_state = lambda key=None: sent.append(key)
    canvas.threshold, canvas.look, canvas.opacity, canvas.brush = 0.7, "contours", 0.4, [1, 1, 4, 4]
    assert "content" not in str(sent) and canvas.threshold == 0.7


def test_page_holds_the_maps_and_asks_nobody(frames):
    canvas = MapCanvas([[Panel(np.zeros((8, 8, 3), np.uint8), np.eye(8), title="</script><b>")]])
    page = canvas_page(canvas, "a & b", scores=pd.DataFrame({"weighted": [np.nan]}))
    assert "a &amp; b" in page and "</script><b>" not in page and "http" not in page.replace("http-equiv", "")


# ---- work beside the controls

def test_the_last_request_counts():
    shown = []

    async def kernel():
        background, done = Background(), asyncio.Event()
        for k in range(4):
            background.run("view", lambda wanted, k=k: (time.sleep(0.03), k)[1], lambda k: (shown.append(k), done.set()), shown.append)
        assert not shown
        await asyncio.wait_for(done.wait(), 20)
        failed = asyncio.Event()
        background.run("view", lambda wanted: 1 / 0, shown.append, lambda error: (shown.append(type(error)), failed.set()))
        await asyncio.wait_for(failed.wait(), 20)

    ThreadPoolExecutor(1).submit(asyncio.run, kernel()).result()
    assert shown == [3, ZeroDivisionError]


def test_what_nobody_wants_any_more_is_given_up(detectors, frames):
    seen = []

    def wanted():
        seen.append(1)
        return len(seen) < 3

    with pytest.raises(Dropped):
        look(detectors, frames, 1, (["B = 2"], [("resnet10", "lime")], [["ResNet-10, B = 2"]]), ExplanationCache(), wanted=wanted)
    assert len(seen) == 3  # of LIME's passes


def test_neighbours_are_made_ready_for_the_browser(detectors, frames, tmp_path):
    async def kernel():
        explorer = ThresholdExplorer(detectors, frames, ["bcos", "gradcam"], folder=tmp_path)
        begin = time.monotonic()
        while len(explorer.views) < 4:  # all fakes
            assert time.monotonic() - begin < 60, explorer.message.value
            await asyncio.sleep(0.02)
        asked = []
        explorer.cache.get_many = lambda *given, **named: asked.append(given)
        explorer.chooser.step(1)
        assert explorer.shown.row == 2 and not asked  # shown before anything else ran
        return explorer.canvas.content, explorer

    content, explorer = ThreadPoolExecutor(1).submit(asyncio.run, kernel()).result()
    alone = ThresholdExplorer(detectors, frames, ["bcos", "gradcam"], folder=tmp_path)
    alone.chooser.step(1)
    assert content == alone.canvas.content and content["panels"][0]["attribution"] != explorer.views[next(iter(explorer.views))].content["panels"][0]["attribution"]
    asked = next(iter(alone.views.values())).asked
    before = asked.key(2, detectors)
    with torch.no_grad():
        next(detectors["ResNet-10, B = 2"].parameters()).mul_(1.0)
    assert asked.key(2, detectors) != before  # other weights, another picture


# ---- attributions

@pytest.fixture
def attributions(detectors, frames, tmp_path):
    return AttributionExplorer(detectors, frames, ["bcos", "gradcam"], folder=tmp_path)


@pytest.mark.parametrize("threshold", [0.0, 0.07, 0.29, 0.58, 1.0])
def test_scores_are_localization_scores(attributions, detectors, frames, threshold):
    attributions.threshold.value = threshold
    table = attributions.score_table()
    assert list(zip(table.detector, table.explainer)) == [("ResNet-10, ordinary", "gradcam"), ("ResNet-10, B = 2", "bcos"), ("ResNet-10, B = 2", "gradcam")]
    for row in table.itertuples():
        expected = scores_of(detectors[row.detector], frames, 1, row.explainer, threshold)
        assert row.weighted == pytest.approx(expected["weighted"], abs=1e-5) and row.unweighted == pytest.approx(expected["unweighted"], abs=1e-5)


def test_everything_follows(attributions, frames):
    panels = lambda: [panel for panel in attributions.canvas.content["panels"] if panel.get("attribution")]
    assert len(panels()) == 3 and attributions.shown.row == 1 and attributions.canvas.content["rows"][1].startswith("B = 2\np(fake)")
    before = panels()[0]["attribution"]
    attributions.chooser.next.click()
    assert attributions.shown.row == 2 and panels()[0]["attribution"] != before
    attributions.chooser.previous.click(), attributions.chooser.previous.click()
    assert attributions.shown.row == 4  # around the end
    attributions.canvas.hear(attributions.canvas, {"event": "step", "by": 1}, [])
    assert attributions.shown.row == 1
    attributions.chooser.strip.selected = 2
    assert attributions.shown.row == 3
    attributions.choice.rows["ordinary"].value = False
    assert len(panels()) == 2 and attributions.canvas.content["rows"] == [attributions.canvas.content["rows"][0]]
    attributions.target.value = 0
    assert int(attributions.shown.answers[0][0].target[0]) == 0
    attributions.look.value = "signed"
    assert attributions.canvas.look == "signed" and attributions.message.value == ""


def test_hidden_regions(attributions, detectors, frames):
    image = frames.images[[1]].float() / 255
    attributions.canvas.brush = [10, 5, 40, 90]  # reaches out of the picture
    for how in ("blurred", "grey", "source frame"):
        attributions.hiding.value = how
        source = frames.images[0].float() / 255
        hidden = hidden_image(image, (10, 5, 40, 64), how, source)
        if how == "grey":
            assert bool((hidden[..., 5:, 10:40] == 0.5).all()) and torch.equal(hidden[..., :10], image[..., :10])
        with torch.no_grad():
            for name, detector in detectors.items():
                assert torch.allclose(attributions.hidden[name][1], detector(hidden)[0], atol=1e-5), (how, name)
    page = attributions.page()
    assert all(f"{logits[1].softmax(0)[1]:.3f}</b>" in page for logits in attributions.hidden.values()) and "pixels at 10, 5: from the source frame" in page
    attributions.chooser.go(3)  # its source frame is gone
    assert 'role="alert"' in attributions.table.value
    attributions.canvas.brush = None
    assert not attributions.hidden and "Drag" in attributions.table.value


def test_filters_ask_the_judge(attributions, detectors, frames):
    chooser = attributions.chooser
    with torch.no_grad():
        p = detectors["ResNet-10, B = 2"](frames.images.float() / 255).softmax(1)[:, 1].numpy()
    chooser.judge.value, chooser.method.value = "ResNet-10, B = 2", "all frames"
    chooser.order.value = "least sure first"
    assert chooser.rows.tolist() == np.argsort(np.abs(p - 0.5), kind="stable").tolist()
    chooser.verdict.value = "right"
    assert set(chooser.rows) == set(np.flatnonzero((p > 0.5) == frames.labels.numpy()))
    chooser.verdict.value, chooser.confidence.value = "right or wrong", (0.0, 0.0)
    assert "No frame is left" in attributions.message.value
    chooser.confidence.value = (0.0, 1.0)
    assert attributions.message.value == "" and len(chooser.rows) == 5


def test_saved_and_restored(attributions, tmp_path):
    attributions.chooser.method.value, attributions.threshold.value, attributions.canvas.brush = "FaceSwap", 0.35, [4, 4, 30, 30]
    attributions.chooser.step(1)
    for label in ("settings", "CSV", "HTML"):
        attributions.saving.buttons[label].click()
    settings, scores, page = attributions.saving.written
    wanted, row = attributions.settings(), attributions.shown.row
    table = pd.read_csv(scores)
    assert len(table) == 3 and set(table.threshold) == {0.35} and table.probability_hidden.between(0, 1).all() and page.stat().st_size > 20_000
    attributions.chooser.method.value, attributions.threshold.value, attributions.canvas.brush = "Deepfakes", 0.8, None
    attributions.choice.explainers["bcos"].value = False
    attributions.saving.restore_from(settings.read_bytes())
    assert attributions.settings() == wanted and attributions.shown.row == row
    broken = json.loads(settings.read_text())
    broken["maps"]["explainers"] = ["nonsense"]
    attributions.saving.guarded(lambda: attributions.saving.restore_from(json.dumps(broken).encode()))
    assert "no &#x27;nonsense&#x27;" in attributions.saving.said.value
    attributions.saving.guarded(lambda: attributions.saving.restore_from(json.dumps({"instrument": "grids"}).encode()))
    assert "grids" in attributions.saving.said.value


def test_a_real_face_has_no_score(attributions):
    attributions.chooser.method.value = "real"
    assert attributions.shown.inside is None and attributions.score_table().weighted.isna().all() and attributions.message.value == ""


@pytest.fixture
def on_disk(tmp_path, frames):
    """The same faces as files, of which one is gone, one is cut short and one has no mask that can be read."""
    root = tmp_path / "data"
    (root / "masks").mkdir(parents=True)
    for k, name in enumerate("abcde"):
        cv2.imwrite(str(root / f"{name}.png"), frames.images[k].permute(1, 2, 0).numpy()[..., ::-1])
        cv2.imwrite(str(root / "masks" / f"{name}.png"), frames.masks[k, 0].numpy())
    catalog = frames.catalog.assign(frame=[f"{name}.png" for name in "abcde"], mask=[f"masks/{name}.png" for name in "abcde"])
    catalog.attrs.update(root=str(root), dataset="FaceForensics++", split="test")
    (root / "c.png").write_bytes((root / "c.png").read_bytes()[:300]), (root / "d.png").unlink(), (root / "masks" / "e.png").write_bytes(b"no mask")
    return catalog


@pytest.mark.parametrize("count", [1, 3, 4])
def test_a_last_batch_of_one_frame_counts_too(detectors, frames, count):
    few = frames[torch.arange(1, 1 + count)]
    table = mean_curves(detectors["ResNet-10, B = 2"], few, np.arange(count), ["gradcam"], ExplanationCache(), batch_size=2 if count > 1 else 8)["gradcam"]
    expected = np.mean([scores_of(detectors["ResNet-10, B = 2"], few, row, "gradcam", 0.3)["weighted"] for row in range(count)])
    assert table.query("measure == 'weighted' and threshold == 0.3")["mean"].item() == pytest.approx(expected, abs=1e-5) and set(table.samples) == {count}


def test_a_broken_file_takes_away_itself_and_nothing_else(detectors, on_disk, tmp_path):
    explorer = AttributionExplorer(detectors, on_disk, ["bcos", "gradcam"], folder=tmp_path, ahead=0)
    strip = [panel["note"] for panel in explorer.chooser.strip.content["panels"]]
    assert strip == ["Deepfakes", "unreadable", "unreadable", "unreadable"] and explorer.message.value == "" and explorer.shown.row == 1
    for words in ("c.png cannot be decoded", "d.png is not there", "e.png cannot be decoded"):
        explorer.chooser.step(1)
        assert words in explorer.message.value and "alert" in explorer.message.value and explorer.shown.row == 1  # what is shown stays
    explorer.chooser.step(1)
    assert explorer.message.value == "" and explorer.shown.row == 1
    explorer.chooser.order.value = "surest first"
    assert "3 of 5 frames could not be read and are left out by these filters" in explorer.message.value and "c.png" in explorer.message.value
    assert explorer.chooser.rows.tolist() == [1]


def test_means_leave_out_what_cannot_be_read_and_say_how_many_they_are_of(detectors, on_disk, tmp_path):
    explorer = ThresholdExplorer(detectors, on_disk, ["bcos", "gradcam"], folder=tmp_path, ahead=0)
    assert explorer.message.value == "" and explorer.shown.row == 1  # the other masks, for specificity, are those that can be read
    explorer.scope.index = 1
    assert explorer.message.value == "" and set(explorer.means["samples"]) == {1}
    b = on_disk.iloc[[1]].reset_index(drop=True)
    b.attrs.update(on_disk.attrs)
    alone = ThresholdExplorer(detectors, b, ["bcos", "gradcam"], folder=tmp_path, ahead=0)
    assert np.allclose(explorer.means.query("measure == 'weighted'")["mean"], np.concatenate([alone.shown.curves[place]["weighted"] for place in sorted(alone.shown.curves)]), atol=1e-6)
    (tmp_path / "data" / "b.png").unlink()
    explorer.kept_means.clear()
    explorer.draw()
    assert "is not there" in explorer.message.value or "cannot be decoded" in explorer.message.value


@pytest.mark.parametrize("content, words", [(b"{", "no JSON"), (b'{"instrument": "grids"}', "grids"), (b'{"instrument": "attributions"}', "not whole, or was changed by hand"),
                                            (b'{"instrument": "attributions", "maps": 3}', "not whole, or was changed by hand")])
def test_settings_that_are_none_are_refused_with_what_to_do(attributions, content, words):
    attributions.saving.guarded(lambda: attributions.saving.restore_from(content, "mine.json"))
    said = attributions.saving.said.value
    assert words in said and "mine.json" in said and "alert" in said and "hoose a" in said.replace("choose another", "Choose another")


def test_a_picture_that_the_browser_cannot_draw_is_said(attributions):
    attributions.saving.buttons["PNG"].click()
    attributions.canvas.hear(attributions.canvas, {"event": "no picture", "number": 1, "why": "SecurityError"}, [])
    assert "SecurityError" in attributions.saving.said.value and "HTML" in attributions.saving.said.value and attributions.canvas.waiting == {}


def test_explanations_are_shared_and_kept_within_bounds(detectors, frames, tmp_path):
    cache = ExplanationCache(max_bytes=200_000)
    for instrument in (AttributionExplorer, ThresholdExplorer):
        instrument(detectors, frames, ["bcos", "gradcam"], cache=cache, folder=tmp_path)
    assert cache.computed == 3  # the second found them
    explorer = AttributionExplorer(detectors, frames, ["bcos", "gradcam"], cache=cache, folder=tmp_path)
    for _ in range(4):
        explorer.chooser.step(1)
    assert cache.bytes <= 200_000


def test_what_cannot_be_is_refused(detectors, frames):
    with pytest.raises(ValueError, match="no detector"):
        AttributionExplorer({}, frames)
    with pytest.raises(ValueError, match="no frame"):
        ThresholdExplorer(detectors, frames[torch.zeros(5, dtype=torch.bool)])
    with pytest.raises(ValueError, match="no explainer 'nonsense'"):
        ThresholdExplorer(detectors, frames, ["nonsense"])
    with pytest.raises(ValueError, match="can serve"):
        ThresholdExplorer({"ordinary": detectors["ResNet-10, ordinary"]}, frames, ["bcos"])
    assert list(frame_sets({"one": frames, "two": frames})) == ["one", "two"]


def test_images_of_ones_own(attributions, detectors):
    chooser = attributions.chooser
    assert chooser.own is None  # not made before it is wanted
    chooser.source.index = 1
    assert attributions.shown is None and attributions.message.value == "" and "your image" in attributions.canvas.content["panels"][0]["words"]
    attributions.saving.buttons["CSV"].click()
    assert "no scores to save" in attributions.saving.said.value
    pictures = [np.random.default_rng(k).integers(0, 256, (90, 70, 3), dtype=np.uint8) for k in range(2)]
    for k, picture in enumerate(pictures):
        chooser.own.add(f"mine {k}.png", cv2.imencode(".png", picture)[1].tobytes(), whole=True)
    assert attributions.shown.row == 1 and "mine 1.png" in chooser.position.value  # the newest
    image = torch.from_numpy(make_own(cv2.imencode(".png", pictures[1])[1].tobytes(), "", 64, whole=True).whole).permute(2, 0, 1)[None].float() / 255
    table = attributions.score_table()
    for row in table.itertuples():
        with torch.no_grad():
            assert row.probability == pytest.approx(detectors[row.detector](image).softmax(1)[0, 1].item(), abs=1e-5)
    assert table.weighted.isna().all() and set(table.frame) == {"mine 1.png"}
    attributions.canvas.brush, attributions.hiding.value = [4, 4, 40, 40], "source frame"
    assert "no source frame" in attributions.table.value
    chooser.own.guarded(chooser.own.add, "letter.png", b"Dear reader")
    assert "letter.png is not an image" in chooser.own.refusals.children[-1].children[1].value and attributions.shown.row == 1
    settings = attributions.settings()
    chooser.step(1)
    chooser.source.index = 0
    assert attributions.shown.frames is chooser.sets["frames"] and len(chooser.rows) == 4
    attributions.restore(json.loads(json.dumps(settings)))
    assert chooser.is_own and attributions.score_table().frame.iloc[0] == "mine 1.png"
    chooser.own.remove(chooser.own.images[1])
    with pytest.raises(ValueError, match="mine 1.png, which isn't here"):
        attributions.restore(settings)
    chooser.own.remove(chooser.own.images[0])
    assert attributions.shown is None


# ---- thresholds

@pytest.fixture
def thresholds(detectors, frames, tmp_path):
    return ThresholdExplorer(detectors, frames, ["bcos", "gradcam"], folder=tmp_path)


def test_curves_are_the_games_scores(thresholds, detectors, frames):
    fakes = frames[1:]
    inside = fakes.masks[:, 0] == 255
    maps = explain(detectors["ResNet-10, B = 2"], fakes.images.float() / 255, "bcos").maps
    expected = localization_scores(maps, inside, STEPS) | {"specificity": specificity(maps, inside, STEPS, groups=fakes.videos)}
    for k in range(4):
        thresholds.chooser.go(k)
        curves = thresholds.shown.curves[0, 0]
        for name, values in expected.items():
            assert np.allclose(curves[name], values[:, k], atol=1e-5), (k, name)
    lines = {trace.yaxis: trace.y for trace in thresholds.curves.data if trace.name == "B-cos"}
    assert np.allclose(lines["y"], expected["weighted"][:, 3], atol=1e-5) and len(thresholds.curves.data) == 8
    table = thresholds.score_table()
    assert set(table.weighting) == {"weighted", "unweighted", "specificity", "kept"} and len(table) == 2 * 4 * 101 and set(table.b) == {2.0}
    shown = thresholds.canvas.content["panels"][0]
    assert np.allclose(shown["measures"]["specificity"], expected["specificity"][:, 3], atol=1e-5)


def test_means_with_intervals(thresholds, detectors, frames):
    thresholds.scope.index = 1
    fakes = frames[1:]
    maps = explain(detectors["ResNet-10, B = 2"], fakes.images.float() / 255, "gradcam").maps
    expected = localization_scores(maps, fakes.masks[:, 0] == 255, STEPS)["weighted"].double().mean(1)
    own = thresholds.means.query("explainer == 'gradcam' and measure == 'weighted'").sort_values("threshold")
    assert np.allclose(own["mean"], expected, atol=1e-5) and (own.low <= own["mean"] + 1e-9).all() and set(own.samples) == {4}
    assert "mean of 4 frames of 4 videos" in thresholds.table.value and len(thresholds.curves.data) == 16  # with bands
    computed = dict(thresholds.kept_means)
    thresholds.threshold.value = 0.2
    assert f"<b>{expected[20]:.3f}</b>" in thresholds.table.value
    thresholds.scope.index = 0
    thresholds.scope.index = 1
    assert {key: id(table) for key, table in computed.items()} == {key: id(table) for key, table in thresholds.kept_means.items()}
    thresholds.chooser.method.value = "real"
    assert "no fake" in thresholds.message.value


def test_heat_is_that_of_the_figures():
    image = np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    canvas = MapCanvas([[Panel(image, np.linspace(0, 1, 256).reshape(16, 16))]])
    heat = np.frombuffer(canvas.palette["heat"], np.uint8).reshape(256, 3)
    black = heat_overlay(np.zeros_like(image), np.ones((16, 16)))[0, 0]
    assert np.abs(black - 0.9 * heat[255]).max() <= 1  # the browser test compares the pixels


# ---- opening

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


def test_a_single_detector_names_itself_and_what_is_none_is_told(detectors, frames):
    detector = detectors["ResNet-10, B = 2"]
    assert list(named_detectors(detector)) == ["ResNet-10, B = 2"]
    for wrong, got in (("runs/demo", "got str"), ([detector], "got list"), ({"B = 2": "runs/demo"}, "'B = 2': str"), ({2: detector}, "2: ")):
        for explorer in (AttributionExplorer, ThresholdExplorer):
            with pytest.raises(TypeError, match=f"a mapping from names in print to detectors.*{got}"):
                explorer(wrong, frames)


def test_a_detector_that_is_gone_or_damaged_is_left_out_and_said(tmp_path):
    forge_dataset(tmp_path / "data", identities=6, frames_per_video=1, size=48, compressions=("c23",), progress=False)
    train = tmp_path / "runs" / "demo" / "train"
    for name, b in (("good", 2), ("gone", 1.5), ("damaged", None)):
        (train / name).mkdir(parents=True)
        save_detector(create_detector("resnet10", b=b, width=0.25), train / name / "detector.safetensors")
        (train / name / "metrics.json").write_text("{}"), (train / name / "params.json").write_text(json.dumps({"data": "data", "compression": "c23", "image_size": 48, "frames_per_video": 1}))
    (train / "gone" / "detector.safetensors").unlink()
    whole = (train / "damaged" / "detector.safetensors").read_bytes()
    (train / "damaged" / "detector.safetensors").write_bytes(whole[:500])
    opened = open_runs(tmp_path / "runs" / "demo")
    assert [detector.b for detector in opened.detectors.values()] == [2]
    said = opened.source.splitlines()
    assert said[0].startswith("1 detectors of") and {line.split(":")[1].strip() for line in said[1:]} == {"gone", "damaged"} and all("train it anew" in line for line in said[1:])
    (train / "good" / "detector.safetensors").write_bytes(whole[:500])
    with pytest.raises(Exception, match="detector.safetensors"):
        open_runs(tmp_path / "runs" / "demo")
