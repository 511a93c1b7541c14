"""Detection metrics against their definitions, and the table of scores."""
import itertools
import math
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from bcos_nb.data import Frames
from bcos_nb.detection import detection_metrics, score_frames
from bcos_nb.models import create_detector


def by_definition(labels, probabilities, threshold=0.5):
    """Each metric from what it is said to be, with loops."""
    pairs = list(zip(labels, probabilities))
    fakes, reals = [p for label, p in pairs if label], [p for label, p in pairs if not label]
    auc = np.mean([(f > r) + 0.5 * (f == r) for f, r in itertools.product(fakes, reals)])
    hits = sum(p >= threshold for p in fakes)
    alarms = sum(p >= threshold for p in reals)
    average_precision, recall_before = 0.0, 0.0
    rates = [(0.0, 1.0)]  # false alarms, misses
    for cut in sorted(set(probabilities), reverse=True):
        found, wrong = sum(p >= cut for p in fakes), sum(p >= cut for p in reals)
        average_precision += (found / len(fakes) - recall_before) * found / (found + wrong)
        recall_before = found / len(fakes)
        rates.append((wrong / len(reals), 1 - recall_before))
    nearest = min(abs(a - m) for a, m in rates)
    return dict(
        auc=auc,
        f1=2 * hits / (2 * hits + alarms + len(fakes) - hits),
        average_precision=average_precision,
        recall=hits / len(fakes),
        accuracy=(hits + len(reals) - alarms) / len(pairs),
        eer=[(a + m) / 2 for a, m in rates if abs(abs(a - m) - nearest) < 1e-12],  # every point where the two rates are closest
    )


@pytest.mark.parametrize("seed", range(30))
def test_metrics_equal_their_definitions(seed):
    random = np.random.default_rng(seed)
    labels = np.concatenate([[0, 1], random.integers(0, 2, random.integers(1, 60))])
    probabilities = random.random(len(labels)) * 0.7 + 0.3 * labels
    if seed % 2:
        probabilities = probabilities.round(1)  # ties, and values equal to the threshold
    threshold = (0.5, 0.3)[seed % 3 == 0]
    got, wanted = detection_metrics(labels, probabilities, threshold=threshold), by_definition(labels, probabilities, threshold)
    assert list(got) == ["auc", "f1", "average_precision", "recall", "accuracy", "eer"]
    for name in ("auc", "f1", "average_precision", "recall", "accuracy"):
        assert got[name] == pytest.approx(wanted[name], abs=1e-12), name
        assert type(got[name]) is float
    assert min(abs(got["eer"] - eer) for eer in wanted["eer"]) < 1e-9


def test_the_equal_error_rate_may_lie_inside_a_run_of_fakes():
    probabilities = np.linspace(1, 0, 20)
    labels = [0] * 2 + [1] * 10 + [0] * 8  # at the tenth frame one real in five is called fake, and one fake in five missed
    assert detection_metrics(labels, probabilities)["eer"] == pytest.approx(0.2)


def test_known_cases():
    perfect = detection_metrics([0, 0, 1, 1], [0.1, 0.2, 0.8, 0.9])
    assert perfect == dict(auc=1, f1=1, average_precision=1, recall=1, accuracy=1, eer=0)
    reverse = detection_metrics([1, 1, 0, 0], [0.1, 0.2, 0.8, 0.9])
    assert reverse["auc"] == 0 and reverse["accuracy"] == 0 and reverse["recall"] == 0 and reverse["f1"] == 0
    same = detection_metrics([0, 0, 0, 1], [0.5] * 4)
    assert same["auc"] == 0.5 and same["average_precision"] == 0.25 and same["recall"] == 1 and same["eer"] == 0.5
    assert detection_metrics([0, 1], [0.5, 0.5])["recall"] == 1 and detection_metrics([0, 1], [0.4, 0.4999])["recall"] == 0


def test_metrics_of_two_normal_distributions():
    random, distance = np.random.default_rng(0), 1.5
    scores = np.concatenate([random.normal(0, 1, 20000), random.normal(distance, 1, 20000)])
    got = detection_metrics([0] * 20000 + [1] * 20000, 1 / (1 + np.exp(-scores)), threshold=1 / (1 + math.exp(-distance / 2)))
    normal = lambda z: 0.5 * (1 + math.erf(z / math.sqrt(2)))
    assert got["auc"] == pytest.approx(normal(distance / math.sqrt(2)), abs=0.01)
    assert got["eer"] == pytest.approx(normal(-distance / 2), abs=0.01)
    assert got["accuracy"] == pytest.approx(normal(distance / 2), abs=0.01)


