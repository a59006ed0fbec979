"""Traffic and roofline against hand-worked numbers, one measured point, and the figures."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import curve_figures, curves, models, roofline
from benchmarks.flops import Shape
from benchmarks.roofline import Roofline, forward_bytes, group_bytes, parameters, sampling_bytes, training_bytes

SHAPE = Shape(hidden=2, layers=1, heads=1, kv_heads=1, head_size=2, feed_forward=3, vocabulary=5)
LIMITS = Roofline({64: 8e9, 128: 10e9}, 2e9)


def test_the_roof_is_the_lower_of_two_limits() -> None:
    assert (LIMITS.rate, LIMITS.ridge) == (10e9, 5.0)
    assert [LIMITS.bound(intensity) for intensity in (1, 5, 50)] == [2e9, 10e9, 10e9]


def test_the_traffic_of_a_pass_is_that_of_its_products() -> None:
    """Three tokens: 4 products 2x2 of 6+4+6 numbers, 2 of 6+6+9, 1 of 9+6+6; attention 4 x 3 x 2; 2 targets."""
    layer, attention, projection = 4 * 16 + 2 * 21 + 21, 24, 2 * 2 + 2 * 5 + 2 * 5
    assert forward_bytes(SHAPE, 3, 2) == 4 * (layer + attention + projection)
    assert forward_bytes(SHAPE, 3, 0) == 4 * (layer + attention)
    assert parameters(SHAPE) == 4 * 4 + 3 * 6 + 10
    assert training_bytes(SHAPE, 3, 2) == 3 * forward_bytes(SHAPE, 3, 2) + 28 * parameters(SHAPE)


def test_a_decode_step_reads_the_whole_context() -> None:
    """A prompt of 3, two responses of 3 tokens: two decode steps of two rows, with 5 and 7 positions in the cache."""
    decode = [forward_bytes(SHAPE, 2, 2) + 4 * 2 * 2 * (context - 2) for context in (5, 7)]
    assert sampling_bytes(SHAPE, [3], 2, 3) == forward_bytes(SHAPE, 3, 1) + sum(decode)
    step = group_bytes(SHAPE, [3], 2, 3) - sampling_bytes(SHAPE, [3], 2, 3)
    assert step == forward_bytes(SHAPE, 9, 6) + training_bytes(SHAPE, 9, 6)


def test_parameters_are_those_of_the_matrices_of_a_model() -> None:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    assert parameters(Shape.of(config)) == sum(weight.numel() for weight in model.parameters() if weight.ndim == 2)


def test_a_machine_has_positive_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "SIZES", (8, 16))
    monkeypatch.setattr(roofline, "ELEMENTS", 1 << 12)
    limits = roofline.measure(seconds=0.0)
    assert limits.rates.keys() == {8, 16} and min(limits.rates.values()) > 0 and limits.bandwidth > 0


def test_points_are_measured_once_and_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny model's step is a whole one; what the file has already is not measured again."""
    (tiny, *_) = curves.CURVES["model"]
    tiny = replace(tiny, case=replace(tiny.case, batch=2, length=16))
    monkeypatch.setattr(curves, "CURVES", {"model": [tiny]})
    monkeypatch.setattr(curves.roofline, "measure", lambda: LIMITS)
    curves.main(["--out", str(tmp_path), "--repeats", "1"])
    content = json.loads((tmp_path / curves.FILE).read_text())
    point = content["points"]["model=tiny"]
    assert point["tokens"] == 32 and point["peak_memory_bytes"] > 0 and len(point["all_seconds"]) == 1
    assert point["rate"] == point["flops"] / point["seconds"] and point["share"] == point["rate"] / LIMITS.rate
    assert point["bytes"] == training_bytes(models.shape(models.model_folder("tiny")), 32, 24)
    for name in ("curves", "roofline"):
        assert (tmp_path / f"{name}.svg").stat().st_size and (tmp_path / f"{name}.png").stat().st_size
    monkeypatch.setattr(curves, "measure", None)
    monkeypatch.setattr(curve_figures, "draw", lambda content, folder: [])
    curves.main(["--out", str(tmp_path)])
