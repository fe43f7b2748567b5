"""Time of a training step (forward, loss, backward) of EffSegNet against the same network in stock torch.

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

SIZE = int(os.environ.get("EFFSEG_BENCHMARK_SIZE", "96"))
CLASSES = 15
ROUNDS = 5
BARS = {"fp32": 1.1, "bf16": 1.3}


def step(model, image, labels, dtype):
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
        loss = model.loss(image, labels)
    loss.backward()


@pytest.mark.parametrize("dtype", BARS)
def test_raw_step_against_stock(benchmark, dtype):
    torch.manual_seed(0)
    image = torch.randn(1, 1, SIZE, SIZE, SIZE)
    labels = torch.randint(0, CLASSES, (1, SIZE, SIZE, SIZE), dtype=torch.uint8)
    stock, ours = StockEffSegNet(1, CLASSES), EffSegNet(1, CLASSES)
    ours.load_state_dict(stock.state_dict())
    step(stock, image, labels, dtype)
    seconds = []

    def stock_takes_its_turn():
        start = time.perf_counter()
        step(stock, image, labels, dtype)
        seconds.append(time.perf_counter() - start)
        return (ours, image, labels, dtype), {}

    benchmark.pedantic(step, setup=stock_takes_its_turn, rounds=ROUNDS, warmup_rounds=1)
    ratio = benchmark.stats.stats.median / statistics.median(seconds[1:])
    benchmark.extra_info |= {
        "size": SIZE,
        "dtype": dtype,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "stock_median_seconds": statistics.median(seconds[1:]),
        "ratio_to_stock": ratio,
    }
    assert ratio <= BARS[dtype]
