"""Untrusted names, paths, commands and configs stay plain text in a model card."""

import json
import re
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from rlhf.models import gguf_source
from rlhf.runs.run_directory import Run
from rlhf.using import markdown
from rlhf.using.export import Exported
from rlhf.using.model_card import card
from rlhf.using.named import Named
from tests.report.fake_runs import write_run

EVIL = 'base\n```\nimport os; os.system("owned")\n```\n---\nlicense: mit\n# Owned | <script>x</script> `y` "z" \\'


@pytest.mark.parametrize("text", ["plain", EVIL, "a\"b'c\\d\n\u202e🙂\x00", "'", '"', ""])
def test_literals_render_as_the_text(text):
    written = markdown.literal(text)
    assert eval(written) == text and written.isprintable() and "\n" not in written


def test_text_cannot_escape_code_and_blocks():
    assert markdown.code("a`b``c\nd") == "```a`b``c d```"
    assert markdown.code("`") == "`` ` ``"
    assert markdown.block("x\n````\ny", "yaml") == "`````yaml\nx\n````\ny\n`````"
    assert markdown.row("a|b", "c") == "| a\\|b | c |"
    assert markdown.plain("snake_case <b> [x](y)\n# z") == "snake_case \\<b\\> \\[x\\](y) \\# z"


@pytest.mark.parametrize("kind", ["adapter", "model", "reward_model"])
@pytest.mark.parametrize("base", [EVIL, EVIL + ".gguf"])
def test_a_card_shows_untrusted_names_as_text(tmp_path, kind, base):
    start = write_run(tmp_path, "sft", "aa" * 5, {"model": {"path": EVIL}, "data": {"source": EVIL}}, {EVIL: 1.0})
    run = write_run(tmp_path, "ppo", "bb" * 5, {"seed": EVIL}, {EVIL: 1.0}, [("policy", start)], versions={EVIL: EVIL})
    (run / "status.json").write_text(json.dumps({"status": "finished", "command": EVIL}))
    (run / "eval.json").write_text(
        json.dumps({"evaluations": [{"settings": {EVIL: EVIL}, "metrics": {EVIL: {"mean": 1.0, "se": EVIL}}}]})
    )
    exported = Exported(kind, tmp_path / "out", base, bias=0.5, notes=[f"it needs its base, {EVIL}"])
    page = card(Named(EVIL, EVIL, Run(run)), exported, 2, EVIL, EVIL)

    front = page.removeprefix("---\n").split("\n---\n")[0]
    assert OmegaConf.create(front).license == markdown.line(EVIL)
    fences = 0
    inside = ""
    for line in page.splitlines():
        if inside:
            inside = "" if line == inside else inside
        elif line.startswith("```"):
            inside, fences = "`" * (len(line) - len(line.lstrip("`"))), fences + 1
        else:  # no untrusted line starts a line of the page, outside of blocks and of the front matter's text
            assert not line.startswith(("import os", "# Owned", "license: mit")) or line in front
            spans = [markdown.code(text) for text in (EVIL, base)]
            for span in [*spans, *(span.replace("|", "\\|") for span in spans)]:
                line = line.replace(span, "")
            assert "<script>" not in line.replace("\\<", "") or line in front
    assert not inside and fences == 5  # the code, and of each run its command and config
    code = re.search(r"^(`{3,})python\n(.*?)\n\1$", page, re.DOTALL | re.MULTILINE)[2]
    compile(code, "card", "exec")
    assert not any(line.startswith("import os") for line in code.splitlines())


def test_an_invalid_source_name_is_omitted(tmp_path: Path):
    good = {"path": "/x/y.gguf", "sha256": "ab" * 32, "package": "llm-x", "version": "0.1+cpu", "module": "llm_x"}
    for key, value in ((None, None), ("package", "x'); import os #"), ("version", "1\nrm"), ("sha256", "$(x)")):
        (tmp_path / "gguf.json").write_text(json.dumps(good | ({key: value} if key else {})))
        assert (gguf_source.read(tmp_path) is None) == (key is not None)
