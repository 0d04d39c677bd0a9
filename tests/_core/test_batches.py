"""What a batch is, when it is refused, and what a device is asked."""

import threading

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from captum_classfilters._core.batches import first_batch, read_batches
from captum_classfilters._core.labels import class_labels, memberships
from tests.models import deep, images, known, pool_linear

LABELS = torch.tensor([0, 2, 1])


def read(data, **options):
    model = options.pop("model", None)
    with read_batches(model, data, "test", show_progress=False, **options) as batches:
        return [(batch.inputs, batch.labels) for batch in batches]


@pytest.mark.parametrize(
    "batch",
    [
        (images(3), LABELS),
        [images(3), LABELS],
        (images(3), LABELS, ["a", "b", "c"]),
        ((images(3),), LABELS),
        {"pixel_values": images(3), "labels": LABELS},
        {"image": images(3), "label": LABELS, "path": ["a", "b", "c"], "id": torch.arange(3)},
        {"anything": images(3), "target": LABELS},
        ({"image": images(3)}, LABELS),
    ],
)
def test_what_a_batch_may_be(batch):
    ((inputs, labels),) = read([batch])
    assert len(inputs) == 1
    assert torch.equal(inputs[0], images(3))
    assert torch.equal(labels, LABELS)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"unpack": 5}, "unpack=5; expected a function"), ({"device": "gpu0"}, "'gpu0' is no device")],
)
def test_what_needs_no_data_is_checked_without(options, message):
    def data():
        raise AssertionError("read")
        yield

    with pytest.raises(ValueError, match=message):
        read(data(), **options)


def test_other_threads_wait_for_a_model_that_is_trained():
    model = deep()
    said: list[str] = []

    def other():
        read([(images(3), LABELS)], model=model)
        said.append("the other")

    thread = threading.Thread(target=other)
    with read_batches(model, [], "test", training=True, may_be_empty=True, show_progress=False):
        thread.start()
        thread.join(0.1)  # it has not the time to end, or waits
        said.append("training")
    thread.join()
    assert said == ["training", "the other"]


def test_several_inputs_and_tokens():
    ((inputs, _),) = read([((images(3), images(3, seed=2)), LABELS)])
    assert len(inputs) == 2
    tokens, mask = torch.ones(3, 5, dtype=torch.int64), torch.ones(3, 5)
    ((inputs, _),) = read([{"input_ids": tokens, "attention_mask": mask, "labels": LABELS}])
    assert [part.dtype for part in inputs] == [torch.int64, torch.float32]


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (images(3), r"is a Tensor; expected a pair .* unpack=lambda"),
        ((images(3),), "is a tuple of 1"),
        ("images", "is a str"),
        (("x", LABELS), "inputs of batch 1 are str; .* ToTensor"),
        ((images(3).numpy(), LABELS), r"are ndarray; .* unpack=lambda batch: .torch.as_tensor"),
        (((), LABELS), "inputs of batch 1 are missing"),
        ((images(3), None), "a pair whose labels are None"),
        ((images(3)[0], 2), r"one number as labels, .*DataLoader\(dataset, batch_size=64\)"),
        ((images(3)[0], LABELS[0]), "one number as labels"),
        (
            (LABELS, images(3)),
            r"labels of shape \(3, 2, 6, 6\) and .* in this order: unpack=lambda",
        ),
        (3, "is an int; expected a pair"),
        ({"pixel_values": images(3)}, "'pixel_values' and no labels"),
        ({"a": images(3), "b": images(3), "label": LABELS}, r"could be \['a', 'b'\]"),
    ],
)
def test_what_a_batch_may_not_be(batch, message):
    with pytest.raises(ValueError, match=message):
        read([(images(3), LABELS), batch])


@pytest.mark.parametrize("dataloader", [3, None, "images", {"x": 1}, images(3), deep(), len])
def test_what_a_loader_may_not_be(dataloader):
    with pytest.raises(
        ValueError, match=r"The data loader is of the type \w+; expected a DataLoad"
    ):
        read(dataloader)


