"""Tab completion: commands, their arguments, runs, steps, and objectives of the chosen stage."""

from pathlib import Path

import pytest

from rlhf.cli import main
from rlhf.cli.complete import candidates
from rlhf.storage.files import write_json

STEPS = ("pretrain", "sft", "collect", "reward_model", "align")


@pytest.fixture(autouse=True)
def outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    main.register()
    write_json(tmp_path / "outputs/sft/abcdef0123/status.json", {"status": "finished"})


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("plugins ", {"list", "show", "new", "check"}),
        ("plugins s", {"show"}),
        ("plugins show rl", {"rloo"}),
        ("cache ", {"list", "rm"}),
        ("runs r", {"rm"}),
        ("runs show out", {"outputs/sft/abcdef0123"}),
        ("chat ", {"outputs/sft/abcdef0123"}),
        ("insp", {"inspect"}),
        ("inspect ", {"data", "batch", "template", "plan"}),
        ("inspect plan pipeline=inst", {"pipeline=instructgpt"}),
        ("stage=dpo inputs.policy=", {"inputs.policy=outputs/sft/abcdef0123"}),
        (
            "pipeline=instructgpt until=",
            {f"until={step}" for step in STEPS},
        ),
        ("pipeline=instructgpt until=p", {"until=pretrain"}),
        ("stage=ppo objective=", {"objective=ppo"}),
        ("stage=gated_ppo objective=", {"objective=ppo"}),
        ("stage=sft objective=", {"objective=cross_entropy"}),
        ("stage=grpo objective=d", {"objective=dapo", "objective=dr_grpo"}),
        ("stage=dpo objective.bet", {"objective.beta="}),
        ("stage=nosuch objective.", set()),
        ("nosuch ", set()),
    ],
)
def test_completions_of_the_next_word(line: str, found: set[str]) -> None:
    got = set(candidates(line))
    assert got == found if "nosuch " not in line else got >= found


def test_the_first_word_is_a_command_or_a_group() -> None:
    assert {"chat", "runs", "stage=", "pipeline=", "experiment="} <= set(candidates(""))


def test_the_shell_receives_completions_and_no_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COMP_LINE", "rlhf plugins ")
    assert main.run(["-sc", "query=bash"]) == 0
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("check list new show\n", "")
