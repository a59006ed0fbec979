from .parts import Annotator, Data, Model, ModelReward, Objective, Optimizer, Reward, Sampler


class Train:
    headline = "val/loss"

    def __init__(
        self, model: Model, objective: Objective, data: Data, optimizer: Optimizer, *, steps: int = 1
    ) -> None: ...


class Collect:
    def __init__(self, model: Model, data: Data, sampler: Sampler, annotator: Annotator) -> None: ...


class PPO:
    headline = "reward"

    def __init__(
        self,
        model: Model,
        objective: Objective,
        data: Data,
        text: Data,
        reward: Reward | ModelReward,
        sampler: Sampler,
        optimizer: Optimizer,
        *,
        steps: int = 1,
        value: str | list[str] | None = None,
    ) -> None: ...
