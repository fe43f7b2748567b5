"""Choices of memory mode, recomputation and slabs, and the cheap predictions that they rest on."""

import contextlib
import math
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from effseg.errors import InputError
from effseg.expressions import slabs
from effseg.memory import choice, peak_training_memory, predict
from effseg.memory.choice import HEADROOM, Settings, first_that_fits
from effseg.models.effsegnet import EffSegNet
from effseg.models.training_step import TrainingStep
from effseg.models.unet3d import UNet3D
from effseg.planning import choose

GB = 10**9
BUDGETS = (8, 12, 16, 24, 80)
ARGUMENTS = {"in_channels": 1, "num_classes": 15, "preset": "base"}
FEW_LEVELS = ARGUMENTS | {"preset": "small"}
ALL_SETTINGS = [
    Settings("raw", 0, 32),  # of 2^27 elements at 512 x 512 x 512
    Settings("raw"),
    Settings("stream", 0, 32),
    Settings("stream"),
    Settings("stream", 1),
    Settings("stream", 2),
    Settings("stream", 2, 4),
    Settings("stream", 2, 1),
]
SMALL = (1, 1, 24, 16, 16)


@pytest.fixture
def every_slab(monkeypatch):
    """A switch: from then on predictions visit all slabs."""

    def switch():
        monkeypatch.setattr(
            predict, "abridged", lambda: contextlib.nullcontext(slabs.Abridgement()), raising=True
        )

    return switch


def reports(arguments, shape, settings, every_slab, **options):
    """The prediction as it is, and with all slabs visited."""

    def build():
        model = EffSegNet(**arguments, memory=settings.memory)
        model.recompute_levels = settings.recompute_levels
        model.slab_elements = TrainingStep.of(EffSegNet, arguments, shape).slab_elements(settings)
        return model

    few = peak_training_memory(build, shape, **options)
    every_slab()
    return few, peak_training_memory(build, shape, **options)