def test_arrays_become_tensors_as_the_refusal_says():
    arrays = [(images(3).numpy(), LABELS)]
    ((inputs, _),) = read(arrays, unpack=lambda batch: (torch.as_tensor(batch[0]), batch[1]))
    assert torch.equal(inputs[0], images(3))


def test_swapped_pairs_are_read_as_the_refusal_says():
    swapped = [(LABELS, images(3))]
    ((inputs, labels),) = read(swapped, unpack=lambda batch: (batch[1], batch[0]))
    assert torch.equal(inputs[0], images(3))
    assert labels is LABELS


def test_data_sets_are_told_from_batches():
    data = TensorDataset(images(3), LABELS)
    for labeled in (True, False):
        with pytest.raises(ValueError, match="A data set of single images"):
            read(data, labeled=labeled)
    (batch,) = read(DataLoader(data, batch_size=3))
    assert torch.equal(batch[1], LABELS)
    assert len(read([(images(3), 0)], labeled=False)) == 1  # a label that nobody reads


def test_unpack_is_the_way_out_of_every_refusal():
    strange = {"a": images(3), "b": images(3, seed=2), "label": LABELS}
    ((inputs, labels),) = read([strange], unpack=lambda batch: (batch["b"], batch["label"]))
    assert torch.equal(inputs[0], images(3, seed=2))
    assert labels is LABELS
    with pytest.raises(ValueError, match="unpack returned a tuple of 3"):
        read([strange], unpack=lambda batch: (1, 2, 3))


def test_batches_without_labels_where_none_are_needed():
    for batch in (images(3), (images(3),), [images(3)]):
        ((inputs, labels),) = read([batch], labeled=False)
        assert torch.equal(inputs[0], images(3))
        assert labels is None


def test_empty_batches_are_passed_over_and_images_are_counted():
    data = [(images(0), LABELS[:0]), (images(3), LABELS), (images(1), LABELS[:1])]
    with read_batches(None, data, "test", show_progress=False) as batches:
        places = [(batch.number, batch.first_image, batch.size) for batch in batches]
    assert places == [(1, 0, 3), (2, 3, 1)]
    assert batches.num_images == 4


def test_a_loader_without_an_image_is_refused():
    used = iter([(images(3), LABELS)])
    assert len(read(used)) == 1
    for data in ([], [(images(0), LABELS[:0])], used):
        with pytest.raises(ValueError, match="loader is empty"):
            read(data)
    assert read([], may_be_empty=True) == []
    assert first_batch(None, [(images(0), LABELS[:0]), (images(3), LABELS)]).size == 3


def test_modes_around_the_call_do_not_matter():
    model = deep().train()
    for mode in (torch.no_grad(), torch.inference_mode(), torch.enable_grad()):
        with (
            mode,
            read_batches(
                model, [(images(3), LABELS)], "test", gradients=True, show_progress=False
            ) as batches,
        ):
            for batch in batches:
                assert torch.is_grad_enabled()
                assert not torch.is_inference_mode_enabled()
                assert not batch.inputs[0].is_inference()
                assert not any(module.training for module in model.modules())
                assert not any(parameter.requires_grad for parameter in model.parameters())
        assert all(module.training for module in model.modules())
        assert all(parameter.requires_grad for parameter in model.parameters())


def test_an_error_in_the_block_leaves_the_model_as_found():
    model = deep().train()

    def fail():
        with read_batches(model, [(images(3), LABELS)], "test", show_progress=False) as batches:
            for _ in batches:
                raise KeyError("in the block")

    with pytest.raises(KeyError):
        fail()
    assert all(module.training for module in model.modules())


