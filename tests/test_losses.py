"""The plain loss against MONAI, torch, and itself over two processes."""

import multiprocessing as mp

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from effseg.errors import InputError
from effseg.losses import dice_cross_entropy


def batch(n=2, classes=4, size=(5, 4, 3), dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, classes, *size, generator=generator, dtype=dtype).requires_grad_()
    labels = torch.randint(0, classes, (n, *size), generator=generator, dtype=torch.uint8)
    return logits, labels


@pytest.mark.parametrize("include_background", [False, True])
@pytest.mark.parametrize("batch_dice", [False, True])
def test_dice_and_its_gradient_equal_monais(include_background, batch_dice):
    from monai.losses import DiceLoss

    logits, labels = batch()
    monai = DiceLoss(
        include_background=include_background, to_onehot_y=True, softmax=True, batch=batch_dice,
        smooth_nr=1e-5, smooth_dr=1e-5,
    )  # fmt: skip
    options = {"include_background": include_background, "batch_dice": batch_dice, "ce_weight": 0.0}
    ours, theirs = dice_cross_entropy(logits, labels, **options), monai(logits, labels.long().unsqueeze(1))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        *(torch.autograd.grad(x, logits)[0] for x in (ours, theirs)), rtol=1e-10, atol=1e-15
    )


@pytest.mark.parametrize("weights", [None, [0.5, 1.0, 2.0, 3.0]])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_cross_entropy_is_torchs(weights, label_smoothing):
    logits, labels = batch()
    weights = None if weights is None else torch.tensor(weights)
    ours = dice_cross_entropy(
        logits, labels, class_weights=weights, label_smoothing=label_smoothing, dice_weight=0.0, ce_weight=2.0
    )
    double = None if weights is None else weights.double()
    theirs = 2 * F.cross_entropy(logits, labels.long(), double, label_smoothing=label_smoothing)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("ignored", [2, 255])
def test_ignored_voxels_count_nowhere(ignored):
    """The loss of a volume with ignored voxels is that of the volume without them."""
    logits, labels = batch(n=1, size=(6, 1, 1))
    labels[:] = torch.tensor([0, 1, 3, 0, 1, 3], dtype=torch.uint8).view(1, 6, 1, 1)
    kept = dice_cross_entropy(logits[:, :, :4], labels[:, :4])
    labels[:, 4:] = ignored
    torch.testing.assert_close(dice_cross_entropy(logits, labels, ignore_index=ignored), kept)


NOTHING_COUNTS = [
    {},
    {"batch_dice": True, "include_background": True},
    {"label_smoothing": 0.1, "class_weights": torch.tensor([0.2, 1.0, 2.0, 3.0])},
    {"smooth": 0.0},
    {"smooth": 0.0, "batch_dice": True},
]


@pytest.mark.parametrize("options", NOTHING_COUNTS, ids=str)
def test_nothing_to_learn_from(options):
    logits, labels = batch(dtype=torch.float32)
    loss = dice_cross_entropy(logits, torch.full_like(labels, 255), ignore_index=255, **options)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_voxels_of_classes_without_weight_only():
    logits, labels = batch()
    weights = torch.tensor([1.0, 0.0, 1.0, 1.0])
    loss = dice_cross_entropy(logits, torch.ones_like(labels), class_weights=weights, dice_weight=0.0)
    loss.backward()
    assert loss.item() == 0
    assert not logits.grad.any()


@pytest.mark.parametrize("options", NOTHING_COUNTS[:3], ids=str)
def test_a_sample_of_ignored_voxels_leaves_the_other_finite(options):
    logits, labels = batch()
    labels[0] = 255
    (grad,) = torch.autograd.grad(dice_cross_entropy(logits, labels, ignore_index=255, **options), logits)
    assert not grad[0].any()
    assert grad[1].any()
    assert torch.isfinite(grad).all()


