"""Readers fitted by least squares: costs, weights and what is seen, beside closed forms and autograd."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from captum_classfilters.pruning.least_squares import (
    Fit,
    Reader,
    Seen,
    Weighted,
    _has_its_size,
    _patches,
    _positions,
    can_be_fitted,
    cholesky,
    matrix_of,
    positions_for,
    put_matrix,
    remove_least,
    root_of,
    see_again,
    see_full,
    weighted,
)
from captum_classfilters.pruning.resumed_runs import ResumedRuns


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_of_rounded_rows_are_not_rounded_again(dtype):
    rows = torch.rand(5000, 20, generator=torch.Generator().manual_seed(0)).to(dtype)
    seen = Seen()
    seen.see(rows, rows[:, :3])
    exact = rows.double()
    torch.testing.assert_close(seen.moments, exact.T @ exact, rtol=1e-4, atol=0.0)
    torch.testing.assert_close(seen.cross, exact[:, :3].T @ exact, rtol=1e-4, atol=0.0)


def fit_of(read, matrix, columns, root=None):
    seen = Seen()
    rows = torch.cat([read, torch.ones(len(read), 1)], 1).double()
    seen.see(rows, rows @ matrix.T)
    root = torch.eye(len(matrix)).double() if root is None else root
    return Fit(seen, matrix, root, torch.tensor(columns))


def test_what_goes_is_made_up_for():
    """Input 2 is twice input 0, input 3 is always 5: their weights go to input 0 and to the bias."""
    read = torch.randn(200, 2, generator=torch.Generator().manual_seed(0))
    read = torch.stack([read[:, 0], read[:, 1], 2 * read[:, 0], torch.full((200,), 5.0)], 1)
    matrix = torch.tensor([[1.0, 2.0, 3.0, 4.0, 0.5], [0.0, -1.0, 2.0, 1.0, 0.0]]).double()
    fit = fit_of(read, matrix, [[0], [1], [2], [3]])
    fit.remove(torch.tensor([2, 3]))
    expected = torch.tensor([[7.0, 2.0, 0.0, 0.0, 20.5], [4.0, -1.0, 0.0, 0.0, 5.0]]).double()
    assert torch.allclose(fit.matrix, expected, atol=0.02)


def test_costs_are_the_errors_of_least_squares():
    """Of independent inputs, what goes costs its variance times its weight squared; outputs count."""
    generator = torch.Generator().manual_seed(1)
    read = torch.randn(20000, 3, generator=generator) * torch.tensor([1.0, 2.0, 3.0])
    matrix = torch.tensor([[3.0, 2.0, 0.5, 1.0], [0.0, 0.0, 9.0, 0.0]]).double()
    root = torch.diag(torch.tensor([1.0, 0.0])).double()  # the second output does not count
    fit = fit_of(read, matrix, [[0], [1], [2]], root)
    costs = fit.costs(torch.arange(3))
    assert torch.allclose(costs, torch.tensor([9.0, 16.0, 2.25]).double(), rtol=0.05)
    left, errors = remove_least([fit], 1)
    assert left.tolist() == [1]
    assert torch.allclose(errors, torch.tensor([0.0, 2.25, 11.25]).double(), rtol=0.05)
    assert (fit.matrix[:, [0, 2]] == 0).all()


def test_filters_go_with_all_their_columns():
    read = torch.randn(100, 6, generator=torch.Generator().manual_seed(2))
    matrix = torch.randn(3, 7, generator=torch.Generator().manual_seed(3)).double()
    fit = fit_of(read, matrix, [[0, 1], [2, 3]])
    stopped = []
    remove_least([fit], 1, {1: lambda: stopped.append(fit.matrix.clone())})
    zero = (fit.matrix == 0).all(0).tolist()
    assert zero in ([True, True, *[False] * 5], [False, False, True, True, *[False] * 3])
    assert len(stopped) == 1
    assert torch.equal(stopped[0], fit.matrix)
    rows = torch.cat([read, torch.ones(100, 1)], 1).double()
    left = [place for place in range(7) if not zero[place]]
    best = torch.linalg.lstsq(rows[:, left], rows @ matrix.T).solution.T
    assert torch.allclose(fit.matrix[:, left], best, atol=1e-3)


@pytest.mark.parametrize(
    "steps", [[[2], [7, 0], [5]], [[9, 8, 7, 6, 5]], [[0, 1, 2], [9], [3, 8, 4]]]
)
def test_in_whatever_steps_filters_go_the_closed_form_is_left(steps):
    """Columns change places meanwhile; whole filters in any order, one input that is of no filter."""
    generator = torch.Generator().manual_seed(5)
    read = torch.randn(300, 21, generator=generator) @ torch.randn(21, 21, generator=generator)
    matrix = torch.randn(4, 22, generator=generator).double()
    root = torch.randn(4, 4, generator=generator).double()
    columns = torch.randperm(21, generator=generator)[:20].reshape(10, 2)
    fit = fit_of(read, matrix, columns.tolist(), root)
    rows = torch.cat([read, torch.ones(300, 1)], 1).double()
    moments, cross = rows.T @ rows / 300, (rows @ matrix.T).T @ rows / 300
    ridge = 1e-4 * moments.diagonal()[:-1].mean()

    def closed(gone):
        """The ridge's weights without filters, and what is lost by then."""
        kept = [c for c in range(22) if c not in columns[list(gone)].flatten().tolist()]
        own = moments[kept][:, kept] + ridge * torch.eye(len(kept)).double()
        weight = torch.linalg.solve(own, (cross + ridge * matrix)[:, kept].T).T
        whole = torch.zeros_like(matrix)
        whole[:, kept] = weight
        # What the whole fit's objective is above its least.
        change = root @ (fit_all - whole)
        return whole, float((change @ ridged * change).sum())

    ridged = moments + ridge * torch.eye(22).double()
    fit_all = torch.linalg.solve(ridged, (cross + ridge * matrix).T).T
    gone: list[int] = []
    for step in steps:
        left = [f for f in range(10) if f not in gone]
        _, before = closed(gone)
        rises = [closed([*gone, f])[1] - before for f in left]
        assert fit.costs(torch.tensor(left)).tolist() == pytest.approx(rises, rel=1e-6)
        fit.remove(torch.tensor(step))
        gone += step
        assert torch.allclose(fit.matrix, closed(gone)[0], rtol=1e-6, atol=1e-9)


