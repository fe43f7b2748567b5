"""EffSegNet with offload=True: the same numbers, and level 1's raw outputs in the host's memory."""

from __future__ import annotations

import copy
import gc
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from late_link import LateLink
from tolerances import EXACT, joined, relative_error

from effseg import EffSegNet, load
from effseg.common.device import pretending
from effseg.errors import InputError
from effseg.memory import peak_training_memory
from effseg.models import effsegnet
from effseg.models.levels import Architecture
from effseg.models.stock import StockEffSegNet
from effseg.offload.link import link
from effseg.offload.memory import HostMemory
from effseg.offload.slabs import Incoming, Traffic, counted
from effseg.parallel.partition import entered, pretended

ODD = (2, 1, 67, 9, 10)
SMALL = (1, 1, 35, 7, 6)
LONG = (1, 1, 64, 8, 8)
FORWARD_READS, BACKWARD_READS = 6, 11
"""How often a raw output of level 1 comes to the device in a step, of three such outputs."""


@pytest.fixture(autouse=True)
def small_levels(few_levels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(effsegnet.PRESETS, "thin", Architecture((4, 4, 4), (0, 1, 1)))
    monkeypatch.setitem(effsegnet.PRESETS, "deep", Architecture((4, 4, 4, 4), (0, 1, 0, 0)))


@contextmanager
def moving(way: str) -> Any:
    """How slabs move: not at all, when they are asked for, as late as the streams allow."""
    with ExitStack() as stack:
        stack.enter_context(pretending("cpu" if way == "cpu" else "cuda"))
        stack.enter_context(link.set(LateLink() if way == "late" else None))
        yield


def batch(shape: tuple[int, ...], classes: int = 3, dtype: torch.dtype = torch.float64) -> Any:
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(shape, dtype=dtype, generator=generator)
    return image, torch.randint(0, classes, (shape[0], *shape[2:]), generator=generator)


def trained(model: Any, image: torch.Tensor, labels: torch.Tensor, way: str = "cpu") -> torch.Tensor:
    """The loss, and all gradients in one piece."""
    model.zero_grad()
    with moving(way):
        loss = model.loss(image, labels)
    loss.backward()
    return torch.cat([loss.detach()[None], joined([p.grad for p in model.parameters()])])


def network(like: Any = None, preset: str = "thin", **options: Any) -> Any:
    torch.manual_seed(0)
    model = EffSegNet(1, 3, preset, **{"memory": "stream", "offload": True, **options})
    return model if like is None else loaded(model, like)


def loaded(model: Any, like: Any) -> Any:
    model.to(next(like.parameters()).dtype).load_state_dict(like.state_dict())
    return model


# ---------------------------------------------------------------- the same numbers
@pytest.mark.diagonal
@pytest.mark.parametrize("norm", ["instance", "batch", "group"])
@pytest.mark.parametrize("way", ["cpu", "late"])
@pytest.mark.parametrize("recompute", [0, 2])
def test_gradients_are_those_of_stock_torch(norm: str, way: str, recompute: int) -> None:
    torch.manual_seed(0)
    stock = StockEffSegNet(1, 3, "few", norm).double()
    with torch.no_grad():
        for p in stock.parameters():
            p.add_(0.1 * torch.randn_like(p))
    ours = network(stock, "few", norm=norm, recompute=recompute)
    image, labels = batch(ODD)
    got, expected = trained(ours, image, labels, way), trained(stock, image, labels)
    assert relative_error(got, expected) < EXACT
    for p, q in zip(ours.parameters(), stock.parameters(), strict=True):
        assert relative_error(p.grad, q.grad) < EXACT
    for a, b in zip(ours.buffers(), stock.buffers(), strict=True):
        assert relative_error(a.double(), b.double()) < EXACT


@pytest.mark.parametrize("options", [{}, {"auxiliary": True, "preset": "deep"}, {"thick_axis": 0}], ids=str)
@pytest.mark.parametrize("way", ["immediate", "late"])
def test_runs_have_the_same_bits(options: dict[str, Any], way: str) -> None:
    """As on the device alone in the same slabs, and as in another run, in bfloat16."""
    model = network(**options)
    image, labels = batch(SMALL, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = [trained(model, image, labels, way) for _ in range(2)]
        with pretending("cuda"):
            model.offloads = False
            model.slab_elements = effsegnet.THIN
            expected = trained(model, image, labels, "immediate")
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], expected)


@pytest.mark.parametrize("way", ["cpu", "late"])
def test_prediction(way: str) -> None:
    model = network().eval()
    image, labels = batch(SMALL, dtype=torch.float32)
    plain = loaded(EffSegNet(1, 3, "thin", memory="stream"), model).eval()
    with moving(way), torch.no_grad():
        assert torch.equal(model.segment(image), plain.segment(image))
        torch.testing.assert_close(model(image), plain(image))
        torch.testing.assert_close(model.loss(image, labels), plain.loss(image, labels))


