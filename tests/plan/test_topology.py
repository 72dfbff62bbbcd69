import pytest

from v4jax.errors import UserError
from v4jax.plan.topology import CHIPS, GIB, parse_topology, standard_topologies


@pytest.mark.parametrize(
    ("text", "chips", "devices"),
    [
        ("v5e:2x2", 4, 4), ("v6e:8x8", 64, 64), ("v6e:16x16", 256, 256), ("v5p:2x2x1", 4, 4),
        ("v5p:8x16x16", 2048, 2048),
        ("v5p:16x16x24", 6144, 6144), ("tpu7x:2x2x1", 4, 8), ("tpu7x:8x8x8", 512, 1024), ("tpu7x:4x4x12", 192, 384),
    ],
)  # fmt: skip
def test_slices_that_exist_are_read(text, chips, devices):
    topology = parse_topology(text)
    assert (topology.name, topology.chips, topology.devices) == (text, chips, devices)


@pytest.mark.parametrize(
    "text",
    [
        "v6e:32x32", "v6e:4x2", "v6e:4x4x4", "v5p:3x4x4", "v5p:8x4x4", "v5p:4x4", "v5p:2x2x8", "v5p:16x16x28", "tpu7x:",
        "v6e", "v6e:axb", "v6e:0x0",
    ],
)  # fmt: skip
def test_slices_that_do_not_exist_are_refused_with_the_ones_that_do(text):
    with pytest.raises(UserError, match="--topology") as error:
        parse_topology(text)
    chip = CHIPS[text.split(":")[0]]
    assert all(topology.name in str(error.value) for topology in standard_topologies(chip)) or ":" not in text


def test_unknown_chips_are_refused_with_the_known_ones():
    with pytest.raises(UserError, match=r"v7x.*v5e, v5p, v6e, tpu7x"):
        parse_topology("v7x:2x2x1")


def test_standard_slices_are_legal_and_ascending():
    for chip in CHIPS.values():
        found = standard_topologies(chip)
        assert [parse_topology(topology.name) for topology in found] == list(found)
        assert [topology.chips for topology in found] == sorted(topology.chips for topology in found)


def test_limits_are_those_the_compiler_names():
    limits = {name: chip.hbm_limit / GIB for name, chip in CHIPS.items()}
    assert limits == pytest.approx({"v5e": 15.75, "v5p": 95.74, "v6e": 31.25, "tpu7x": 94.75}, abs=1e-6)
