"""A detector against the same network of another package, with its weights: logits, W(x), explanation image, all parameters' names."""
import torch
from torch import nn

from bcos_nb.explainers import explain
from bcos_nb.layers import dynamic_linear


def images(count=2, height=64, width=None, seed=0):
    return torch.rand(count, 3, height, width or height, generator=torch.Generator().manual_seed(seed))


def relative(ours, theirs):
    return float((ours - theirs).abs().max() / theirs.abs().max())


def with_statistics(network, batch):
    """The network in evaluation mode, its norms holding the statistics of a batch, as after training."""
    norms = [(layer, layer.momentum) for layer in network.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
    for layer, _ in norms:
        layer.momentum = 1.0
    with torch.no_grad():
        network.train()(batch)
    for layer, momentum in norms:
        layer.momentum = momentum
    return network.eval()


def give_weights(theirs, ours, rename=lambda name: name, batch=None):
    """Statistics of a batch for their norms, then every tensor of theirs to ours: none may be missing, left over, or of another shape."""
    with_statistics(theirs, ours.encode(images(4, 64, seed=5)) if batch is None else batch)
    ours.load_state_dict({rename(name): value for name, value in theirs.state_dict().items()}, strict=True)
    return ours.eval(), theirs.eval()


def explanations_of(theirs, encoded, target=1):
    """The package's W(x) and images, one at a time: [N, 6, H, W], [N, H, W, 4]."""
    answers = [theirs.explain(one[None].clone().requires_grad_(), target) for one in encoded]
    return torch.cat([answer["dynamic_linear_weights"] for answer in answers]), torch.stack([torch.from_numpy(answer["explanation"]) for answer in answers])


def differences(ours, theirs, batch):
    """Largest differences, relative to the largest value; of the explanation image, within [0, 1], also the mean difference.

    The image has jumps: a pixel whose contribution is zero but for rounding counts or does not, a colour of two near zero weights is their ratio.
    """
    encoded = ours.encode(batch)
    with torch.no_grad():
        logits = relative(ours(batch), theirs(encoded))
    weights, shown = explanations_of(theirs, encoded)
    apart = (explain(ours, batch, "bcos").rgba - shown.float()).abs()
    return dict(logits=logits, weights=relative(dynamic_linear(ours, batch).weights, weights), alpha=float(apart[..., 3].max()),
                colour=float(apart[..., :3].max()), mean_alpha=float(apart[..., 3].mean()), mean_colour=float(apart[..., :3].mean()))


def assert_same_network(ours, theirs, batch):
    """In float32 to rounding; in float64 every value of every pixel, so that what was left in float32 was rounding."""
    single = differences(ours, theirs, batch)
    assert all(single[name] < 1e-4 for name in ("logits", "weights", "mean_alpha", "mean_colour")), single
    double = differences(ours.double(), theirs.double(), batch.double())
    assert max(double["logits"], double["weights"]) < 1e-9 and max(double["alpha"], double["colour"]) < 1e-5, double
