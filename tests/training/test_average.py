import torch
from torch import nn

from effseg.training.average import WeightAverage


def test_is_the_running_mean_and_gives_the_weights_back():
    model = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(1.0)
    average = WeightAverage(model, 0.75)
    expected = 1.0
    for step in range(60):
        with torch.no_grad():
            model.weight.fill_(float(step))
        average.update(step)
        decay = min(0.75, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
    with average.applied():
        torch.testing.assert_close(model.weight, torch.full((1, 2), expected))
    assert torch.equal(model.weight, torch.full((1, 2), 59.0))


def test_continues_from_its_state():
    model = nn.Linear(3, 3)
    average = WeightAverage(model, 0.9)
    with torch.no_grad():
        model.weight.add_(1.0)
    average.update(5)
    other = WeightAverage(nn.Linear(3, 3), 0.9)
    other.load_state(average.state())
    assert all(torch.equal(a, b) for a, b in zip(average.values, other.values, strict=True))
