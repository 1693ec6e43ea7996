"""The kernels of models optimized for inference: each multiplies as by hand, and the choice is measured."""

import pytest
import torch
from model_fixtures import relative_error
from torch.nn import Linear

from scratch_gpt2 import cpu_kernels
from scratch_gpt2.cpu_inference import lay_out
from scratch_gpt2.cpu_kernels import GROUP, Int4Product, Int8Product, Product, Stored, fastest, missing_operator

ONE_ROW = {"by rows": ("by rows", 20.0), "by columns": ("by columns", 20.0), "oneDNN": ("oneDNN", 20.0)}
SEVERAL_ROWS = {"plain": ("plain", 10.0), "oneDNN": ("oneDNN", 10.0)}


def choose_always(monkeypatch, one: str, few: str) -> None:
    monkeypatch.setattr(cpu_kernels, "choose", lambda *_: (ONE_ROW[one], SEVERAL_ROWS[few]))


@pytest.mark.parametrize(
    "vnni, largest, expected", [(False, 127, [-58.25, 16091.25]), (True, 255, [-186.25, 32347.25])]
)
def test_int8_multiplies_as_by_hand(monkeypatch, vnni, largest, expected):
    """Scales 0.5 and 1 make the weights whole numbers; the input's 127 or 255 steps are whole numbers too."""
    monkeypatch.setattr(cpu_kernels, "cpu_adds_int8_exactly", lambda: vnni)
    weight, bias = torch.zeros(24, 24), torch.full((24,), 0.25)
    weight[0, :3] = torch.tensor([63.5, -1.0, 0.5])
    weight[1, :3] = torch.tensor([2.0, 127.0, -4.0])
    product = Int8Product(weight, bias)
    inputs = torch.zeros(1, 24)
    inputs[0, :3] = torch.tensor([1.0, largest, 10.0])
    # 63.5 - largest + 5 + 0.25 and 2 + 127 * largest - 40 + 0.25
    assert product(inputs)[0, :3].tolist() == pytest.approx([*expected, 0.25], abs=1e-3)
    both = product(torch.cat([inputs, inputs / 1000]))
    thousandth = [(value - 0.25) / 1000 + 0.25 for value in expected]
    assert both[1, :3].tolist() == pytest.approx([*thousandth, 0.25], abs=1e-3)


@torch.no_grad()
def test_int4_multiplies_as_by_hand():
    """From -8 to 7, and from -3 to 0.75, both in 15 steps: all weights are kept exactly."""
    weight = torch.zeros(2, GROUP + 1)  # one input more than a group, and 14 outputs fewer than the operator packs
    weight[0, :16], weight[1, :16] = torch.arange(-8.0, 8.0), torch.arange(-3.0, 1.0, 0.25)
    weight[1, GROUP] = 2.5
    product = Int4Product(weight, torch.tensor([0.5, 0.25]))
    inputs = torch.zeros(1, GROUP + 1)
    inputs[0, [0, 2, 15, GROUP]] = torch.tensor([1.0, 10.0, 4.0, 2.0])
    # -8 - 60 + 28 + 0.5 and -3 - 25 + 3 + 5 + 0.25
    assert product(inputs).tolist() == [[-39.5, -19.75]]
    assert product(inputs.expand(3, 2, -1)).tolist() == [[[-39.5, -19.75]] * 2] * 3


@torch.no_grad()
def test_int4_rounds_each_weight_to_the_nearest_of_its_group():
    """A column of the identity selects a weight; bfloat16 rounds it, its scale and its offset by up to 1/256."""
    weight = torch.randn(20, 2 * GROUP, generator=torch.Generator().manual_seed(0))
    weight[3] *= 100
    kept = Int4Product(weight, None)(torch.eye(2 * GROUP)).t()
    for row, kept_row in zip(weight.split(GROUP, dim=1), kept.split(GROUP, dim=1), strict=True):
        span = row.amax(1, keepdim=True) - row.amin(1, keepdim=True)
        error = (kept_row - row).abs() / span
        assert (error <= 1 / 30 + 1 / 64).all() and error.mean() > 1 / 100
        assert all(len(set(values.tolist())) <= 16 for values in kept_row)


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 3, 70])
def test_int4_multiplies_the_weights_that_it_keeps(rows):
    generator = torch.Generator().manual_seed(0)
    product = Int4Product(torch.randn(40, 96, generator=generator), torch.ones(40))
    inputs = torch.randn(rows, 96, generator=generator).bfloat16().float()
    kept = product(torch.eye(96)).t() - 1
    assert relative_error(product(inputs), inputs @ kept.t() + 1) < 0.01