def test_rounding_that_leaves_no_positive_matrix_gets_a_larger_ridge():
    """Sums in single precision of inputs that nearly depend on each other."""
    seen = Seen()
    seen.see(torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0, 0.0]]))
    seen.moments = torch.tensor([[1.0, 1.05], [1.05, 1.0]]).double()  # an eigenvalue of -.05
    found = Fit(seen, torch.zeros(2, 2).double()).matrix
    ridge = 0.1
    expected = seen.cross @ torch.linalg.inv(seen.moments + ridge * torch.eye(2).double())
    assert torch.allclose(found, expected)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", ["diagonal", "one", "off"])
def test_moments_that_are_not_finite(number, where):
    moments = torch.eye(3).double()
    if where == "diagonal":
        moments.diagonal().fill_(number)
    elif where == "one":
        moments[1, 1] = number
    else:
        moments[0, 2] = moments[2, 0] = number
    with pytest.raises(ValueError, match="too large, or not a number"):
        cholesky(moments, 1e-8)


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3},
        {"kernel_size": (3, 2), "stride": (2, 1), "padding": (0, 2), "dilation": (1, 2)},
        {"kernel_size": (5, 3), "padding": "same"},
        {"kernel_size": 1, "stride": 2, "padding": "valid"},
    ],
)
def test_patches_are_what_a_convolution_reads(options):
    torch.manual_seed(0)
    conv, x = nn.Conv2d(3, 4, **options), torch.randn(2, 3, 9, 7)
    with torch.no_grad():
        output = conv(x)
        where = _positions(conv, output, 16, 0)
        patches = _patches(conv, x, where).flatten(2)
        rows = torch.cat([patches, torch.ones(*patches.shape[:2], 1)], 2).double()
        made = (rows @ matrix_of(conv).T).float()
    expected = output.flatten(2).transpose(1, 2).gather(1, where[..., None].expand(-1, -1, 4))
    assert torch.allclose(made, expected, atol=1e-5)
    assert all(len(set(row)) == len(row) for row in where.tolist())


def test_a_matrix_put_back_changes_nothing():
    torch.manual_seed(0)
    for layer, x in (
        (nn.Conv2d(3, 4, 2, bias=False), torch.randn(2, 3, 5, 5)),
        (nn.Linear(3, 4), torch.randn(2, 3)),
    ):
        before = layer(x)
        put_matrix(layer, matrix_of(layer))
        assert torch.allclose(layer(x), before, atol=1e-6)
        assert layer.bias is not None