def test_answers_of_a_device_come_in_order_and_at_the_latest_at_the_end():
    answers = []
    loader = DataLoader(TensorDataset(images(20), torch.arange(20) % 3), batch_size=2)
    with read_batches(pool_linear(), loader, "test", show_progress=False) as batches:
        for batch in batches:
            flag = torch.tensor(batch.number % 2 == 0)

            def note(values, n=batch.number):
                answers.append((n, values))

            batches.later([flag, ~flag], note)
    assert answers == [(n, [n % 2 == 0, n % 2 == 1]) for n in range(10)]

    def check_every_batch():
        with read_batches(None, loader, "test", show_progress=False) as batches:
            for batch in batches:
                right = torch.tensor(batch.number != 3)

                def error(n=batch.number):
                    return ValueError(f"image {n}")

                batches.check(right, error)

    with pytest.raises(ValueError, match="image 3"):
        check_every_batch()


class TestLabels:
    def test_indices(self):
        for labels in (LABELS, LABELS[:, None], LABELS.tolist(), LABELS.int(), LABELS.numpy()):
            assert class_labels(labels, 3, 3, 0).tolist() == [0, 2, 1]
            assert class_labels(labels, 3, 3, 0).dtype == torch.int64

    def test_two_classes_as_binary_losses_have_them(self):
        for labels in (
            torch.tensor([0.0, 1.0, 1.0]),
            torch.tensor([[0.0], [1.0], [1.0]]),
            torch.tensor([False, True, True]),
        ):
            assert class_labels(labels, 3, 2, 0).tolist() == [0, 1, 1]

    def test_one_hot_is_an_index(self):
        hot = nn.functional.one_hot(LABELS, 3)
        for labels in (hot, hot.float(), hot.bool()):
            found = memberships(labels, 3, 3, 0)
            assert found.images is None
            assert found.classes.tolist() == [0, 2, 1]

    def test_multi_hot_images_count_for_each_of_their_classes(self):
        hot = torch.tensor([[1, 0, 1], [0, 0, 0], [0, 1, 0], [1, 1, 1]])
        found = memberships(hot, 4, 3, 0)
        assert known(found.images).tolist() == [0, 0, 2, 3, 3, 3]
        assert found.classes.tolist() == [0, 2, 1, 0, 1, 2]
        values = torch.arange(4.0)[:, None]
        assert found.of_images(values)[:, 0].tolist() == [0, 0, 2, 3, 3, 3]
        targets = [(t.tolist(), known(rows).tolist()) for t, rows in found.rounds()]
        assert targets == [
            ([0, 0, 1, 0], [0, -1, 2, 3]),
            ([2, 0, 0, 1], [1, -1, -1, 4]),
            ([0, 0, 0, 2], [-1, -1, -1, 5]),
        ]

    @pytest.mark.parametrize(
        ("labels", "message"),
        [
            (torch.tensor([0.0, 1.5, 1.0]), "torch.float32; expected whole numbers"),
            (torch.tensor([0, 3, 1]), "label 3, but there are 3 classes"),
            (torch.tensor([0, -1, 1]), "label -1"),
            (torch.tensor([True, False, True]), "torch.bool"),
            (torch.tensor([0, 1]), r"shape \(2,\); expected \(3,\)"),
            (torch.full((3, 3), 0.2), "not multi-hot"),
            (torch.tensor(1), r"shape \(\)"),
            (["cat", "dog", "fox"], "list that is no tensor"),
        ],
    )
    def test_anything_else_is_refused_by_name(self, labels, message):
        with pytest.raises(ValueError, match=f"batch 4.*{message}|Batch 4.*{message}"):
            memberships(labels, 3, 3, 4)

    def test_one_class_per_image_where_it_must_be(self):
        with pytest.raises(ValueError, match="multi-hot, several classes"):
            class_labels(torch.ones(3, 3), 3, 3, 0)


def test_the_bar_tells_images_per_second(capsys):
    with read_batches(None, [(torch.rand(3, 2), torch.arange(3))], "reading") as batches:
        assert len(list(batches)) == 1
    shown = capsys.readouterr().err
    assert "reading: 100%" in shown
    assert "images/s" in shown
    with read_batches(
        None, [(torch.rand(3, 2), torch.arange(3))], "reading", show_progress=False
    ) as batches:
        assert len(list(batches)) == 1
    assert not capsys.readouterr().err