def test_a_missing_operator_is_found(monkeypatch):
    assert all(missing_operator(weights) is None for weights in cpu_kernels.PRODUCTS)
    monkeypatch.setitem(cpu_kernels.OPERATORS, "int4", ["aten.mm", "aten.mm_of_the_future"])
    assert missing_operator("int4") == "aten.mm_of_the_future"


@pytest.mark.parametrize("one", ONE_ROW)
@pytest.mark.parametrize("few", SEVERAL_ROWS)
@torch.no_grad()
def test_every_kernel_multiplies_as_by_hand(monkeypatch, one, few):
    choose_always(monkeypatch, one, few)
    weight = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    product = Product(weight.t().contiguous().t() if one == "by columns" else weight, torch.tensor([0.5, 0.0, 0.0]))
    assert product(torch.tensor([[[1.0, 10.0]]])).tolist() == [[[21.5, 43, 65]]]
    assert product(torch.tensor([[1.0, 10.0], [0, 1.0]])).tolist() == [[21.5, 43, 65], [2.5, 4, 6]]
    assert product.report() == [f"{one} at 20.0 GB/s", f"{few} at 10.0 GB/s"]


def test_a_copy_must_be_worth_its_memory():
    assert fastest({"by rows": 10.0, "by columns": 9.0, "oneDNN": 10.9}) == "by rows"
    assert fastest({"by rows": 10.0, "by columns": 11.0, "oneDNN": 12.2}) == "oneDNN"


def test_the_choice_is_measured_once(monkeypatch):
    monkeypatch.setattr(cpu_kernels, "MEASURED_BYTES", 4 * 24 * 8 * 2)
    cpu_kernels.choose.cache_clear()
    (one, speed), (few, _) = cpu_kernels.choose((8, 24), torch.float32, 1)
    assert one in ONE_ROW and few in SEVERAL_ROWS and 0 < speed < 1000
    monkeypatch.setattr(cpu_kernels, "gb_per_second", None)
    assert cpu_kernels.choose((8, 24), torch.float32, 1)[0] == (one, speed)
    cpu_kernels.choose.cache_clear()


@pytest.fixture
def two_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    "weight, n_parts, cuts_sum",
    [
        ([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], 2, True),  # three outputs cannot be halved, the sum of two can
        ([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], 2, False),
        ([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]], 1, True),
    ],
)
@pytest.mark.parametrize("with_bias", [True, False])
@torch.no_grad()
def test_one_row_in_parts_is_the_whole_product(two_threads, weight, n_parts, cuts_sum, with_bias):
    layer = Linear(len(weight[0]), len(weight), bias=with_bias)
    layer.weight.data = torch.tensor(weight)
    if with_bias:
        layer.bias.data = torch.arange(len(weight)) + 0.5
    row = torch.tensor([[[1.0, 10.0, 100.0][: len(weight[0])]]])
    product = Stored(lay_out([layer], by_columns=cuts_sum), layer.bias)
    assert (product.n_parts, product.splits_sum) == (n_parts, cuts_sum)
    expected = [sum(w * x for w, x in zip(line, row[0, 0].tolist(), strict=True)) for line in weight]
    assert product(row).tolist() == [[[value + with_bias * (i + 0.5) for i, value in enumerate(expected)]]]


def test_int8_rows_do_not_disturb_each_other():
    generator = torch.Generator().manual_seed(0)
    product = Int8Product(torch.randn(24, 24, generator=generator), None)
    rows = torch.randn(2, 24, generator=generator)
    rows[0] *= 1000
    assert relative_error(product(rows)[1:], product(rows[1:])) < 0.02
