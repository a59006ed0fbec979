"""Benchmark of PPO's memory with LoRA: four separate models against one base for policy, reference, value and reward.

    python benchmarks/shared_base.py [WIDTH LAYERS]

Both ways run the same rollout and the same optimizer steps, each in a separate process. Peak memory is that of the GPU
if there is one. Otherwise it is the process's share of the machine's memory (Pss) minus its value before the models
were loaded: fp32 weights are memory-mapped on the CPU, and a file mapped three times is in memory once, so that two
models read from the same directory already share it.
"""

import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

WAYS = {"four models": "false", "one base": "true"}
SMALL = (
    "data.size=64",
    "data.validation=8",
    "stage.steps=1",
    "stage.batch_size=8",
    "stage.epochs=1",
    "stage.minibatches=1",
    "stage.micro_batch_size=2",
    "sampler.batch_size=4",
    "sampler.max_new_tokens=16",
)


def make(root: Path, width: int, layers: int) -> None:
    """Write a Llama with random weights, and a reward model that is a LoRA on it."""
    import torch

    from rlhf.data.data import Data
    from rlhf.models.adapters import LoRA, NoAdapter
    from rlhf.models.causal_lm import CausalLM
    from rlhf.models.precision import Precision
    from rlhf.models.scalar import ScalarModel

    architecture = {
        "hidden_size": width,
        "intermediate_size": 3 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 64,
        "num_key_value_heads": width // 64,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
    }
    torch.manual_seed(0)
    text = Data("text", "testbed", 2000, 0, 128).load()
    fp32 = Precision("32-true")
    CausalLM(None, architecture, 512).load(NoAdapter(), fp32, corpus=text.texts).save(root / "sft" / "model")
    policy = CausalLM(str(root / "sft"), None, None).load(LoRA(), fp32)
    ScalarModel(policy).save(root / "reward" / "model")


class Peak(threading.Thread):
    """Thread that records the peak memory of this process; a page that is mapped several times counts once."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most = 0

    def run(self) -> None:
        """Sample the memory every 20 ms."""
        while True:
            self.most = max(self.most, self.now())
            time.sleep(0.02)

    @staticmethod
    def now() -> int:
        """Return the current memory (Pss) in bytes."""
        lines = Path("/proc/self/smaps_rollup").read_text(encoding="utf-8").splitlines()
        return 1024 * int(next(line.split()[1] for line in lines if line.startswith("Pss:")))


def run(root: Path, shared: str) -> None:
    """Measure one way in this process; print the peak, the size of the weights, and score and loss as a check."""
    import torch

    from rlhf.running.build import train
    from rlhf.testing import compose_config

    gpu = torch.cuda.is_available()
    config: Any = compose_config(
        "stage=ppo",
        "recipe=testbed",
        f"inputs.policy={root / 'sft' / 'model'}",
        f"inputs.reference={root / 'sft' / 'model'}",
        f"inputs.reward_model={root / 'reward' / 'model'}",
        "stage.value=null",
        "adapter=lora",
        f"adapter.shared_base={shared}",
        f"trainer={'gpu' if gpu else 'cpu'}",
        "callbacks=quiet",
        *SMALL,
    )
    folder = root / shared
    folder.mkdir()
    peak = Peak()
    before = peak.now()
    peak.start()
    metrics = train(config, folder, resume=False)
    most = torch.cuda.max_memory_allocated() if gpu else peak.most - before
    names = ("weights_bytes/held", "weights_bytes/as_copies", "score", "loss")
    print("RESULT" + json.dumps({"peak": most} | {name: metrics[name] for name in names}))


def main(width: int = 512, layers: int = 8) -> None:
    """Measure both ways; print them and their ratio."""
    with tempfile.TemporaryDirectory() as name:
        subprocess.run([sys.executable, __file__, "make", name, str(width), str(layers)], check=True)
        found = {}
        for way, shared in WAYS.items():
            command = [sys.executable, __file__, "run", name, shared]
            out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, encoding="utf-8").stdout
            found[way] = json.loads(out.split("RESULT")[1].splitlines()[0])
    for way, values in found.items():
        held, most = values["weights_bytes/held"], values["peak"]
        print(f"{way}: weights {held / 1e6:.0f} MB, peak {most / 1e6:.0f} MB, score {values['score']:.5f}")
    theirs, ours = (found[way] for way in WAYS)
    print(
        f"one base / four models: weights {ours['weights_bytes/held'] / theirs['weights_bytes/held']:.2f}, "
        f"peak {ours['peak'] / theirs['peak']:.2f}"
    )


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["make", root, width, layers]:
            make(Path(root), int(width), int(layers))
        case ["run", root, shared]:
            run(Path(root), shared)
        case sizes:
            main(*map(int, sizes))
