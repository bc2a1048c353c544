"""Counting the bytes that a step moves."""

import torch

from bench import traffic
from bench.traffic import Traffic
from tests import tiny_flux


def test_what_is_read_and_written_counts_and_large_products_and_views_do_not() -> None:
    a, b = (torch.empty(100, 100, dtype=torch.bfloat16, device="meta") for _ in range(2))
    with Traffic() as counted:
        a @ b
        _ = a.T, a.view(-1), a[:10]
    assert counted.moved.total() == 0
    assert counted.kernels == 1
    with Traffic() as counted:
        _ = a * b, a.float()
    assert counted.moved == {"mul": 3 * 20_000, "_to_copy": 20_000 + 40_000}
    with Traffic() as counted:
        thin = a @ b[:, :16]  # (100, 16)
        a.addmm_(thin, thin.T)
    assert counted.moved["mm"] == 20_000 + 2 * 3_200
    assert counted.moved["addmm_"] == 2 * 20_000 + 2 * 3_200


def test_on_any_shapes_the_projects_adapter_moves_the_least_and_one_in_float32_the_most() -> None:
    config = {**tiny_flux.CONFIG, "attention_head_dim": 64, "num_attention_heads": 4, "axes_dims_rope": (16, 24, 24)}
    moved = [traffic.of_a_step(config, 512, 64, attach).moved for attach in traffic.WAYS.values()]
    ours, peft, wide = (counter.total() for counter in moved)
    assert 0 < ours < 0.95 * peft < 0.7 * wide
    assert not any("scaled_dot_product" in name or "softmax" in name for counter in moved for name in counter)