@pytest.mark.parametrize(
    "settings",
    [pytest.param(Settings("raw", 0, 4), marks=pytest.mark.slow), Settings("stream", 1, 4)],
    ids=str,
)
@pytest.mark.usefixtures("small_preset")
def test_a_few_slabs_stand_for_all(settings, every_slab):
    few, every = reports(FEW_LEVELS, (1, 1, 25, 16, 16), settings, every_slab, dtype="fp32")
    assert few.peak == pytest.approx(every.peak, rel=1e-3)
    assert few.after_forward == pytest.approx(every.after_forward, rel=1e-3)
    assert few.macs == pytest.approx(every.macs, rel=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("z", [128, 256, 512, 1024])
@pytest.mark.parametrize("settings", ALL_SETTINGS, ids=str)
def test_a_few_slabs_stand_for_all_of_a_ct(z, settings, every_slab):
    few, every = reports(ARGUMENTS, (1, 1, 512, 512, z), settings, every_slab, device="cuda")
    assert few.peak == pytest.approx(every.peak, rel=1e-3)
    assert few.macs == pytest.approx(every.macs, rel=2e-3)


def test_arithmetic_is_that_of_the_convolutions():
    """The baseline's in closed form: forward, and twice that in backward but for the image's gradient."""
    model, (n, c, *size) = UNet3D(1, 3), (1, 1, 16, 16, 32)
    voxels = n * size[0] * size[1] * size[2]
    at = {id(model.head): voxels}
    for i, block in enumerate(model.encoder):
        at |= {id(m): voxels // 8**i for m in block.modules()}
    for i, (up, block) in enumerate(zip(model.up, model.decoder, strict=True)):
        at |= {id(up): voxels // 8 ** (3 - i)} | {id(m): voxels // 8 ** (2 - i) for m in block.modules()}
    layers = [m for m in model.modules() if isinstance(m, torch.nn.Conv3d | torch.nn.ConvTranspose3d)]
    forward = sum(m.weight.numel() * at[id(m)] for m in layers)
    expected = 3 * forward - layers[0].weight.numel() * voxels
    assert peak_training_memory(model, (n, c, *size), dtype="fp32").macs == expected


@pytest.mark.slow
def test_streamed_layers_run_as_often_as_is_said():
    """The first layer again in every sweep, the last one two more times, but for what halos add; of a level
    that is run again, the unit that enters it and its block."""
    step = TrainingStep.of(EffSegNet, ARGUMENTS, (1, 1, 256, 32, 32))
    raw, stream, recomputed = (
        choice.predict(step, s).macs / (256 * 32 * 32)
        for s in (Settings("raw"), Settings("stream"), Settings("stream", 1))
    )
    first, last = 27 * 16, 27 * 16 * 16
    enters, block = 27 * 16 * 32 / 8, 2 * 27 * 32 * 32 / 8
    assert 2 * last + 2 * first < stream - raw < 1.2 * (2 * last + 20 * first)
    assert enters + block < recomputed - stream < 1.3 * enters + block


def choice_or_refusal(preset, shape, budget):
    try:
        return choose(f"effseg-{preset}", 1, 15, shape, "bf16", budget), ""
    except InputError as error:
        return None, str(error)


@pytest.mark.parametrize(
    ("preset", "size", "budgets", "most"),
    [
        # So few and thin levels leave streaming's extra passes a larger share.
        ("small", (8, 96, 96), (0.040, 0.080), 1.8),
        *(
            pytest.param("base", (512, 512, z), BUDGETS, 1.5, marks=pytest.mark.slow)
            for z in (128, 256, 512, 1024)
        ),
    ],
    ids=str,
)
@pytest.mark.usefixtures("small_preset")
def test_choices_fit_their_budgets(preset, size, budgets, most):
    shape, found = (1, 1, *size), []
    step = TrainingStep.of(EffSegNet, ARGUMENTS | {"preset": preset}, shape)
    for budget in budgets:
        chosen, refusal = choice_or_refusal(preset, shape, int(budget * GB))
        found.append(chosen)
        if chosen is None:
            assert min(choice.predict(step, s).reserved for s in step.candidates()) > budget * GB
            assert f"the largest volume that fits is {size[0]}x{size[1]}x" in refusal
        else:
            assert chosen.reserved <= budget * GB
            assert chosen.arithmetic <= most
            assert all(c.reserved > budget * GB for c in chosen.candidates[:-1])
            assert chosen.candidates[-1].reserved == chosen.reserved
    arithmetic = [float("inf") if c is None else c.arithmetic for c in found]
    assert arithmetic == sorted(arithmetic, reverse=True)
    assert found[-1] is not None
    assert size[2] > 512 or found[0] is not None


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_bytes_per_voxel_fall_with_the_volume(device, dtype):
    """Without weights and optimizer, which no volume changes. What is kept is the same; slabs are a fortieth
    of a level, but four rows at least, which are a sixteenth of a small volume's half-resolution level."""
    found = []
    for size in ((128, 128, 128), (256, 256, 256), (512, 512, 256), (512, 512, 512), (512, 512, 1024)):
        step = TrainingStep.of(EffSegNet, ARGUMENTS, (1, 1, *size), dtype, "adamw", device)
        report = choice.predict(step, Settings("stream"))
        fixed = report.split["parameters"] + report.split["optimizer"]
        found.append((report.peak - fixed) / report.voxels)
    for smaller, larger in pairwise(found):
        assert larger < 1.002 * smaller
    assert found[0] < 1.2 * found[-1]
    assert found[2] == pytest.approx(found[-1], rel=0.05)


def test_the_order_of_candidates():
    assert TrainingStep.of(EffSegNet, ARGUMENTS, (1, 1, 512, 512, 512)).candidates() == [
        *ALL_SETTINGS[:6],
        *(Settings("stream", 2, rows) for rows in (4, 2, 1)),
    ]
    small = TrainingStep.of(EffSegNet, ARGUMENTS, (1, 1, 64, 64, 64))
    whole = [Settings("raw", 0, 64), Settings("stream", 0, 64)]  # slabs so thick that there is one
    assert small.candidates() == [
        *(whole[0], Settings("raw"), whole[1]),
        *ALL_SETTINGS[3:6],
        *(Settings("stream", 2, rows) for rows in (2, 1)),
    ]
    assert small.candidates("raw") == [whole[0], Settings("raw")]
    assert small.candidates("stream")[:2] == [whole[1], Settings("stream")]
    on_cpu = TrainingStep.of(EffSegNet, ARGUMENTS, (1, 1, 64, 64, 64), "fp32", "adamw", "cpu")
    assert on_cpu.candidates()[:3] == [Settings("raw"), whole[1], Settings("stream")]
    assert TrainingStep.of(EffSegNet, ARGUMENTS, (1, 1, 2, 64, 64)).candidates()[-1] == Settings(
        "stream", 2, 1
    )
    tiny = TrainingStep.of(EffSegNet, ARGUMENTS | {"preset": "tiny"}, (1, 1, 64, 64, 64))
    assert {settings.memory for settings in tiny.candidates()} == {"raw"}
    assert tiny.candidates("raw") == [Settings("raw", 0, 32), Settings("raw")]


def test_the_first_candidate_that_fits_is_chosen(monkeypatch):
    """Peaks that fall along the list, with bytes per voxel that do not depend on the volume."""
    step = TrainingStep.of(EffSegNet, ARGUMENTS, (1, 1, 64, 64, 96), "fp32", "adamw", "cpu")
    per_voxel = {settings: 100 - 10 * i for i, settings in enumerate(step.candidates())}

    def predicted(step, settings):
        voxels = math.prod(step.shape)
        return SimpleNamespace(
            peak=0, reserved=voxels * per_voxel[settings], voxels=voxels, shape=step.shape,
            macs=110 - per_voxel[settings],
            split={"parameters": 0, "optimizer": 0}, model="effseg-base",
        )  # fmt: skip

    monkeypatch.setattr(choice, "predict", predicted)
    voxels = math.prod(step.shape)
    for i, (settings, count) in enumerate(per_voxel.items()):
        chosen = first_that_fits(step, step.candidates(), voxels * count)
        assert chosen.settings == settings
        assert chosen.slab_elements == (None if settings.rows is None else settings.rows * 16 * 64 * 96)
        assert chosen.arithmetic == pytest.approx(1 + i)
        assert [c.settings for c in chosen.candidates] == step.candidates()[: i + 1]
    line = (
        r"^memory: training effseg-base on 1x1x64x64x96 in fp32 needs 15.00 MiB or more \(stream, levels 1-2 "
        r"recomputed, slabs of 1 row\), the budget is 15.00 MiB; the largest volume that fits is 64x64x88$"
    )
    with pytest.raises(InputError, match=line):
        first_that_fits(step, step.candidates(), voxels * min(per_voxel.values()) - 1)
    with pytest.raises(InputError, match=r"no 64x64 volume fits$"):
        first_that_fits(step, step.candidates(), 1000)


@pytest.mark.usefixtures("small_preset")
def test_configure_sets_what_was_chosen_and_disturbs_nothing():
    model = EffSegNet(**FEW_LEVELS)
    state, grads = torch.get_rng_state(), torch.is_grad_enabled()
    chosen = model.configure(SMALL, torch.float32, "3MB")
    assert chosen.memory == "stream"
    assert (model.active_memory, model.recompute_levels) == (chosen.memory, chosen.recompute_levels)
    assert model.slab_elements == chosen.slab_elements
    assert chosen.peak <= 3 * 10**6
    with torch.no_grad():
        assert model.configure(SMALL, torch.float32, 3 * 10**6) == chosen
    assert torch.equal(state, torch.get_rng_state())
    assert grads == torch.is_grad_enabled()


@pytest.mark.usefixtures("small_preset")
def test_a_budget_that_was_configured_stays():
    """For the steps that follow, also where they meet another size."""
    model = EffSegNet(**FEW_LEVELS, memory="auto", memory_budget="8GB")
    chosen = model.configure(SMALL, torch.float32, "3MB")
    for rows in (24, 22):
        image = torch.randn(1, 1, rows, 16, 16)
        model.loss(image, torch.zeros(1, rows, 16, 16, dtype=torch.uint8))
        assert model.active_memory == chosen.memory == "stream"


@pytest.mark.usefixtures("small_preset")
@pytest.mark.parametrize("types", [(torch.float32, torch.int64), (torch.float64, torch.uint8)], ids=str)
def test_a_choice_counts_the_batch_as_it_is(types):
    """Labels in int64 take seven bytes a voxel more than those in uint8, and the budget is for both."""
    image, labels = (torch.zeros(n, dtype=t) for n, t in zip((SMALL, (1, *SMALL[2:])), types, strict=True))
    needed = peak_training_memory(
        EffSegNet(**FEW_LEVELS), SMALL, dtype="fp32", image_dtype=types[0], label_dtype=types[1]
    )
    for budget, memory in ((needed.reserved, "raw"), (needed.reserved - 1, "stream")):
        model = EffSegNet(**FEW_LEVELS, memory="auto", memory_budget=budget)
        model.loss(image, labels)
        assert model.active_memory == memory


@pytest.mark.usefixtures("small_preset")
def test_the_network_of_a_choice_is_the_one_that_is_trained():
    """Other options of the constructor reach the prediction, those that a choice decides do not."""
    arguments = EffSegNet(2, 7, preset="small").arguments | {"norm": "batch", "memory_budget": "8GB"}
    report = choice.predict(
        TrainingStep.of(EffSegNet, arguments, (1, 2, 16, 16, 16), "fp32", "adamw", "cpu"), Settings("raw")
    )
    like = EffSegNet(2, 7, preset="small", norm="batch")
    assert report.parameters == sum(p.numel() for p in like.parameters())
    assert report.peak == peak_training_memory(like, (1, 2, 16, 16, 16), dtype="fp32").peak


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"name": "unet3d"}, "model: expected one of effseg-base, .*, got 'unet3d'"),
        ({"dtype": "fp8"}, "dtype: expected one of fp32, bf16, got 'fp8'"),
        ({"device": "tpu"}, "device: expected one of cpu, cuda, got 'tpu'"),
        ({"shape": (1, 2, 32, 32, 32)}, r"image: expected \(N, 1, D, H, W\)"),
        ({"shape": (1, 32, 32, 32)}, r"shape: expected \(N, C, D, H, W\)"),
        ({"shape": (1, 1, 0, 32, 32)}, r"shape: expected \(N, C, D, H, W\), each 1 or more"),
    ],
)
def test_wrong_arguments_are_named(change, line):
    arguments = {
        "name": "effseg-base", "in_channels": 1, "num_classes": 4, "shape": SMALL, "dtype": "fp32",
        "budget": GB,
    }  # fmt: skip
    with pytest.raises(InputError, match=line):
        choose(**(arguments | change))


def test_configure_asks_for_what_it_cannot_know():
    with pytest.raises(InputError, match=r"memory_budget: .* on cpu needs one"):
        EffSegNet(1, 4).configure(SMALL, torch.float32, None)
    with pytest.raises(InputError, match=r"auto knows .*, got float64"):
        EffSegNet(1, 4).configure(SMALL, torch.float64, GB)


@pytest.mark.usefixtures("small_preset")
def test_a_gpu_is_filled_but_for_the_headroom(monkeypatch):
    total = 5 * 10**6
    properties = type("Properties", (), {"total_memory": total})()
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert choice.usable(None, torch.device("cuda")) == total * (1 - HEADROOM)
    chosen = EffSegNet(**FEW_LEVELS).configure(SMALL, torch.bfloat16, None, torch.device("cuda"))
    assert chosen.peak < chosen.reserved <= total * (1 - HEADROOM)
