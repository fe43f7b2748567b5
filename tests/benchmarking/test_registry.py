"""What is compared: names, selections, and that every contender really is what it says."""

import pytest
import torch
from torch import nn

import effseg
from effseg.algorithms import choose
from effseg.benchmarking import registry
from effseg.benchmarking.registry import Contender, Workload, contenders, missing, select, workloads
from effseg.errors import InputError

TINY = Workload((32, 32, 64), classes=3)


def found(name):
    """The contender, unless its modules are not here."""
    contender = contenders()[name]
    if reason := missing(contender):
        pytest.skip(reason)
    return contender


def test_names_are_unique_and_tell_all():
    for name, contender in contenders().items():
        assert name == contender.name
        assert contender.is_ours == (contender.memory != "-")
        assert contender.implementation in (*registry.IMPLEMENTATIONS, "aten", "triton", "auto")
    for name, workload in workloads().items():
        assert name == workload.name
        assert workload.shape == (1, 1, *workload.volume)


@pytest.mark.parametrize("suite", registry.SELECTIONS)
def test_a_selection_is_listed_once_and_full_holds_all_of_it(suite):
    short, full = ([case.contender.name for case in select(suite, full)] for full in (False, True))
    assert len(select(suite)) == len(set(select(suite)))
    assert len(select(suite, full=True)) == len(set(select(suite, full=True)))
    assert set(short) <= set(full)
    assert len(short) < 15


def test_an_unknown_suite_is_named():
    with pytest.raises(InputError, match="suite: expected one of memory, throughput, got 'speed'"):
        select("speed")


def test_what_is_missing_is_told():
    absent = Contender("x", "eager", "-", lambda _: nn.Identity(), requires=("no_such_module.part",))
    assert missing(absent) == "no_such_module is not installed"
    assert missing(contenders()["unet3d/eager"]) is None
    assert missing(contenders()["effseg-base/raw/aten"], "cpu") is None
    if missing(contenders()["effseg-base/raw/triton"]) is None:
        assert missing(contenders()["effseg-base/raw/triton"], "cpu") == "kernels need a CUDA GPU"


PARAMETERS = {
    "unet3d": 19.07,
    "nnunet": 31.2,
    "nnunet-resenc-m": 102,
    "segresnet": 1.2,
    "dynunet": 31.2,
    "basic-unet": 5.75,
}


@pytest.mark.parametrize("network", PARAMETERS)
def test_checkpointing_keeps_weights_and_names(network):
    for implementation in ("eager", "checkpoint"):
        found(f"{network}/{implementation}")  # imports must not meet the meta device
    with torch.device("meta"):
        eager, checkpointed = (
            contenders()[f"{network}/{how}"].make(15).state_dict() for how in ("eager", "checkpoint")
        )
    assert {k: v.shape for k, v in eager.items()} == {k: v.shape for k, v in checkpointed.items()}


@pytest.mark.parametrize("network", PARAMETERS)
def test_networks_have_their_published_sizes(network):
    contender = found(f"{network}/eager")
    with torch.device("meta"):
        parameters = sum(p.numel() for p in contender.make(15).parameters())
    assert parameters / 1e6 == pytest.approx(PARAMETERS[network], rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("network", PARAMETERS)
def test_every_way_to_compute_a_network_gives_its_loss_and_gradients(network):
    ways = [found(f"{network}/{how}") for how in ("eager", "checkpoint", "channels_last")]
    losses, norms = zip(*(loss_and_gradient(way) for way in ways), strict=True)
    for loss, norm in zip(losses[1:], norms[1:], strict=True):
        assert loss == pytest.approx(losses[0], rel=1e-9)
        assert norm == pytest.approx(norms[0], rel=1e-6)


@pytest.mark.slow
def test_ours_has_the_loss_of_its_twin_in_stock_torch():
    names = ["stock-effseg-base/eager", *(f"effseg-base/{memory}/aten" for memory in ("raw", "stream+1"))]
    losses, norms = zip(*(loss_and_gradient(contenders()[name]) for name in names), strict=True)
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-9)
    assert norms == pytest.approx([norms[0]] * 3, rel=1e-6)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("implementation", registry.COMPILED)
def test_a_compiled_network_has_the_same_loss(implementation):
    eager, compiled = found("segresnet/eager"), found(f"segresnet/{implementation}")
    assert loss_and_gradient(compiled)[0] == pytest.approx(loss_and_gradient(eager)[0], rel=1e-9)


def loss_and_gradient(contender):
    """The loss of one step and the norm of all gradients, from the same weights and data, in float64."""
    torch.manual_seed(0)
    model = contender.make(TINY.classes).double().train()
    image, labels = contender.batch(model, TINY)
    loss = contender.step(model, image.double(), labels, "fp32")
    gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return loss.item(), torch.cat(gradients).norm().item()


@pytest.mark.parametrize("name", ["stock-effseg-tiny/eager", "effseg-tiny/raw/auto", "segresnet/eager"])
def test_inference_gives_classes(name):
    contender = found(name)
    model = contender.make(TINY.classes).eval()
    image, labels = contender.batch(model, TINY)
    classes = contender.infer(model, image)
    assert classes.shape == labels.shape
    assert classes.dtype == torch.uint8
    assert int(classes.max()) < TINY.classes


def test_labels_are_of_the_type_that_the_loss_reads():
    for name, dtype in (("unet3d/eager", torch.int64), ("effseg-tiny/raw/auto", torch.uint8)):
        contender = contenders()[name]
        assert contender.batch(contender.make(3), TINY)[1].dtype == dtype


def test_batches_of_a_seed_are_equal():
    contender = contenders()["effseg-tiny/raw/auto"]
    model = contender.make(3)
    for a, b in zip(contender.batch(model, TINY), contender.batch(model, TINY), strict=True):
        assert torch.equal(a, b)


def test_algorithms_are_forced_while_a_contender_is_active():
    chosen = {}
    for implementation in ("aten", "triton", "auto"):
        with effseg.algorithm("aten"), contenders()[f"effseg-base/raw/{implementation}"].active():
            chosen[implementation] = choose(torch.device("cpu"), torch.float32)
    assert chosen == {"aten": "aten", "triton": "triton", "auto": "aten"}


def test_the_compilers_budget_holds_while_a_contender_is_active():
    import torch._functorch.config as compiler

    before = compiler.activation_memory_budget
    with contenders()["unet3d/budget"].active():
        assert compiler.activation_memory_budget == registry.MEMORY_BUDGET
    assert compiler.activation_memory_budget == before