def test_half_precision_is_widened():
    logits, labels = batch(dtype=torch.bfloat16)
    loss = dice_cross_entropy(logits, labels)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, dice_cross_entropy(logits.float(), labels))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_class_weights_under_autocast(dtype):
    """Autocast rounds matrix products: more voxels of a class than fp16 holds must not make a loss of 0."""
    logits, labels = batch(n=1, classes=3, size=(48, 48, 96), dtype=torch.float32)
    weights = torch.tensor([0.3, 1.0, 2.0])
    alone = dice_cross_entropy(logits, labels, class_weights=weights)
    with torch.autocast("cpu", dtype):
        assert torch.equal(dice_cross_entropy(logits, labels, class_weights=weights), alone)


def test_gradient_is_the_finite_difference():
    logits, labels = batch(n=1, classes=3, size=(2, 2, 2))
    weights = torch.tensor([0.3, 1.0, 2.0])
    options = {
        "class_weights": weights,
        "label_smoothing": 0.2,
        "ignore_index": 2,
        "include_background": True,
    }
    assert torch.autograd.gradcheck(lambda x: dice_cross_entropy(x, labels, **options), logits)


@pytest.mark.parametrize(
    ("logits", "labels", "weights", "line"),
    [
        ((1, 1, 2, 2, 2), (1, 2, 2, 2), None, "logits: expected"),
        ((2, 2, 2, 2), (2, 2, 2, 2), None, "logits: expected"),
        ((1, 3, 2, 2, 2), (1, 1, 2, 2, 2), None, "labels: expected the logits' shape"),
        ((1, 3, 2, 2, 2), (1, 2, 2, 2), (2,), r"class_weights: expected shape \(3,\)"),
    ],
)
def test_wrong_shapes_are_named(logits, labels, weights, line):
    weights = None if weights is None else torch.ones(weights)
    with pytest.raises(InputError, match=line):
        dice_cross_entropy(torch.zeros(logits), torch.zeros(labels, dtype=torch.uint8), class_weights=weights)


def test_labels_must_be_integers():
    with pytest.raises(InputError, match=r"labels: expected an integer dtype, got torch\.float32"):
        dice_cross_entropy(torch.zeros(1, 2, 2, 2, 2), torch.zeros(1, 2, 2, 2))


OPTIONS = (
    {},
    {"batch_dice": True, "label_smoothing": 0.1, "class_weights": torch.tensor([0.2, 1.0, 2.0, 3.0])},
    {"ignore_index": 3, "include_background": True},
    {"ignore_index": 255},
    {"ignore_index": 255, "batch_dice": True},
    {"ignore_index": 255, "smooth": 0.0},
)
IGNORED = (0, 0, 0, 1, 1, 3)  # so many of the samples are ignored as a whole; the first process has one


def sparse_batch(number):
    logits, labels = batch(n=3)
    labels[: IGNORED[number]] = 255
    return logits, labels


def one_process(rank, init, queue):
    dist.init_process_group("gloo", init_method=init, rank=rank, world_size=2)
    for number, options in enumerate(OPTIONS):
        logits, labels = sparse_batch(number)
        mine = slice(0, 1) if rank == 0 else slice(1, 3)
        part = logits.detach()[mine].requires_grad_()
        loss = dice_cross_entropy(part, labels[mine], process_group=True, **options)
        loss.backward()
        queue.put((rank, loss.item(), part.grad.numpy()))
    queue.close()
    queue.join_thread()
    dist.destroy_process_group()


@pytest.mark.long
def test_two_processes_make_the_loss_of_the_whole_batch(tmp_path):
    context = mp.get_context("spawn")
    queue = context.Queue()
    init = f"file://{tmp_path}/rendezvous"
    workers = [context.Process(target=one_process, args=(rank, init, queue)) for rank in (0, 1)]
    for worker in workers:
        worker.start()
    answers = [queue.get(timeout=120) for _ in range(2 * len(OPTIONS))]
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    for i, options in enumerate(OPTIONS):
        logits, labels = sparse_batch(i)
        loss = dice_cross_entropy(logits, labels, **options)
        (whole,) = torch.autograd.grad(loss, logits)
        for rank, mine in ((0, slice(0, 1)), (1, slice(1, 3))):
            value, grad = [(v, g) for r, v, g in answers if r == rank][i]
            assert value == pytest.approx(loss.item(), rel=1e-12)
            torch.testing.assert_close(torch.from_numpy(grad) / 2, whole[mine], rtol=1e-10, atol=1e-15)
