import json
import re
import subprocess

import pytest

from v4jax.cli import main
from v4jax.plan import sweep, verb
from v4jax.plan.compile import Compiled, Failure, compile_request
from v4jax.plan.costs import Costs
from v4jax.plan.report import make_plan, to_json
from v4jax.plan.verb import Options, read_request

KEYS = {
    *("model", "step", "topology", "mesh", "weights", "context", "batch", "fits", "peak_bytes_per_device"),
    *("hbm_limit_bytes", "weight_bytes_per_device", "optimizer_bytes_per_device", "cache_bytes_per_device"),
    *("temp_bytes_per_device", "model_flops", "compiled_flops", "hbm_bytes_per_step", "collective_bytes"),
    *("bound_seconds", "tokens_per_second_bound", "compile_seconds", "host_peak_bytes", "implementations", "versions"),
}
"""What the object of --json has at least."""


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--topology", "v6e:5x5"], "v6e:5x5.*v6e:4x4"),
        (["--topology", "v6e:2x2", "--mesh", "expert=2"], "2 devices.*has 4"),
        (["--topology", "v6e:2x2", "--mesh", "tensor=4"], "tensor=4 does not divide o_groups=2"),
        (["--topology", "v6e:2x2", "--context", "9999"], "context is 4096 tokens; give a smaller --context"),
        (["--topology", "v6e:2x2", "--json", "/"], "--json: cannot write /: it is a directory"),
        (["--topology", "v6e:2x2", "--plot", "a.png"], "--plot: .*add --sweep"),
        (["--topology", "v6e:2x2", "--sweep", "--plot", "a.doc"], r"--plot: got a.doc, need .*\.pdf.*\.png"),
        (["--topology", "v6e:2x2", "--sweep", "--plot", "plot"], "--plot: got plot, need a name ending in"),
        (["--topology", "v6e:2x2", "--sweep", "--plot", "/nowhere/a.png"], "--plot: cannot write .*no such directory"),
        (["--topology", "v6e:2x2", "--sweep", "--implementation", "topk=xla"], "--implementation: got 'topk=xla'"),
        (["--topology", "v6e:2x2", "--batch", "0"], "--batch.*at least 1"),
    ],
)
def test_bad_input_is_one_clear_message(flags, message, capfd):
    defaults = [] if "--context" in flags else ["--context", "1024"]
    assert main(["plan", "tiny", "--step", "decode", "--weights", "bf16", *defaults, *flags]) in (1, 2)
    out, error = capfd.readouterr()
    assert re.search(message, error)
    assert "Traceback" not in error
    assert not out


@pytest.mark.parametrize(("model", "context"), [("tiny", 4096), ("flash", 8192)])
def test_the_context_is_8192_or_the_model_s_where_that_is_less(model, context):
    assert request(model=model, context=None).context == context


def test_a_model_below_all_contexts_is_swept_at_its_own_and_plotted(tmp_path, capfd):
    picture = tmp_path / "sweep.svg"
    flags = ["--topology", "v6e:2x2", "--step", "decode", "--sweep", "--weights", "bf16", "--plot", str(picture)]
    assert main(["plan", "tiny", *flags]) == 0
    assert len(re.findall(r"^\s*4,096\s", capfd.readouterr().out, re.MULTILINE)) == len(sweep.BATCHES)
    assert "<svg" in picture.read_text()


@pytest.mark.slow
def test_a_sweep_has_a_row_for_every_context_and_batch(tmp_path, capfd):
    file = tmp_path / "sweep.json"
    flags = ["--topology", "v6e:2x2", "--step", "decode", "--sweep", "--weights", "bf16", "--json", str(file)]
    assert main(["plan", "bench", *flags]) == 0
    facts = json.loads(file.read_text())
    contexts = [row["context"] for row in facts["rows"]]
    assert contexts == sorted(contexts)
    assert {row["batch"] for row in facts["rows"]} == {1, 8, 64, 256}
    speeds = {(row["context"], row["batch"]): row["tokens_per_second_per_chip_bound"] for row in facts["rows"]}
    assert speeds[8192, 64] > speeds[8192, 8] > speeds[8192, 1]
    assert speeds[8192, 64] > speeds[131072, 64]
    assert "tokens/s/chip" in capfd.readouterr().out


def request(**changes):
    fields = dict(model="tiny", topology="v6e:2x2", step="decode", context=1024, batch=8, weights="bf16")
    return read_request(Options(**fields | {"mesh": "expert=2,tensor=2"} | changes))


def test_a_compiler_that_aborts_is_reported(monkeypatch):
    monkeypatch.setattr(
        subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, -6, "", "F1124 check failed: tiling\n")
    )
    made = compile_request(request())
    assert isinstance(made, Failure)
    assert made.kind == "abort"
    assert "check failed: tiling" in made.message
    facts = to_json(make_plan("tiny", request(), made))
    assert set(facts) >= KEYS
    assert facts["fits"] is False
    assert facts["compiled_flops"] is None


