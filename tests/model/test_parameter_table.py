"""The parameters and the layer plan of the released models, printed: a change of either shows as a diff.

python tests/model/test_parameter_table.py     writes the files anew
"""

import sys
from pathlib import Path

import numpy as np
import pytest

from v4jax.config import ModelConfig, layer_plan, plan_segments
from v4jax.dtypes import DTypePolicy
from v4jax.model.tensors import named_variables
from v4jax.model.transformer import Transformer

DATA = Path(__file__).resolve().parent.parent / "data"
PRESETS = {"flash": ModelConfig.flash, "pro": ModelConfig.pro}


def plan_lines(config: ModelConfig) -> list[str]:
    lines = []
    for segment in plan_segments(layer_plan(config)):
        unit = " · ".join(f"({spec.attention.name}, {spec.router.name}, {spec.ratio})" for spec in segment.unit)
        lines.append(f"{unit} x {segment.repeats}")
    return lines


def parameter_lines(config: ModelConfig) -> list[str]:
    model = Transformer(config, DTypePolicy.named("bfloat16"))
    rows = []
    for name, variable in named_variables(model).items():
        value, metadata = variable.get_value(), variable.get_metadata()
        axes = ", ".join(str(axis) for axis in metadata["axes"])
        kind, role = type(variable).__name__, metadata["role"]
        rows.append(f"{name}  {list(value.shape)}  {np.dtype(value.dtype).name}  ({axes})  {role}  {kind}")
    return sorted(rows)


def table(preset: str) -> str:
    config = PRESETS[preset]()
    return "\n".join([*plan_lines(config), "", *parameter_lines(config)]) + "\n"


@pytest.mark.parametrize("preset", PRESETS)
def test_parameters_and_plan_are_those_on_file(preset: str) -> None:
    assert table(preset).splitlines() == (DATA / f"parameters_{preset}.txt").read_text().splitlines()


if __name__ == "__main__":
    DATA.mkdir(exist_ok=True)
    for preset in PRESETS:
        (DATA / f"parameters_{preset}.txt").write_text(table(preset))
    sys.exit()
