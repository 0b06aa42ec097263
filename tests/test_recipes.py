"""Every file of examples/recipes runs with stand-ins for its program, and the page shows these files."""

from __future__ import annotations

import argparse
import ast
import inspect
import re
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_fp32 import add_fp32_arguments, apply, check_fp32
from megatron_fp32.config import Fp32Config
from megatron_fp32.optimizer import native_fp32
from megatron_fp32.optimizer.native_fp32 import install_optimizer_repairs
from tests.recipe_stubs.common import BATCH, Modules, Run, as_modules
from tests.recipe_stubs.megatron import MegatronBridge, MegatronLM, get_model
from tests.recipe_stubs.rl import NemoRL, Slime, Verl

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "examples" / "recipes").glob("*.py"))

Load = Callable[..., dict[str, Any]]


@pytest.fixture
def optimizer_repairs() -> Iterator[None]:
    """Installed already, and taken back afterwards: recipes install them for the rest of the process."""
    with install_optimizer_repairs():
        yield


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Load:
    """`load(name, modules, flags)`: what a recipe defines, with these modules in place of its program."""

    def of(name: str, modules: Modules, flags: list[str] | None = None) -> dict[str, Any]:
        for module, stub in as_modules(modules).items():
            monkeypatch.setitem(sys.modules, module, stub)
        path = ROOT / "examples" / "recipes" / f"{name}.py"
        monkeypatch.setattr(sys, "argv", [str(path), *(flags or [])])
        return runpy.run_path(str(path), run_name=name)

    return of


def megatron_lm(load: Load, run: Run) -> None:
    run.flags = ["--fp32-logits-grad-precision", "bf16x2"]
    load("megatron_lm_fp32", MegatronLM(run).modules())["main"]()


def megatron_lm_0_18(load: Load, run: Run) -> None:
    run.flags = ["--fp32-logits-grad-precision", "bf16x2"]
    load("megatron_lm_0_18_fp32", MegatronLM(run).modules("0.18"))["main"]()


def megatron_lm_0_17(load: Load, run: Run) -> None:
    run.flags = ["--fp32-logits-grad-precision", "bf16x2"]
    load("megatron_lm_0_18_fp32", MegatronLM(run).modules("0.17"))["main"]()


def megatron_bridge(load: Load, run: Run) -> None:
    flags = ["--hf-dir", "qwen3_next", "--save", "run"]
    load("megatron_bridge_fp32", MegatronBridge(run).modules(), flags)["main"]()
    assert vars(run.checkpoint) == {"pretrained_checkpoint": "qwen3_next", "save": "run", "load": "run"}


def nemo_rl(load: Load, run: Run) -> None:
    names = load("nemo_rl_fp32_worker", NemoRL(run).modules())
    worker = names["Fp32PolicyWorker"]({}, tokenizer=None, worker_sharding_annotations=None)
    assert worker.train(data=None, loss_fn=None) == {"loss": 0.0}


def slime(load: Load, run: Run) -> None:
    program = Slime(run)
    names = load("slime_fp32", program.modules())
    program.train(names["model_provider"], names["check_before_step"])


def verl(load: Load, run: Run) -> None:
    program = Verl(run)
    load("verl_fp32", program.modules())
    engine = program.registry.get_engine_cls("language_model", "megatron")()
    engine.initialize()
    engine.trainer.backward([BATCH])
    engine.optimizer_step()


PROGRAMS = [megatron_lm, megatron_lm_0_18, megatron_lm_0_17, megatron_bridge, nemo_rl, slime, verl]


@pytest.mark.usefixtures("megatron", "optimizer_repairs")
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_a_recipe_trains_in_fp32(program: Callable[[Load, Run], None], load: Load) -> None:
    run = Run()
    program(load, run)
    assert run.steps > 0
    (trainer,) = run.trainers
    config = Fp32Config(grad_precision="bf16x2") if run.flags else Fp32Config()
    check_fp32(trainer.wrapped, config, optimizer=trainer.optimizer, after_forward=True)
    assert run.loaded_into
    assert set(run.loaded_into) == {torch.float32}, "weights arrived in a model that had not been changed"


@pytest.mark.usefixtures("megatron", "optimizer_repairs")
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_a_recipe_notices_a_program_that_rounds_behind_its_back(
    program: Callable[[Load, Run], None], load: Load
) -> None:
    run = Run(rounds_after_wrapping=True)
    with pytest.raises(RuntimeError, match=r"A_log is torch.bfloat16"):
        program(load, run)
    assert run.steps == 0


