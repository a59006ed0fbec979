"""Output and exit status of the command for what people type."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlhf import __version__
from rlhf.cli import main

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def isolated_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    monkeypatch.delenv("RLHF_PLUGINS", raising=False)
    monkeypatch.setattr(sys, "path", list(sys.path))


def typed(capsys: pytest.CaptureFixture[str], line: str) -> tuple[int, str]:
    code = main.run(line.split())
    captured = capsys.readouterr()
    return code, captured.out + captured.err


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("stage=dpoo", "stage=dpoo: no such option (did you mean dpo?)"),
        ("stage=dpo objective=ip", "objective=ip: no such option (did you mean ipo?)"),
        ("stage=dpo objective.betta=1", "objective.betta: unknown option (did you mean objective.beta?)"),
        ("stage=dpo objective.betta=1,2 -m", "objective.betta: unknown option (did you mean objective.beta?)"),
        ("stage=dpo -m objective.betta=1,2", "objective.betta: unknown option (did you mean objective.beta?)"),
        ("stage=dpo objective.beta=1,2", "objective.beta=1,2: several values are a sweep; add -m"),
        ("stage=dpo reward.x=1", "reward: stage=dpo has no such group"),
        ("stage=sft modell=x", "modell: unknown option (did you mean model?)"),
        ("stge=ppo", "stge: unknown option (did you mean stage?)"),  # a null group, hence no config key
        ("pipline=instructgpt", "pipline: unknown option (did you mean pipeline?)"),
        ("stage=sft optimizer.lr=[1", "optimizer.lr=[1: cannot be read as KEY=VALUE"),
        ("objective.beta=1", "objective: no stage with this group is chosen; type stage=NAME or pipeline=NAME"),
        ("objective=dpo", "objective=dpo: no stage with this group is chosen; type stage=NAME or pipeline=NAME"),
        ("stage=collect objective=dpo", "objective=dpo: the chosen stage has no group objective"),
        ("pipeline=instructgpt align.objective.betta=1", "align.objective.betta: unknown option (did you mean align.o"),
        ("pipeline=instructgpt stage@align=dpoo", "stage@align=dpoo: no such option (did you mean dpo?)"),
        (
            "pipeline=instructgpt objective.clip=1",
            "objective.clip=1: each step of a pipeline has its own; type align.obj",
        ),
        ("pipeline=dpo objective=ipo", "objective=ipo: each step of a pipeline has its own; type objective@"),
        (
            "pipeline=instructgpt stage@align=dpo align.adam_eps=1e-5",
            "align.adam_eps: unknown option (adam_eps is set for all steps); type +align.adam_eps=1e-5",
        ),
        ("pipeline=dpo objective@algin.objective=ipo", "no objective at algin.objective (did you mean objective@al"),
        ("~stage", "~stage: leaves neither a stage nor a pipeline; type stage=NAME or pipeline=NAME"),
        ("pipeline=dpo ~steps", "~steps: leaves neither a stage nor a pipeline"),
        (
            "stage=sft ~trainer inputs.policy=org/name",
            "trainer: has no value, and every stage needs it; type train",
        ),
        ("stage=sft --dry-run=5", "--dry-run 5: takes no value; type --dry-run"),
        ("stage=sft --info=nosuch", "--info nosuch: no such page (one of: all, config,"),
        ("stage=sft --info nosuch", "--info nosuch: no such page (one of: all, config,"),
        ("--shell-completion nosuch", "--shell-completion: needs an action; type install=bash"),
        ("stage=sft --experimental-rerun x", "--experimental-rerun: unknown option"),
        ("stage=sft data=null", "data=null: null is not the name of an option; type data=OPTION"),
        ("stage=sft +callbacks.mine=5 inputs.policy=org/name", "callbacks.mine=5: should be null or have a _target_"),
        ("pipeline=dpo ++steps=5", "steps=5: must be a list of steps; leave it out"),
        ("pipeline=dpo ++compare=5", "compare=5: must be a mapping; leave it out, or type"),
        (
            "generate m --prompts testbed --samples 1000000000000",
            "1000000000000 should be less than or equal to 100000",
        ),
        ("inspect batch stage=sft --rows -1", "argument --rows: -1 should be greater than or equal to 0"),
        ("inspect batch stage=sft --step -1", "argument --step: -1 should be greater than or equal to 0"),
        ("generate m --prompts testbed --seed x", "argument --seed: x should be a valid integer"),
        ("generate m --prompts testbed --top-p 0", "argument --top-p/--top_p: 0 should be greater than 0"),
        ("generate m --prompts testbed --temperature inf", "argument --temperature: inf should be a finite number"),
        (f"{'x' * 120_000}", f"{'x' * 200}...{'x' * 40} no such command"[:240]),
        ("pipeline=dpo objective=ipo", "own; type objective@align.objective=ipo\n"),  # of the step that reads it
        ("pipeline=dpo objective@align=ipo", "no objective at align; type objective@align.objective=ipo"),
        ("pipeline=dpo objective@align.objective=ippo", "no such option (did you mean ipo?)"),  # but not ppo
        ("pipeline=dpo stage@align=lora", "(lora is an adapter); type adapter=lora\n"),
        ("pipeline=dpo stage@algn=dpo", "no stage at algn (did you mean stage@align?)"),
        ("pipeline=dpo stage.align=dpo", "type stage@align=dpo\n"),
        ("pipeline=dpo align=ppo", "align=ppo: align is a step; type stage@align=ppo"),
        ("pipeline=dpo align.stage=ppo", "align.stage=ppo: stage is a group of options; type stage@align=ppo"),
        ("pipeline=dpo align.objective=ipo", "objective is a group of options; type objective@align.objective=ipo"),
        (
            "pipeline=dpo align.adapter=lora",
            "align.adapter: unknown option (adapter is the same for all steps); type adapter=lora",
        ),
        ("pipeline=dpo adapter@align.adapter=lora", "adapter is a group of the root; type adapter=lora\n"),
        ("pipeline=dpo dpo.stage.epochs=1", "type align.stage.epochs=1\n"),
        ("pipeline=instructgpt reward.stage.batch_size=4", "type reward_model.stage.batch_size=4\n"),
        ("stage=lora", "(lora is an adapter); type stage=NAME adapter=lora\n"),
        ("stage=seeds", "(seeds is a sweep); type stage=NAME sweep=seeds -m\n"),
        ("pipeline=ppo", "(ppo is a stage); type stage=ppo\n"),
        ("stage=sft adapter.rank=4", "(only adapter=dora, lora, qlora has it); type adapter=dora adapter.rank=4"),
        ("stage=sft lora.rank=4", "(lora is an adapter); type adapter=lora\n"),
        ("stage=sft learning_rate=1e-4", "learning_rate: unknown option (did you mean optimizer.lr?)"),
        ("stage=sft rank=4", "rank: unknown option (one of: "),  # but not trainer
        ("sfft", "sfft: no such command"),
        ("sft", "sft: no such command (did you mean stage=sft?)"),
        ("plugins show nothing_like_it", "nothing_like_it: no such plugin"),
    ],
)
def test_a_mistake_is_reported_in_one_line_with_status_2(
    capsys: pytest.CaptureFixture[str], line: str, said: str
) -> None:
    code, out = typed(capsys, line)
    assert code == 2
    assert said in out
    assert len(out.strip().splitlines()) == 1, out
    assert "Traceback" not in out
    assert not list(Path().iterdir()), "a mistake leaves nothing behind"
    assert "HYDRA_FULL_ERROR" not in os.environ


@pytest.mark.parametrize("line", ["", "seed=1"])
def test_without_stage_or_pipeline_short_usage_is_printed(capsys: pytest.CaptureFixture[str], line: str) -> None:
    code, out = typed(capsys, line)
    assert code == 2
    assert out.startswith("usage: rlhf stage=STAGE")
    for word in ("instructgpt", "reward_model", "plugins", "rlhf --help"):
        assert word in out
    assert len(out.splitlines()) < 15


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("defaults: [mine]\nsource: x\n", "its defaults list is circular; remove an entry"),
        ("defaults: [other]\n", "its defaults list is circular; remove an entry"),
        ("defaults: 5\n", "cannot be read (Invalid defaults list in 'data/mine', defaults must be a list (got int)); "),
        (b"\xff\xfe", "cannot be read ('utf-8' codec can't decode byte 0xff in position 0"),
        ("- 1\n", "cannot be read ("),
        (f"source: {'[' * 3000}{']' * 3000}\n", "is nested too deeply; correct the YAML file"),
    ],
    ids=["itself", "by way of another", "no defaults list", "not UTF-8", "list", "deep"],
)
def test_a_user_option_that_hydra_cannot_read_is_reported_in_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, content: str | bytes, said: str
) -> None:
    (tmp_path / "conf/data").mkdir(parents=True)
    (tmp_path / "conf/data/mine.yaml").write_bytes(content.encode() if isinstance(content, str) else content)
    (tmp_path / "conf/data/other.yaml").write_text("defaults: [mine]\n")
    code, out = typed(capsys, "stage=sft data=mine data.size=8")
    place, _, reason = out.partition(": ")[2].partition(": ")
    assert code == 2 and place in ("data/mine.yaml", "data/other.yaml", "the config") and reason.startswith(said), out
    assert len(out.splitlines()) == 1


@pytest.mark.parametrize(
    ("option", "content", "said"),
    [
        ("pipeline", "- 1\n", "error: pipeline=mine: leaves neither a stage nor a pipeline; type stage=NAME"),
        ("stage", "# @package _global_\nstage: abc\n", "error: stage: has no _target_, the class of the stage; add it"),
    ],
)
def test_a_user_stage_or_pipeline_without_its_keys_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, option: str, content: str, said: str
) -> None:
    (tmp_path / "conf" / option).mkdir(parents=True)
    (tmp_path / f"conf/{option}/mine.yaml").write_text(content)
    code, out = typed(capsys, f"{option}=mine")
    assert code == 2 and out.startswith(said) and len(out.splitlines()) == 1, out


def test_a_conf_directory_that_links_to_itself_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "conf").symlink_to("conf")
    code, out = typed(capsys, "stage=sft")
    assert code == 2 and out.startswith("error: conf: cannot be read (") and len(out.splitlines()) == 1, out


def test_a_wrong_stage_and_objective_pair_is_refused_before_anything_is_loaded(
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, out = typed(capsys, "stage=sft objective=dpo")
    assert (code, out) == (2, "error: stage=sft does not take objective=dpo; it takes: cross_entropy\n")


def test_full_error_adds_the_traceback(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    code, out = typed(capsys, "stage=dpoo")
    assert code == 2
    assert "Traceback" in out and "did you mean dpo?" in out


def test_an_unexpected_failure_has_status_1(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from rlhf.running import pipeline

    def fails(config: object) -> None:
        raise RuntimeError("out of luck\nand more")

    monkeypatch.setattr(pipeline, "run", fails)
    code, out = typed(capsys, "stage=sft")
    assert code == 1
    assert out.splitlines()[0] == "error: RuntimeError: out of luck"
    assert "HYDRA_FULL_ERROR=1" in out and "Traceback" not in out


def test_help_lists_everything_with_its_provider(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    option = tmp_path / "plugins" / "mine" / "conf" / "objective" / "mine_loss.yaml"
    option.parent.mkdir(parents=True)
    option.write_text("# Mine.\n_target_: mine.Loss\n")
    code, out = typed(capsys, "--help")
    assert code == 0
    for word in (
        "sft [sft]",
        "mine_loss [mine]",
        "instructgpt",
        "llama_tiny",
        "rlhf plugins",
        "rlhf runs",
        "beta_frontier",
    ):
        assert word in out, word
    assert re.search(r"^objective=$", out, re.M)


def test_help_of_a_stage_shows_its_hyperparameters_with_their_comments(capsys: pytest.CaptureFixture[str]) -> None:
    code, out = typed(capsys, "stage=dpo objective=ipo --help")
    assert code == 0
    assert "stage=dpo [dpo]" in out and "objective=ipo [dpo]" in out
    assert re.search(r"beta: .* # .+", out)


def test_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert typed(capsys, "--version") == (0, f"rlhf {__version__}\n")


def test_user_conf_and_typed_values_take_precedence(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "conf" / "optimizer").mkdir(parents=True)
    (tmp_path / "conf" / "optimizer" / "adamw.yaml").write_text("# Mine.\nmark: mine\n")
    code, out = typed(capsys, "stage=sft --cfg job -p optimizer")
    assert code == 0 and "mark: mine" in out


def test_help_imports_no_torch_and_is_fast() -> None:
    code = (
        "import sys; from rlhf.cli.main import run; run(['--help']); run(['stage=dpo', '--help']); "
        "heavy = {'torch', 'pytorch_lightning', 'transformers', 'numpy'} & set(sys.modules); assert not heavy, heavy"
    )
    started = time.perf_counter()
    path = {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=os.environ | path
    )
    assert done.returncode == 0, done.stderr
    # Each page takes under a second alone; the bound leaves a margin for a busy machine.
    assert time.perf_counter() - started < 10


@pytest.mark.parametrize("kind", ["annotator", "data", "objective", "reward", "stage"])
def test_a_new_plugin_passes_its_checks(capsys: pytest.CaptureFixture[str], kind: str) -> None:
    code, out = typed(capsys, f"plugins new my_{kind} --kind {kind}")
    assert code == 0 and f"rlhf plugins check plugins/my_{kind}" in out
    code, out = typed(capsys, f"plugins check plugins/my_{kind}")
    assert code == 0 and "0 failed" in out, out
    sys.modules.pop(f"my_{kind}", None)
    assert typed(capsys, f"plugins new my_{kind} --kind {kind}")[0] == 2
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "ruff",
            "check",
            "--config",
            str(ROOT / "pyproject.toml"),
            "--ignore",
            "I001",
            "plugins",
        ],
        capture_output=True,
    )
    assert done.returncode == 0, done.stdout.decode()


def test_plugins_check_reports_every_mistake(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    typed(capsys, "plugins new bad_loss --kind objective")
    module = tmp_path / "plugins" / "bad_loss" / "objective.py"
    text = module.read_text().replace("return -F.logsigmoid(margin),", "return -F.logsigmoid(margin).mean(),")
    module.write_text(text.replace("margin.detach()", "margin"))
    option = tmp_path / "plugins" / "bad_loss" / "conf" / "objective" / "bad_loss.yaml"
    option.write_text("# Bad.\n_target_: bad_loss.objective.BadLoss\nbeta: 0.2\n")
    code, out = typed(capsys, "plugins check plugins/bad_loss")
    assert code == 1
    for finding in (
        "no comment: bad_loss.yaml:3: beta: 0.2",
        "beta is 0.2, the default of its constructor is 0.1",
        "losses have the shape (), expected (6,)",
        "metric reward_margin has a gradient",
    ):
        assert finding in out, out