def test_the_ridge_pulls_to_the_matrix_before():
    r"""One input of mean square 4 and no bias that matters: (cross + r m) / (moment + r)."""
    seen = Seen()
    seen.see(torch.tensor([[2.0, 0.0], [-2.0, 0.0]]), torch.tensor([[6.0], [-6.0]]))
    found = Fit(seen, torch.tensor([[50.0, 7.0]])).matrix
    ridge = 1e-4 * 4
    assert found[0, 0] == pytest.approx((12 + ridge * 50) / (4 + ridge), rel=1e-9)
    assert found[0, 1] == pytest.approx(7)  # what is never seen stays


def test_costs_and_errors_of_correlated_inputs_are_what_refitting_leaves():
    """Of every set that is left, the error is that of the best fit without the others."""
    generator = torch.Generator().manual_seed(4)
    read = torch.randn(400, 8, generator=generator) @ torch.randn(8, 8, generator=generator)
    matrix = torch.randn(2, 9, generator=generator).double()
    root = torch.tensor([[2.0, 1.0], [0.0, 0.5]]).double()
    columns = [[0, 4], [1, 5], [2, 6], [3, 7]]
    rows = torch.cat([read, torch.ones(400, 1)], 1).double()
    targets = rows @ matrix.T

    def best_error(left):
        kept = [column for filters in left for column in columns[filters]] + [8]
        solution = torch.linalg.lstsq(rows[:, kept], targets).solution
        return float(((targets - rows[:, kept] @ solution) @ root.T).square().sum(1).mean())

    fit = fit_of(read, matrix, columns, root)
    alone = [best_error([f for f in range(4) if f != gone]) for gone in range(4)]
    assert fit.costs(torch.arange(4)).tolist() == pytest.approx(alone, rel=0.01)
    left, errors = remove_least([fit], 2)
    first = min(range(4), key=alone.__getitem__)
    pairs = {
        gone: best_error([f for f in range(4) if f not in (first, gone)])
        for gone in range(4)
        if gone != first
    }
    second = min(pairs, key=pairs.__getitem__)
    assert left.tolist() == [f for f in range(4) if f not in (first, second)]
    assert errors.tolist() == pytest.approx([0, alone[first], pairs[second]], rel=0.01)


def test_filters_go_for_all_their_readers_at_once():
    """Filter 0 costs the first reader 1 and the second 16; filter 1 costs 9 and 4, filter 2 9 and 9."""
    read = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 3)
    fits = [
        fit_of(read, torch.tensor([row]).double(), [[0], [1], [2]])
        for row in ([1.0, 3.0, 3.0, 0.0], [4.0, 2.0, 3.0, 0.0])
    ]
    left, errors = remove_least(fits, 1)
    assert left.tolist() == [2]
    assert errors.tolist() == pytest.approx([0, 13, 30], rel=1e-3)
    assert [fit.matrix[0, :2].tolist() for fit in fits] == [[0, 0], [0, 0]]


def test_of_many_filters_one_in_32_goes_in_a_step_and_none_beyond_a_stop():
    read = torch.eye(70)[torch.arange(140) % 70] * 8
    weights = torch.arange(1.0, 71.0)
    steps, stopped = [], []

    class Counting(Fit):
        def remove(self, filters):
            steps.append(len(filters))
            super().remove(filters)

    seen = Seen()
    rows = torch.cat([read, torch.zeros(140, 1)], 1).double()
    matrix = torch.cat([weights, torch.zeros(1)])[None].double()
    seen.see(rows, rows @ matrix.T)
    fit = Counting(seen, matrix, columns=torch.arange(70)[:, None])
    stops = {size: lambda size=size: stopped.append(size) for size in (67, 60)}
    left, _ = remove_least([fit], 59, stops)
    assert left.tolist() == list(range(11, 70))
    assert stopped == [67, 60]
    # 70 and 68 lose two each but for the stop; from 63 on it is one.
    assert steps == [2, 1, 2, 2, 1, 1, 1, 1]


def test_columns_of_a_filter():
    """A layer reads filters 1 and 0, something else, and filter 1 again, by kernels of two."""
    reader = Reader("reader", torch.tensor([1, 0, -1, 1]))
    conv = nn.Conv2d(4, 3, (1, 2))
    assert reader.columns(conv, 1).tolist() == [[2, 3]]
    assert Reader("", torch.tensor([1, 0, -1])).columns(conv, 2).tolist() == [[2, 3], [0, 1]]
    assert Reader("", torch.tensor([0, 1, 0, 1])).columns(nn.Linear(4, 2), 2).tolist() == [
        [0, 2],
        [1, 3],
    ]