def test_lists_tensors_and_series_give_the_same_without_warnings():
    labels, probabilities = [0, 1, 0, 1, 1], [0.1, 0.4, 0.3, 0.2, 0.45]  # nothing is called fake
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        answers = [detection_metrics(kind(labels), kind(probabilities)) for kind in (list, torch.tensor, pd.Series, np.array)]
    assert all(answer == answers[0] for answer in answers) and answers[0]["f1"] == 0


@pytest.mark.parametrize(
    "labels,probabilities,words",
    [
        ([0, 0], [0.1, 0.2], r"only \[0\]"),
        ([1, 1, 1], [0.1, 0.2, 0.3], r"only \[1\]"),
        ([], [], "only"),
        ([0, 1, 2], [0.1, 0.2, 0.3], r"\[0, 1, 2\]"),
        ([0, 1], [0.1, 0.2, 0.3], "labels and"),
        ([0, 1, 0], [0.1, float("nan"), 0.2], "frame 1 is nan"),
        ([0, 1], [0.1, 1.2], "frame 1 is 1.2"),
        ([0, 1], [-0.1, 0.2], "frame 0 is -0.1"),
    ],
)
def test_what_has_no_metrics_is_refused(labels, probabilities, words):
    with pytest.raises(ValueError, match=words):
        detection_metrics(labels, probabilities)


# ---- the table of scores

def some_frames(count=7, seed=0):
    catalog = pd.DataFrame(
        dict(
            frame=[f"video{k // 2}/{k}.png" for k in range(count)], mask=None, video=[f"video{k // 2}" for k in range(count)],
            label=[k % 2 for k in range(count)], method=[("youtube", "Deepfakes")[k % 2] for k in range(count)], source_frame=None,
        ),
        index=range(100, 100 + count),
    )
    images = torch.randint(0, 256, (count, 3, 32, 40), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Frames(images, None, torch.tensor(catalog["label"].to_numpy()), catalog["video"].tolist(), catalog)


def test_scores_are_softmax_of_logits_in_the_catalogues_order():
    frames = some_frames()
    torch.manual_seed(0)
    detector = create_detector("resnet10", b=1.75, width=0.125).train()
    detector(frames.images.float() / 255)
    detector.layer3.eval()
    modes = [layer.training for layer in detector.modules()]
    table = score_frames(detector, frames, batch_size=3)
    assert modes == [layer.training for layer in detector.modules()]
    assert list(table.columns) == ["frame", "video", "label", "method", "probability", "logit_real", "logit_fake"]
    assert list(table.index) == list(range(7)) and list(table["frame"]) == list(frames.catalog["frame"])
    assert list(table["video"]) == frames.videos and list(table["label"]) == frames.labels.tolist()
    detector.eval()
    with torch.no_grad():
        logits = torch.cat([detector(image[None].float() / 255) for image in frames.images]).double().numpy()
    assert np.allclose(table[["logit_real", "logit_fake"]].to_numpy(), logits, atol=1e-5)
    assert np.allclose(table["probability"], 1 / (1 + np.exp(logits[:, 0] - logits[:, 1])), atol=1e-6)
    pd.testing.assert_frame_equal(score_frames(detector, frames), table, atol=1e-6)


class Brightness(nn.Module):
    """Knows one thing, so that a mixed-up order shows."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, images):
        return torch.stack([torch.zeros(len(images)), self.scale * images.mean((1, 2, 3))], 1)


@pytest.mark.parametrize("batch_size", [1, 3, 7, 100])
def test_order_does_not_depend_on_the_batch_size(batch_size):
    frames = some_frames()
    frames.images[:] = torch.tensor([30, 7, 250, 0, 99, 180, 64], dtype=torch.uint8).view(-1, 1, 1, 1)
    table = score_frames(Brightness(), frames, batch_size=batch_size)
    assert np.allclose(table["logit_fake"], np.array([30, 7, 250, 0, 99, 180, 64]) / 255) and not table["logit_real"].any()


def test_extreme_logits_give_probabilities_that_metrics_accept():
    frames, detector = some_frames(), Brightness()
    frames.images[:] = (255 * frames.labels).to(torch.uint8).view(-1, 1, 1, 1)
    with torch.no_grad():
        detector.scale.fill_(1e30)
    table = score_frames(detector, frames)
    assert list(table["probability"]) == [0.5 + 0.5 * label for label in frames.labels.tolist()]
    assert detection_metrics(table["label"], table["probability"])["auc"] == 1
