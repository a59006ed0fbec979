import subprocess
import sys
from pathlib import Path


def test_functional_imports_torch_alone():
    """`rlhf.functional.*` is imported in a fresh interpreter, with every other dependency made unimportable."""
    code = (
        "import sys\n"
        "for name in ('hydra', 'omegaconf', 'pydantic', 'transformers', 'pytorch_lightning', 'peft', 'datasets'):\n"
        "    sys.modules[name] = None\n"
        "import rlhf.functional.advantages, rlhf.functional.gate, rlhf.functional.kl, rlhf.functional.logprobs\n"
        "import rlhf.functional.masking, rlhf.functional.reduction, rlhf.objective\n"
        "others = {m for m in sys.modules if m.startswith('rlhf.') and not m.startswith('rlhf.functional')}\n"
        "assert others == {'rlhf.objective'}, others\n"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