def program(flops, peak):
    costs = Costs(flops=flops, unit_flops=flops, hbm_bytes=1e6)
    costs.collectives["all-reduce", "tensor"] = 1e3
    sizes = dict.fromkeys(("weight_bytes", "optimizer_bytes", "cache_bytes", "argument_bytes"), 1000)
    sizes |= dict.fromkeys(("output_bytes", "aliased_bytes", "temp_bytes", "host_peak_bytes", "hlo_lines"), 1000)
    return Compiled(
        **sizes, peak_bytes=peak, costs=costs, trace_seconds=1.0, compile_seconds=2.0, implementations={"op": "xla"},
        versions={},
    )  # fmt: skip


def test_the_fastest_of_the_compiled_meshes_that_fit_is_chosen(monkeypatch, tmp_path, capsys):
    outcomes = [
        Failure("abort", "gone"), program(1e9, 1 << 40), program(9e9, 1 << 30), program(5e9, 1 << 30),
        program(7e9, 1 << 30),
    ]  # fmt: skip
    tried = []

    def pretend(request, **_):
        tried.append(request.mesh)
        return outcomes[len(tried) - 1]

    monkeypatch.setattr(verb, "compile_request", pretend)
    flags = ["--topology", "v6e:2x4", "--step", "decode", "--weights", "bf16", "--batch", "8", "--context", "1024"]
    file = tmp_path / "plan.json"
    assert main(["plan", "tiny", *flags, "--compiled", "5", "--json", str(file)]) == 0
    facts = json.loads(file.read_text())
    assert facts["mesh"] == {axis: size for axis, size in tried[3].items() if size > 1}
    assert facts["fits"]
    assert set(facts) >= KEYS
    # The bound is that of products here, and a whole program is what all devices do.
    assert facts["compiled_flops"] == 8 * 5e9
    assert facts["bound_seconds"]["compute"] == pytest.approx(5e9 / 918e12)
    assert facts["tokens_per_second_bound"] == pytest.approx(8 / max(facts["bound_seconds"].values()))
    assert facts["collective_bytes"] == {"all-reduce": 8e3}
    out = capsys.readouterr().out
    assert "does not compile: abort" in out
    assert "fits: False" in out


def test_where_a_step_does_not_fit_the_smallest_slice_that_holds_it_is_shown(monkeypatch, tmp_path, capsys):
    tried = []

    def pretend(request, **_):  # fits from 32 chips on
        tried.append(request.topology.name)
        return Failure("memory", "too much") if request.topology.chips < 32 else program(1e9, 1 << 30)

    monkeypatch.setattr(verb, "compile_request", pretend)
    flags = ["--topology", "v6e:2x4", "--step", "decode", "--weights", "bf16", "--batch", "64", "--context", "1024"]
    file = tmp_path / "plan.json"
    assert main(["plan", "tiny", *flags, "--compiled", "1", "--json", str(file)]) == 0
    facts = json.loads(file.read_text())
    assert tried == ["v6e:2x4", "v6e:4x4", "v6e:4x8"]
    assert not facts["fits"]
    assert facts["smallest_fitting"]["topology"] == "v6e:4x8"
    assert facts["smallest_fitting"]["fits"]
    assert "smallest slice that fits" in capsys.readouterr().out
    # A mesh of one's own, or a compiler that aborts, is no question of size.
    monkeypatch.setattr(verb, "compile_request", lambda request, **_: Failure("abort", "gone"))
    assert main(["plan", "tiny", *flags, "--compiled", "1", "--json", str(file)]) == 0
    assert json.loads(file.read_text())["smallest_fitting"] is None


@pytest.mark.tpu_compile
@pytest.mark.parametrize(
    ("topology", "step", "mesh"),
    [
        ("v5e:2x2", "decode", "expert=2,tensor=2"),
        ("v5p:2x2x1", "train", "fsdp=2,expert=2"),
        ("v6e:2x2", "prefill", "sequence=2,expert=2"),
        ("tpu7x:2x2x1", "decode", "data=2,expert=2,tensor=2"),
    ],
)
def test_a_tiny_step_compiles_for_every_chip(topology, step, mesh):
    pytest.importorskip("libtpu")
    asked = request(topology=topology, step=step, mesh=mesh)
    made = compile_request(asked, cpu_seconds=300)
    assert isinstance(made, Compiled), made
    facts = to_json(make_plan("tiny", asked, made))
    assert set(facts) >= KEYS
    assert facts["fits"]
    assert made.weight_bytes == facts["weight_bytes_per_device"]
    assert made.optimizer_bytes == pytest.approx(facts["optimizer_bytes_per_device"], abs=64)
    assert made.cache_bytes == facts["cache_bytes_per_device"]
    assert made.argument_bytes >= made.weight_bytes + made.optimizer_bytes + made.cache_bytes
    assert facts["compiled_flops"] > 0.9 * facts["model_flops"]
    assert all("unknown" not in loop for loop in facts["data_dependent_loops"])
    assert facts["host_peak_bytes"] < 12 << 30
    if step != "train":
        assert made.aliased_bytes >= made.cache_bytes, "the cache is updated in place"
    assert made.costs.collectives
