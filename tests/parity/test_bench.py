"""`bench model` on a small model: both sides compute the same, and every figure is there."""

import pytest

pytest.importorskip("transformers")

from v4jax.bench import bench_model
from v4jax.config import ModelConfig
from v4jax.cost import Workload

pytestmark = pytest.mark.parity

WORKLOADS = (Workload("prefill", 1, 64), Workload("decode", 2, 64, steps=2), Workload("train", 2, 32))


def test_both_sides_run_the_same_model():
    report = bench_model(
        ModelConfig.tiny().without_mtp(), WORKLOADS, against="transformers", repetitions=1, products=True
    )
    assert report["peer_logit_difference"] < 2e-4
    assert [row["what"] for row in report["rows"]] == [work.name for work in WORKLOADS]
    for row in report["rows"]:
        assert min(row["ours"], row["peer"], row["share_of_limit"], row["products_alone"]) > 0
        assert row["ratio"] == pytest.approx(row["ours"] / row["peer"])
    assert min(report["limits"].values()) > 0
