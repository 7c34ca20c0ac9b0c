"""The values that the measurement stands on: sizes of models, limits, residents, points.

Goal: the limit is the physical one and the models are as large as the real ones.
Method: numbers from the models' papers and by hand.
"""

from __future__ import annotations

import bench_path
import pytest

bench_path.put_on_path()

from bench.cells import Bed, Limit, Point, even_residents  # noqa: E402
from bench.engines.original import residents  # noqa: E402
from bench.limits import check_copiers, tokens_for  # noqa: E402
from bench.optimum import optimum_s  # noqa: E402
from bench.stacks import CastLinear, Workload, weight_bytes  # noqa: E402


@pytest.mark.parametrize(
    ("shape", "gigabytes", "blocks", "first", "last"),
    [
        ("flux", 23.67, 57, 679.7e6, 283.2e6),
        ("wan", 28.11, 40, 702.8e6, 702.8e6),
        ("qwen", 40.78, 60, 679.7e6, 679.7e6),
        ("hunyuan", 24.92, 60, 679.7e6, 283.2e6),
    ],
)
def test_the_stacks_are_as_large_as_the_real_models(
    shape: str, gigabytes: float, blocks: int, first: float, last: float
) -> None:
    stack = Workload(shape).build()
    assert weight_bytes(stack) == pytest.approx(1e9 * gigabytes, rel=1e-3)
    assert len(stack.order) == blocks
    assert weight_bytes(stack.order[0]) == pytest.approx(first, rel=1e-3)
    assert weight_bytes(stack.order[-1]) == pytest.approx(last, rel=1e-3)


@pytest.mark.parametrize("shape", ["flux", "wan"])
def test_fp8_halves_the_weights_of_the_linear_layers(shape: str) -> None:
    plain, cast = (Workload(shape, dtype).build() for dtype in ("bf16", "fp8"))
    assert weight_bytes(cast) == pytest.approx(weight_bytes(plain) / 2, rel=2e-3)
    assert any(isinstance(module, CastLinear) for module in cast.blocks.modules())


def test_no_name_ends_in_a_digit_but_those_of_blocks() -> None:
    for shape in ("flux", "wan"):
        for name, _ in Workload(shape, scale=1 / 12).build().order[0].named_modules():
            assert not any(part[-1:].isdigit() for part in name.split(".")), name


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"shape": "unet"}, "shape needs one of"),
        ({"shape": "flux", "dtype": "int8"}, "dtype needs"),
        ({"shape": "flux", "scale": 0.0}, "scale and depth need"),
        ({"shape": "flux", "depth": 1.5}, "scale and depth need"),
    ],
)
def test_a_wrong_workload_is_refused(fields: dict, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Workload(**fields)


def limit(compute_s: float, budget: int = 25, weights: int = 100, rate: float = 100.0) -> Limit:
    return Limit(weights, budget, compute_s, rate, blocks=10)


def test_the_limit_is_compute_or_the_bytes_that_do_not_fit() -> None:
    assert limit(0.5).seconds == pytest.approx(0.75)
    assert limit(0.5).ratio == pytest.approx(1.5)
    assert limit(3.0).seconds == 3.0
    assert limit(3.0, budget=200).copy_s == 0.0


def test_regimes() -> None:
    assert limit(1.0).regime == "compute"
    assert limit(0.75).regime == "balance"
    assert limit(0.5).regime == "copy"


def test_no_policy_reaches_the_limit_where_copies_decide() -> None:
    # (N E/B + C) / (N - 1), of equal blocks
    assert limit(0.5).optimum_s == pytest.approx((10 * 0.75 + 0.5) / 9)
    assert limit(3.0).optimum_s == 3.0
    assert limit(3.0, budget=200).optimum_s == 3.0


def test_even_residents_leave_room_for_the_slots() -> None:
    sizes = [10] * 10
    for room in range(20, 101):
        chosen = even_residents(sizes, room, 2)
        streamed = len(sizes) - len(chosen)
        assert 10 * (len(chosen) + min(2, streamed)) <= room
    assert even_residents(sizes, 100, 2) == set(range(10))
    assert even_residents(sizes, 45, 2) == {2, 7}


def test_slots_that_do_not_fit_are_refused_with_both_sizes() -> None:
    with pytest.raises(ValueError, match="2 slots need 20 bytes, found a budget of 19 bytes"):
        even_residents([10] * 10, 19, 2)


def test_the_original_keeps_the_biggest_first_and_stops_at_the_first_that_does_not_fit() -> None:
    sizes = [5, 20, 20, 20, 5, 5]
    # 1.1 * 20 * 2 = 44 go off for the swapped blocks; then 20, 20, and 6 are no room for the third.
    assert residents(sizes, 90, 1) == {1, 2}
    assert residents(sizes, 60, 1) == set()


def test_points_and_beds_have_names_of_their_own() -> None:
    assert Point(512).key == "512"
    assert Point(3, 0.001).key == "3/1000us"
    workload = Workload("wan", "fp8", 0.5)
    assert Bed(workload, 1).key == "wan-fp8-x0.5+1"
    assert Bed.from_json(Bed(workload, 1).to_json()) == Bed(workload, 1)


def test_tokens_are_found_for_a_time() -> None:
    def seconds(tokens: int) -> float:
        return 0.01 + 2e-5 * tokens + 1e-9 * tokens**2

    probes = [(tokens, seconds(tokens)) for tokens in (1024, 4096, 12288)]
    for wanted in (2048, 8192, 20480):
        assert tokens_for(seconds(wanted), probes, 528) == wanted
    assert tokens_for(0.0, probes, 528) == 528


def test_the_optimum_of_equal_blocks_is_the_closed_form() -> None:
    stack = Workload("wan", scale=1 / 40, depth=0.5).build()
    total = weight_bytes(stack)
    ends = weight_bytes(stack.inp) + weight_bytes(stack.out)
    count, budget = len(stack.order), total // 4
    for compute_s in (0.1, 1.0, 20.0):
        equal = Limit(total - ends, budget - ends, compute_s, total / 4.0, count)
        found = optimum_s(stack, budget, total / 4.0, [1.0] * count, compute_s)
        assert found == pytest.approx(equal.optimum_s, rel=1e-6)
    assert optimum_s(stack, total, total / 4.0, [1.0] * count, 2.0) == 2.0


def test_other_copies_that_take_nothing_are_refused() -> None:
    check_copiers(0, 55e9, 55e9)
    check_copiers(1, 55e9, 30e9)
    with pytest.raises(ValueError, match=r"less than 80% of the link, found 54.6 of 55.0 GB/s"):
        check_copiers(1, 55e9, 54.6e9)


def test_a_bed_says_what_else_is_on_its_link() -> None:
    beds = [Bed(Workload("flux"), count) for count in (0, 1, 4)]
    assert [bed.key for bed in beds] == ["flux-bf16", "flux-bf16+1", "flux-bf16+4"]
    assert [bed.title().partition(", ")[2] for bed in beds] == [
        "",
        "beside a process that copies",
        "beside 4 processes that copy",
    ]
    assert [Bed.from_json(bed.to_json()) for bed in beds] == beds