def test_what_can_be_fitted():
    assert can_be_fitted(nn.Linear(2, 2))
    assert can_be_fitted(nn.Conv2d(4, 4, 1))
    assert not can_be_fitted(nn.Conv2d(4, 4, 1, groups=2))
    assert not can_be_fitted(nn.Conv1d(4, 4, 1))


def test_few_images_are_looked_at_in_more_places():
    assert [positions_for(images) for images in (1, 100, 768, 769, 5000)] == [
        12288,
        123,
        16,
        16,
        16,
    ]


def test_a_root_gives_no_output_a_weight_of_nothing():
    fisher = torch.diag(torch.tensor([4.0, 0.0])).double()
    root = root_of(fisher)
    assert (root.T @ root).diagonal().tolist() == pytest.approx([4.002, 0.002])
    assert float(root_of(torch.zeros(2, 2).double()).diagonal().min()) > 0


@pytest.mark.parametrize(
    ("layer", "shape", "output", "expected"),
    [
        (nn.Conv2d(2, 3, 3, stride=2, padding=1), (1, 2, 7, 6), (1, 3, 4, 3), True),
        (nn.Conv2d(2, 3, 3, stride=2, padding=1), (1, 2, 7, 6), (1, 3, 4, 4), False),
        (nn.Conv2d(2, 3, (3, 1), dilation=2), (1, 2, 7, 6), (1, 3, 3, 6), True),
        (nn.Conv2d(2, 3, (3, 1), dilation=2), (1, 2, 7, 6), (1, 3, 5, 6), False),
        (nn.Conv2d(2, 3, 3, padding="same"), (1, 2, 7, 6), (1, 3, 7, 6), True),
        (nn.Conv2d(2, 3, 3), (2, 7, 6), (3, 5, 4), False),  # a single image
        (nn.Conv2d(2, 3, 3, padding="same"), (2, 7, 6), (3, 7, 6), False),
        (nn.Linear(4, 3), (5, 2, 4), (5, 2, 3), True),
        (nn.Linear(4, 3), (5, 2, 4), (10, 3), False),
    ],
)
def test_layers_that_pad_by_themselves_are_told(layer, shape, output, expected):
    assert _has_its_size(layer, torch.zeros(shape), torch.zeros(output)) is expected


# -- one pass ---------------------------------------------------------------------------------------


class Two(nn.Module):
    """A convolution, an activation that writes into it, and a head of three classes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.act, self.head = nn.Conv2d(2, 4, 3), nn.ReLU(inplace=True), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.act(self.conv(x)).mean((2, 3)))


def images(*numbers):
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(n, 2, 5, 4, generator=generator), torch.zeros(n).long()) for n in numbers]


def test_a_pass_sees_inputs_outputs_and_gradients():
    model, data = Two().eval(), images(3, 2)
    modules: dict[str, Weighted] = {"conv": model.conv, "head": model.head}
    seen = see_full(model, modules, data, positions=100, seed=0)
    x = torch.cat([batch for batch, _ in data])
    with torch.no_grad():
        maps = model.conv(x)
        features = maps.relu().mean((2, 3))
    unfolded = torch.nn.functional.unfold(x, 3).transpose(1, 2).flatten(0, 1)
    for name, read, made in (
        ("conv", unfolded, maps.flatten(2).transpose(1, 2).flatten(0, 1)),
        ("head", features, model.head(features).detach()),
    ):
        rows = torch.cat([read, torch.ones(len(read), 1)], 1)
        assert seen[name].rows == len(rows)
        assert seen[name].linear
        assert torch.allclose(seen[name].moments.float(), rows.T @ rows, atol=1e-4)
        assert torch.allclose(seen[name].cross.float(), made.T @ rows, atol=1e-4)
        assert torch.equal(torch.cat(seen[name].made), made)
        assert [len(part) * 5 for part in seen[name].made] == [3 * len(rows), 2 * len(rows)]
    # Scores less their mean: each image gives P s s^T P with signs s and P = 1 - 1/3.
    signs = torch.Generator().manual_seed(0)
    expected = torch.zeros(3, 3)
    for batch, _ in data:
        drawn = torch.randint(0, 2, (len(batch), 3), generator=signs) * 2.0 - 1
        drawn = drawn - drawn.mean(1, keepdim=True)
        expected += drawn.T @ drawn
    assert torch.allclose(seen["head"].fisher.float(), expected, atol=1e-5)
    assert seen["conv"].fisher.shape == (4, 4)
    assert all(p.grad is None for p in model.parameters())


def test_gradients_at_a_convolution_are_those_of_its_outputs():
    """The image's gradient at every position, which ReLU and the mean let through alike."""
    model, data = Two().eval(), images(3)
    seen = see_full(model, {"conv": model.conv}, data, positions=2, seed=0)
    (x, _), signs = data[0], torch.Generator().manual_seed(0)
    drawn = torch.randint(0, 2, (3, 3), generator=signs) * 2.0 - 1
    drawn = drawn - drawn.mean(1, keepdim=True)
    with torch.no_grad():
        open_ = (model.conv(x) > 0).flatten(2).transpose(1, 2).float()  # (N, P, K)
        gradients = open_ * (drawn @ model.head.weight / open_.shape[1])[:, None]
        rows = gradients.flatten(0, 1)
    assert torch.allclose(seen["conv"].fisher.float(), rows.T @ rows, atol=1e-6)
    assert seen["conv"].rows == 3 * 2  # of two positions each


