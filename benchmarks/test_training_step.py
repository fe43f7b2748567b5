"""Time of a training step (forward, loss, backward): EffSegNet against the same network in stock torch, and
streamed against raw.

    pytest benchmarks --benchmark-only                      96^3, about a minute on two cores
    EFFSEG_BENCHMARK_SIZE=128 pytest benchmarks --benchmark-only

Machines are noisy, so contenders take turns within one test, and the ratio of their medians is what counts:
it is in the report's extra_info (`--benchmark-json FILE`) and must stay under the bar.
"""

import os
import statistics
import time

import pytest
import torch

from effseg import EffSegNet
from effseg.models.stock import StockEffSegNet
from effseg.slabs import THICK_SLAB_ELEMENTS

SIZE = int(os.environ.get("EFFSEG_BENCHMARK_SIZE", "96"))
CLASSES = 15
ROUNDS = 5
BARS = {"fp32": 1.1, "bf16": 1.3}
STREAM_BAR = 1.25  # times raw's, with thick slabs


def step(model, image, labels, dtype):
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
        loss = model.loss(image, labels)
    loss.backward()


@pytest.mark.parametrize("dtype", BARS)
def test_raw_step_against_stock(benchmark, dtype):
    stock, ours = StockEffSegNet(1, CLASSES), EffSegNet(1, CLASSES)
    ours.load_state_dict(stock.state_dict())
    assert take_turns(benchmark, stock, ours, dtype) <= BARS[dtype]


def test_stream_step_against_raw(benchmark):
    raw, stream = (EffSegNet(1, CLASSES, memory=memory) for memory in ("raw", "stream"))
    raw.slab_elements = stream.slab_elements = THICK_SLAB_ELEMENTS
    assert take_turns(benchmark, raw, stream, "fp32") <= STREAM_BAR


def take_turns(benchmark, baseline, ours, dtype):
    """The ratio of the medians, ours over the baseline's."""
    torch.manual_seed(0)
    image = torch.randn(1, 1, SIZE, SIZE, SIZE)
    labels = torch.randint(0, CLASSES, (1, SIZE, SIZE, SIZE), dtype=torch.uint8)
    step(baseline, image, labels, dtype)
    seconds = []

    def baseline_takes_its_turn():
        start = time.perf_counter()
        step(baseline, image, labels, dtype)
        seconds.append(time.perf_counter() - start)
        return (ours, image, labels, dtype), {}

    benchmark.pedantic(step, setup=baseline_takes_its_turn, rounds=ROUNDS, warmup_rounds=1)
    ratio = benchmark.stats.stats.median / statistics.median(seconds[1:])
    benchmark.extra_info |= {
        "size": SIZE,
        "dtype": dtype,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "baseline_median_seconds": statistics.median(seconds[1:]),
        "ratio_to_baseline": ratio,
    }
    return ratio
