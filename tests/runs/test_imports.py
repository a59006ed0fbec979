"""Libraries that a command does not need are not imported."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CODE = """
import sys
import rlhf_ppo.stage, rlhf_dpo.stage, rlhf_grpo.stage, rlhf_reward_model.stage
import rlhf.running.build, rlhf.running.pipeline, rlhf.evaluation.compare
from rlhf.models.adapters import NoAdapter
from rlhf.models.causal_lm import CausalLM
from rlhf.models.precision import Precision
from rlhf.models.reference import start_reference
from rlhf.models.scalar import ScalarModel
shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
model = CausalLM(None, shape, 300).load(NoAdapter(), Precision("32-true"), lambda: ["some text"])
start_reference(model), ScalarModel.load(model), model.save(sys.argv[1])
print([name for name in ("peft", "bitsandbytes") if name in sys.modules])
"""


def test_training_without_an_adapter_imports_no_peft(tmp_path: Path) -> None:
    path = f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'plugins')!r}]"
    done = subprocess.run(
        [sys.executable, "-c", f"{path}\n{CODE}", str(tmp_path / "model")], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip().splitlines()[-1:] == ["[]"], done.stderr