@pytest.mark.usefixtures("megatron")
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_a_recipe_installs_the_optimizer_repairs_before_the_optimizer(
    program: Callable[[Load, Run], None], load: Load, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    installed: list[Any] = []

    def install() -> Any:
        installed.append(install_optimizer_repairs())
        request.addfinalizer(installed[-1].undo)  # recipes install them for the rest of the process
        return installed[-1]

    for module in (apply, native_fp32):
        monkeypatch.setattr(module, "install_optimizer_repairs", install)
    run = Run()
    program(load, run)
    assert run.pending == [()]
    assert installed[0].installed, "this megatron-core needs no repair"


@pytest.mark.usefixtures("megatron", "optimizer_repairs")
def test_slimes_own_layers_keep_a_log(load: Load) -> None:
    run = Run()
    slime(load, run)
    layer = run.trainers[0].model.decoder.layers[1].linear_attn
    assert (layer.A_log.dtype, layer.dt_bias.dtype) == (torch.float32, torch.bfloat16)


@pytest.mark.usefixtures("megatron", "optimizer_repairs")
def test_nemo_rl_gets_its_get_model_back(load: Load) -> None:
    program = NemoRL(Run())
    names = load("nemo_rl_fp32_worker", program.modules())
    names["Fp32PolicyWorker"]({}, tokenizer=None, worker_sharding_annotations=None)
    assert program.setup.get_model is program.bridge.module.get_model is get_model


@pytest.mark.usefixtures("megatron", "optimizer_repairs")
def test_nemo_rl_refuses_a_sampler_that_it_cannot_change(load: Load) -> None:
    program = NemoRL(Run())
    program.colocated_reshard_plan = object()
    names = load("nemo_rl_fp32_worker", program.modules())
    with pytest.raises(ValueError, match=r"in another layout than training .*: expected the same layout"):
        names["Fp32PolicyWorker"]({}, tokenizer=None, worker_sharding_annotations=None)


def test_nemo_rls_launcher_runs_a_script_with_the_worker(load: Load, tmp_path: Path) -> None:
    program = NemoRL(Run())
    script = tmp_path / "run_grpo.py"
    script.write_text(
        "import sys\n"
        "from nemo_rl.models.policy import lm_policy\n"
        "stock = 'nemo_rl.models.policy.workers.megatron_policy_worker.MegatronPolicyWorker'\n"
        "print(*[lm_policy.resolve_policy_worker_cls(name, {}) for name in (stock, 'another.Worker')], *sys.argv[1:])\n"
    )
    names = load("nemo_rl_fp32", program.modules(), [str(script), "--config", "grpo.yaml"])
    stock = program.lm_policy.resolve_policy_worker_cls
    with pytest.MonkeyPatch.context() as patched:
        said: list[str] = []
        patched.setattr("builtins.print", lambda *words: said.extend(words))
        names["main"]()
    assert said == ["nemo_rl_fp32_worker.Fp32PolicyWorker", "another.Worker", "--config", "grpo.yaml"]
    assert program.registry["nemo_rl_fp32_worker.Fp32PolicyWorker"] == "uv run mcore"
    assert program.lm_policy.resolve_policy_worker_cls is stock


def test_nemo_rls_launcher_wants_a_script(load: Load) -> None:
    names = load("nemo_rl_fp32", NemoRL(Run()).modules())
    with pytest.raises(SystemExit, match=r"expected a script of NeMo-RL, such as examples/run_grpo.py"):
        names["main"]()


@pytest.mark.usefixtures("megatron", "optimizer_repairs")
def test_verl_with_the_legacy_bridge_is_refused(load: Load) -> None:
    program = Verl(Run())
    program.vanilla_mbridge = True
    load("verl_fp32", program.modules())
    engine = program.registry.get_engine_cls("language_model", "megatron")()
    with pytest.raises(ValueError, match=r"expected Megatron-Bridge \(vanilla_mbridge=False\), got the legacy mbridge"):
        engine.initialize()


def test_the_stand_ins_have_the_signatures_of_the_installed_megatron() -> None:
    """Those of programs that are not installed were read in the sources that the recipes name."""
    utils = pytest.importorskip("megatron.training.argument_utils", reason="megatron-core < 0.18 brings no training")
    from megatron.training import arguments, training

    if "p2p_communicator" not in inspect.signature(training.pretrain).parameters:
        pytest.skip("read in megatron-core 0.19.2")
    stubs = MegatronLM(Run())
    for stub, real in (
        (stubs.pretrain, training.pretrain),
        (stubs.parse_and_validate_args, arguments.parse_and_validate_args),
        (stubs.gpt_config_from_args, utils.gpt_config_from_args),
        (stubs.pretrain_cfg_container_from_args, utils.pretrain_cfg_container_from_args),
    ):
        assert [(p.name, p.kind, p.default is p.empty) for p in inspect.signature(stub).parameters.values()] == [
            (p.name, p.kind, p.default is p.empty) for p in inspect.signature(real).parameters.values()
        ]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_a_recipe_says_where_it_goes_and_how_it_is_launched(recipe: Path) -> None:
    text = ast.get_docstring(ast.parse(recipe.read_text())) or ""
    assert "Read at" in text
    if recipe.stem != "nemo_rl_fp32_worker":  # its launcher says it
        assert "Where to put it:" in text
        assert "Launch" in text


def test_megatron_lms_recipe_names_every_flag() -> None:
    parser = add_fp32_arguments(argparse.ArgumentParser())
    flags = set(re.findall(r"\[?(--[\w-]+)", parser.format_usage())) - {"--fp32-logits"}
    text = (ROOT / "examples/recipes/megatron_lm_fp32.py").read_text()
    assert flags == set(re.findall(r"`(--(?:no-)?fp32-[\w-]+)`", text))


def test_there_is_a_recipe_for_each_program_and_none_hides_a_package() -> None:
    """A file called slime.py on the path would be imported in place of slime."""
    assert {path.stem for path in RECIPES} == {
        "megatron_bridge_fp32",
        "megatron_lm_0_18_fp32",
        "megatron_lm_fp32",
        "nemo_rl_fp32",
        "nemo_rl_fp32_worker",
        "slime_fp32",
        "verl_fp32",
    }
