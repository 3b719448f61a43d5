"""The shortest path through the whole house, from Python."""

import groundup
from tests.conftest import TINY


def test_text_becomes_a_model_that_writes(text_file, tmp_path):
    summary = groundup.train(text_file, tmp_path / "run", **TINY)
    assert summary["steps"] == TINY["max_steps"]
    measured = groundup.evaluate(tmp_path / "run", device="cpu")
    assert measured["eval_loss"] == summary["eval_loss"]
    completion = groundup.generate(tmp_path / "run", prompt="the ", max_new_tokens=5, device="cpu")["completions"][0]
    assert len(completion["token_ids"]) <= 5