class Tokens(nn.Module):
    """Two layers of tokens (N, T, K), as linear layers or as the same 1x1 convolutions."""

    def __init__(self, convolutions: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        kind = [nn.Linear(2, 4), nn.Linear(4, 6), nn.Linear(6, 3)]
        self.convolutions, self.head = convolutions, kind.pop()
        if convolutions:
            linear, kind = kind, [nn.Conv2d(2, 4, 1), nn.Conv2d(4, 6, 1)]  # type: ignore[list-item]
            for layer, same in zip(kind, linear, strict=True):
                layer.weight.data = same.weight.data[:, :, None, None].clone()
                layer.bias.data = same.bias.data.clone()
        self.first, self.second = kind

    def forward(self, x):
        x = x if self.convolutions else x.flatten(2).transpose(1, 2)
        maps = self.second(self.first(x).relu()).relu()
        return self.head(maps.mean((2, 3) if self.convolutions else 1))


@pytest.mark.parametrize(("height", "width"), [(5, 1), (2, 2), (3, 2)])  # 4 and 6 as the filters
def test_tokens_are_seen_as_positions_of_a_convolution_are(height, width):
    data = [(x[:, :, :height, :width], y) for x, y in images(3, 2)]
    found = []
    for convolutions in (False, True):
        model = Tokens(convolutions).eval()
        modules = {name: weighted(model, name) for name in ("first", "second", "head")}
        found.append(see_full(model, modules, data, positions=100, seed=0))
    for name in found[0]:
        tokens, maps = (seen[name] for seen in found)
        assert tokens.linear
        assert (tokens.rows, tokens.fisher.shape) == (maps.rows, maps.fisher.shape)
        for kind in ("moments", "cross", "fisher"):
            torch.testing.assert_close(
                getattr(tokens, kind), getattr(maps, kind), rtol=1e-5, atol=1e-5
            )
        assert float(tokens.fisher.abs().max()) > 1e-3


class UnderAutocast(Two):
    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(x)


def test_sums_of_rows_are_not_rounded_by_a_models_autocast():
    model, data = UnderAutocast().eval(), images(30, 200)
    seen = see_full(model, {"conv": model.conv}, data, positions=100, seed=0)["conv"]
    x = torch.cat([batch for batch, _ in data])
    read = torch.nn.functional.unfold(x, 3).transpose(1, 2).flatten(0, 1)
    rows = torch.cat([read, torch.ones(len(read), 1)], 1).double()
    torch.testing.assert_close(seen.moments, rows.T @ rows, rtol=1e-5, atol=1e-2)
    made = torch.cat(seen.made).double()
    torch.testing.assert_close(seen.cross, made.T @ rows, rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize("layer", ["conv", "head"])
def test_layers_that_run_for_parts_of_a_batch_are_refused(layer):
    class InParts(Two):
        def forward(self, x):
            return torch.cat([super(InParts, self).forward(part) for part in x.split(4)])

    model = InParts().eval()
    modules: dict[str, Weighted] = {layer: weighted(model, layer)}
    see_full(model, modules, images(4, 3), 4, 0)
    with pytest.raises(ValueError, match=rf"'{layer}' was reached 3 times .* of 9 images"):
        see_full(model, modules, images(4, 9), 4, 0)


class WithoutGradients(Two):
    """A frozen part, and a head."""

    def forward(self, x):
        with torch.no_grad():
            features = self.act(self.conv(x)).mean((2, 3))
        return self.head(features)


class Checkpointed(Two):
    """The same part, run again in the backward pass."""

    reentrant = True

    def forward(self, x):
        def part(x):
            return self.act(self.conv(x)).mean((2, 3))

        return self.head(checkpoint(part, x, use_reentrant=self.reentrant))


@pytest.mark.parametrize("kind", [WithoutGradients, Checkpointed])
def test_layers_that_run_without_gradients_are_named(kind):
    model = kind().eval()
    with pytest.raises(ValueError, match=r"'conv' under torch.no_grad.* use_reentrant=False"):
        see_full(model, {"conv": model.conv, "head": model.head}, images(3), 4, 0)


def test_layers_that_run_again_for_gradients_are_seen_once():
    data, found = images(3, 2), []
    model, plain = Checkpointed().eval(), Two().eval()
    model.reentrant = False
    for one in (plain, model):
        modules: dict[str, Weighted] = {"conv": one.conv, "head": one.head}
        found.append(see_full(one, modules, data, 4, 0))
    for name, expected in found[0].items():
        seen = found[1][name]
        assert (seen.rows, seen.linear) == (expected.rows, expected.linear)
        for part in ("moments", "cross", "fisher", "made"):
            torch.testing.assert_close(getattr(seen, part), getattr(expected, part))


@pytest.mark.parametrize("where", ["image", "features"])
def test_layers_behind_a_part_without_gradients_are_seen(where):
    """Images that are made without gradients, and features that end them."""

    class Detached(Two):
        def forward(self, x):
            x = x.detach() if where == "image" else x
            maps = self.act(self.conv(x))
            return self.head((maps.detach() if where == "features" else maps).mean((2, 3)))

    model, plain, data = Detached().eval(), Two().eval(), images(3)
    expected = see_full(plain, {"conv": plain.conv, "head": plain.head}, data, 100, 0)
    seen = see_full(model, {"conv": model.conv, "head": model.head}, data, 100, 0)
    assert torch.equal(seen["head"].fisher, expected["head"].fisher)
    conv = expected["conv"].fisher * (where == "image")
    assert torch.equal(seen["conv"].fisher, conv)


def test_a_layer_with_a_forward_of_its_own_is_not_linear():
    class Squares(nn.Conv2d):
        def forward(self, input):
            return super().forward(input).square()

    class Pads(nn.Conv2d):
        def forward(self, input):
            return super().forward(nn.functional.pad(input, (1, 1, 1, 1)))

    for kind in (Squares, Pads):
        model, data = Two().eval(), images(3)
        model.conv = kind(2, 4, 3)
        seen = see_full(model, {"conv": model.conv, "head": model.head}, data, 4, 0)
        assert [seen[name].linear for name in ("conv", "head")] == [False, True]


def test_a_later_pass_sees_changed_inputs_beside_the_outputs_before():
    model, data = Two().eval(), images(3, 2)
    before = see_full(model, {"head": model.head}, data, 4, 0)["head"]
    with torch.no_grad():
        model.conv.weight[1] = 0
        model.head.weight.mul_(-7)
    runs = ResumedRuns(model, ["conv", "head"], 2)
    ran = []
    handle = model.head.register_forward_hook(lambda *_: ran.append(1))
    seen = see_again(runs, {"head": model.head}, data, {"head": before.made}, 4, 0)["head"]
    handle.remove()
    x = torch.cat([batch for batch, _ in data])
    features = model.conv(x).relu().mean((2, 3)).detach()
    rows = torch.cat([features, torch.ones(5, 1)], 1)
    assert torch.allclose(seen.moments.float(), rows.T @ rows, atol=1e-5)
    assert torch.allclose(seen.cross.float(), torch.cat(before.made).T @ rows, atol=1e-4)
    assert (seen.rows, seen.made, len(ran)) == (5, [], 2)


def test_positions_are_those_of_the_pass_before():
    """The same seed and batch draw the same positions, or inputs would be beside other outputs."""
    model, data = Two().eval(), images(3, 2)
    before = see_full(model, {"conv": model.conv}, data, 2, 5)["conv"]
    runs = ResumedRuns(model, ["conv", "head"], 2)
    again = see_again(runs, {"conv": model.conv}, data, {"conv": before.made}, 2, 5)["conv"]
    assert torch.equal(again.moments, before.moments)
    assert torch.equal(again.cross, before.cross)