@pytest.mark.parametrize("way", ["cpu", "late"])
def test_a_graph_is_used_twice(way: str) -> None:
    model = network()
    image, labels = batch(SMALL, dtype=torch.float32)
    once = trained(model, image, labels, way)
    model.zero_grad()
    with moving(way):
        loss = model.loss(image, labels)
        other = model.loss(image.flip(2), labels)  # its tensors must not come to lie in the first one's
    loss.backward(retain_graph=True)
    loss.backward()
    twice = joined([p.grad for p in model.parameters()])
    torch.testing.assert_close(twice, 2 * once[1:])
    other.backward()  # gradients accumulate
    assert not torch.equal(joined([p.grad for p in model.parameters()]), twice)


def test_gradients_accumulate() -> None:
    model = network()
    image, labels = batch((2, *SMALL[1:]), dtype=torch.float32)
    expected = sum(trained(model, image[i : i + 1], labels[i : i + 1])[1:] for i in range(2))
    model.zero_grad()
    with moving("late"):
        losses = [model.loss(image[i : i + 1], labels[i : i + 1]) for i in range(2)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(joined([p.grad for p in model.parameters()]), expected)


@pytest.mark.parametrize("at", [1, 5, 20, 60])
def test_after_an_exception_all_is_well(at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    image, labels = batch(SMALL, dtype=torch.float32)
    expected, size = trained(model, image, labels, "late"), model.host.nbytes
    real, left = Incoming.cut, at

    def fails(self: Incoming, *args: Any) -> torch.Tensor:
        nonlocal left
        left -= 1
        if left == 0:
            raise KeyboardInterrupt
        return real(self, *args)

    with monkeypatch.context() as planted:
        planted.setattr(Incoming, "cut", fails)
        with pytest.raises(KeyboardInterrupt):
            trained(model, image, labels, "late")
    gc.collect()
    assert torch.equal(trained(model, image, labels, "late"), expected)
    assert model.host.nbytes == size


def test_hooks_see_gradients() -> None:
    """As those of a reducer of several processes do."""
    model, seen = network(), []
    for name, p in model.named_parameters():
        p.register_post_accumulate_grad_hook(lambda _, name=name: seen.append(name))
    trained(model, *batch(SMALL, dtype=torch.float32), "late")
    assert sorted(seen) == sorted(name for name, _ in model.named_parameters())


def test_a_slab_late_by_one_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    image, labels = batch(SMALL, dtype=torch.float32)
    expected = trained(model, image, labels, "immediate")
    real = Incoming.cut

    def late(self: Incoming, rows: tuple[int, int], sample: int) -> torch.Tensor:
        real(self, rows, sample)
        return self.ring[max(self.position - 1, 0) % 2][:, :, : rows[1] - rows[0]]

    monkeypatch.setattr(Incoming, "cut", late)
    assert relative_error(trained(model, image, labels, "immediate"), expected) > 0.01


# ---------------------------------------------------------------- bytes
def raw_output(shape: tuple[int, ...], channels: int, itemsize: int) -> int:
    n, _, *size = shape
    d, h, w = (-(-s // 2) for s in size)
    return n * channels * d * h * w * itemsize


@pytest.mark.parametrize("way", ["cpu", "late"])
def test_bytes_over_the_link(way: str) -> None:
    model = network()
    image, labels = batch(ODD, dtype=torch.float32)
    y = raw_output(ODD, 4, 4)
    with moving(way), counted() as traffic:
        loss = model.loss(image, labels)
        assert traffic == Traffic(3 * y, FORWARD_READS * y)
        loss.backward()
    assert traffic == Traffic(3 * y, (FORWARD_READS + BACKWARD_READS) * y)
    assert model.host.nbytes == 3 * y


def test_memory_is_used_again() -> None:
    model = network()
    for shape in (SMALL, SMALL, ODD, SMALL):
        trained(model, *batch(shape, dtype=torch.float32), "late")
    assert model.host.nbytes == 3 * raw_output(ODD, 4, 4)
    assert copy.deepcopy(model).host.nbytes == 0


def predicted(
    shape: tuple[int, ...], preset: str, dtype: str = "fp32", classes: int = 3, **options: Any
) -> Any:
    device = options.pop("device", "cuda")
    given = {"memory": "stream", "offload": True, **options}
    return peak_training_memory(
        lambda: EffSegNet(1, classes, preset, **given), shape, dtype=dtype, device=device
    )


@pytest.mark.slow
@pytest.mark.parametrize("shape", [SMALL, ODD, LONG])
def test_prediction_of_bytes_is_exact(shape: tuple[int, ...]) -> None:
    model, found = network(), predicted(shape, "thin")
    with moving("immediate"), counted() as traffic:
        model.loss(*batch(shape, dtype=torch.float32)).backward()
    assert (found.host, found.to_host, found.to_device) == (
        model.host.nbytes, traffic.to_host, traffic.to_device,
    )  # fmt: skip
    assert f"{found.to_host / 2**20:.2f} MiB there" in str(found)


@pytest.mark.slow
def test_less_is_on_the_device() -> None:
    shape = (1, 1, 64, 64, 64)
    with_host, without = (predicted(shape, "few", "bf16", offload=offload) for offload in (True, False))
    moved = 3 * raw_output(shape, 32, 2)
    assert with_host.host == moved
    assert without.host == without.to_host == 0
    standing = 3 * 2  # an element for each of the three
    assert without.after_forward - with_host.after_forward == moved - standing
    assert with_host.macs >= without.macs  # thinner slabs, but no convolution more
    assert with_host.macs < 1.05 * without.macs


@pytest.mark.slow
def test_on_a_cpu_everything_stays_where_it_is() -> None:
    shape = (1, 1, 160, 96, 96)  # where a CPU's slabs are thin, too
    on, off = (predicted(shape, "few", device="cpu", offload=offload) for offload in (True, False))
    assert on.host == on.to_host == on.to_device == 0
    assert on.peak == pytest.approx(off.peak, rel=0.15)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "device", "copied"),
    [
        ({"offload": True}, 32, (24, 136)),
        ({"offload": True, "recompute": 2}, 29, (24, 152)),
        ({"recompute": 1, "rows": 4}, 40, (0, 0)),
    ],
    ids=str,
)
def test_bytes_of_a_whole_volume(options: dict[str, Any], device: float, copied: tuple[int, int]) -> None:
    """512^3, 15 classes, AdamW, bf16."""
    given = {"memory": "stream", **options}
    rows = given.pop("rows", None)

    def made() -> EffSegNet:
        model = EffSegNet(1, 15, **given)
        model.slab_elements = None if rows is None else rows * 16 * 512**2
        return model

    found = peak_training_memory(made, (1, 1, 512, 512, 512), device="cuda")
    assert found.allocated <= device * found.voxels
    assert found.host == copied[0] * found.voxels
    assert found.reserved <= 1.08 * found.allocated
    assert (found.to_host, found.to_device) == (copied[0] * found.voxels, copied[1] * found.voxels)


# ---------------------------------------------------------------- options
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory": "raw"}, "offload: expected memory='stream' or 'auto', got memory='raw'"),
        ({"preset": "tiny"}, "offload: expected False for preset tiny"),
        ({"recompute": 1}, "recompute: expected 0, or 2 and more, with offload"),
    ],
)
def test_what_cannot_be_offloaded(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        network(**options)


def test_a_volume_that_processes_share() -> None:
    model = network()
    with entered(pretended(SMALL[2], 2)), pytest.raises(InputError, match=r"offload: .* got a volume that"):
        model.loss(torch.zeros(1, 1, 18, 7, 6), torch.zeros(1, 18, 7, 6, dtype=torch.uint8))


def test_compiled() -> None:
    model = network()
    image, labels = batch(SMALL, dtype=torch.float32)
    with pytest.raises(InputError, match=r"offload: .* got torch\.compile"):
        torch.compile(model.loss, backend="eager")(image, labels)


@pytest.mark.slow
def test_auto_offloads_where_asked_to() -> None:
    shape = (1, 1, 128, 128, 128)
    choices = {}
    for offload in (False, True):
        model = EffSegNet(1, 3, "few", memory="auto", offload=offload)
        budget = int(1.1 * predicted(shape, "few", "bf16").reserved)
        try:
            choices[offload] = model.configure(shape, torch.bfloat16, budget, torch.device("cuda")).settings
        except InputError:
            choices[offload] = None
    assert choices[True] is not None
    assert choices[True].offload
    assert "level 1 offloaded" in str(choices[True])
    assert choices[False] is None or choices[False].recompute_levels


def test_a_checkpoint_remembers(tmp_path: Any) -> None:
    model = EffSegNet(1, 3, "base", memory="stream", offload=True)
    model.save(tmp_path / "model.safetensors")
    again = load(tmp_path / "model.safetensors")
    assert again.arguments["offload"] is True
    assert isinstance(again.host, HostMemory)


@pytest.mark.gpu
@pytest.mark.parametrize("recompute", [0, 2])
def test_on_a_gpu(recompute: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bits of a step on the device alone, ten times, while the host's memory is pinned and used again."""
    device = torch.device("cuda")
    image, labels = (t.to(device) for t in batch((1, 1, 131, 97, 90), dtype=torch.float32))
    model = network(preset="few", recompute=recompute).to(device)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    found = []
    for _ in range(10):
        with torch.autocast("cuda", torch.bfloat16):
            found.append(trained(model, image, labels, "gpu"))
    size = model.host.nbytes
    model.offloads, model.slab_elements = False, effsegnet.THIN
    with torch.autocast("cuda", torch.bfloat16):
        expected = trained(model, image, labels, "gpu")
    assert all(torch.equal(one, found[0]) for one in found)
    assert size == 3 * raw_output(image.shape, 32, 2)
    if not recompute:
        assert torch.equal(found[0], expected)
    assert relative_error(found[0].double(), expected.double()) < 1e-2
