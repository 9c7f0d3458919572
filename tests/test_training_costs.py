"""What a sweep takes: the groups that fit a device, and bytes on disk as they come out."""

from dataclasses import replace

import pytest

from difflex.training.study import SweepConfig, sweep_cost

PAPER = SweepConfig(preset="paper", size=(16_384, 32_768, 65_536), k=(32, 48, 64), batch=4096, live=True)


def test_the_nine_saes_of_the_paper_fit_a_gpu_in_as_few_groups_as_possible():
    cost = sweep_cost(PAPER, [3072], device="cuda")
    assert 29 < cost.device / 1e9 < 34 and 7 < cost.least / 1e9 < 8
    for free, count in ((80, 1), (20, 2), (12, 3)):
        groups = cost.groups(free * 10**9)
        assert groups is not None and len(groups) == count
        assert sorted(index for group in groups for index in group) == list(range(9))
        assert all(sum(cost.states[index] for index in group) + cost.working <= free * 10**9 for group in groups)
    assert cost.groups(7 * 10**9) is None


def test_a_live_sweep_at_four_sites_takes_little_disk():
    middle = sweep_cost(replace(PAPER, weights="bf16"), [3072])
    others = sweep_cost(replace(PAPER, weights="bf16", size=(65_536,), k=(64,)), [3072] * 3)
    dictionaries = middle.dictionaries + others.dictionaries
    assert 6 < dictionaries / 1e9 < 8
    assert dictionaries + middle.checkpoints + others.checkpoints < 20e9
    assert sweep_cost(replace(PAPER, weights="fp32"), [3072]).dictionaries == pytest.approx(2 * middle.dictionaries, rel=0.05)


def test_windows_are_in_the_memory_of_the_cpu_twice():
    without = sweep_cost(replace(PAPER, live=False, checkpoints="compact"), [3072])
    assert sweep_cost(PAPER, [3072]).host - without.host == 2 * 65_536 * 3072 * 2
    assert without.checkpoints == sweep_cost(PAPER, [3072]).checkpoints
