"""Labs: every experiment runs, what it says follows the numbers, and nothing that was measured is lost."""

import json
import math
from pathlib import Path

import pytest

from groundup.errors import ConfigError
from groundup.lab import bench as bench_module
from groundup.lab import carry_out as carry_out_module
from groundup.lab.carry_out import carry_out, paragraph, read_runs, results_of
from groundup.lab.experiment import Part, Results, Spread, against, is_lower, number, percent, verdict
from groundup.lab.experiments.decoding import distinct, repeated
from groundup.lab.pictures import EVEN_GUESS, draw
from groundup.lab.registry import EXPERIMENTS, experiment_named
from groundup.runtime.files import exclusive
from tests.conftest import groundup, make_text

ROOT = Path(__file__).parents[1]

# Of a run that takes no time: these win over an experiment's own, where it has them.
MINIATURE = {
    "max_steps": 2, "n_layer": 1, "n_embd": 8, "n_head": 2, "n_positions": 16, "total_batch_tokens": 64,
    "per_device_train_batch_size": 4, "per_device_eval_batch_size": 8, "max_eval_tokens": 128, "new_tokens": 6,
    "prompt_tokens": 4, "prompts": 2,
}  # fmt: skip


@pytest.fixture
def little_text(monkeypatch, quick):
    """A bench that is ready at once."""
    texts = {"train": [make_text(400, seed=1)], "little": [make_text(100, seed=1)], "validation": [make_text(200, seed=2)]}
    monkeypatch.setattr(bench_module, "read_texts", lambda: texts)


@pytest.fixture
def counted(monkeypatch, little_text):
    """What was measured, as (final loss of the options, seed), without training."""
    runs = []

    def measure(bench, options, seed):
        runs.append((options["learning_rate"], seed))
        steps = [0, 1, 2]
        return {"eval_step": steps, "eval_loss": [5.5, 4.0, 3.0 + seed / 100], "final_loss": 3.0 + seed / 100}

    monkeypatch.setattr(carry_out_module, "train", measure)
    return runs


# ---- every experiment


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_runs(name, tmp_path, little_text, monkeypatch):
    experiment = EXPERIMENTS[name]
    result = carry_out(experiment, tmp_path, 2, lambda line: None, MINIATURE)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f".{name}.lock", f"{name}.json", f"{name}.md", f"{name}.png"]
    assert len(result["runs"]) == 2 * len(experiment.settings)
    assert result["verdict"] in ("seen", "seen in part", "not seen")
    assert f"The claim is {result['verdict']} (2 seeds)." in result["text"]
    page = (tmp_path / f"{name}.md").read_text(encoding="utf-8")
    assert experiment.claim in page
    assert experiment.formula in page
    assert result["text"] in page
    assert (tmp_path / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    json.dumps(result, allow_nan=False)


def test_names_and_claims_are_short_and_different():
    assert len({experiment.claim for experiment in EXPERIMENTS.values()}) == len(EXPERIMENTS) >= 11
    for name, experiment in EXPERIMENTS.items():
        assert experiment.name == name
        assert len(experiment.claim) < 130
        assert "\n" not in experiment.claim


def test_the_standard_library_is_split_by_name_and_has_enough():
    texts = bench_module.read_texts()
    assert not set(texts["train"]) & set(texts["validation"])
    assert sum(map(len, texts["train"])) > 0.9 * bench_module.TEXT_BYTES["train"]
    assert texts["little"] == ["".join(texts["train"])[: bench_module.TEXT_BYTES["little"]]]
    assert texts == bench_module.read_texts()


def test_a_bench_prints_nothing_and_leaves_nothing(little_text, capfd, tmp_path, monkeypatch):
    import torch

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    threads = torch.get_num_threads()
    with bench_module.opened_bench() as bench:
        found = bench_module.train(bench, {**MINIATURE_OF_TRAINING, "max_steps": 9}, seed=0)
        again = bench_module.train(bench, {**MINIATURE_OF_TRAINING, "max_steps": 9}, seed=0)
        other = bench_module.train(bench, {**MINIATURE_OF_TRAINING, "max_steps": 9}, seed=1)
    assert capfd.readouterr() == ("", "")
    assert not list(tmp_path.glob("groundup-lab-*"))
    assert torch.get_num_threads() == threads
    del found["seconds"], again["seconds"]
    assert found == again
    assert found["loss"] != other["loss"]
    assert found["step"] == list(range(1, 10))
    assert found["eval_step"][0] == 0
    assert found["eval_step"][-1] == 9
    assert abs(found["initial_loss"] - EVEN_GUESS) < 0.1
    assert found["final_loss"] == found["eval_loss"][-1]
    assert found["best_loss"] == min(found["eval_loss"])


MINIATURE_OF_TRAINING = {
    name: value for name, value in MINIATURE.items() if name not in ("new_tokens", "prompt_tokens", "prompts")
}


def test_a_run_that_diverges_is_measured_as_far_as_it_got(little_text, monkeypatch):
    from dataclasses import replace

    with (
        bench_module.opened_bench() as bench,
        bench.training({**MINIATURE_OF_TRAINING, "max_steps": 30, "max_skipped_steps": 2}, 0) as training,
    ):
        forward = training.learner.forward

        def broken(ids):
            return forward(ids) * (math.nan if training.state.step >= 4 else 1.0)

        training.learner = replace(training.learner, forward=broken)
        found = bench_module.measured_run(training)
    assert found["diverged"] is True
    assert found["eval_step"][-1] == 6
    assert found["train_loss"] is None
    assert found["final_loss"] is not None
    json.dumps(found, allow_nan=False)


# ---- what they say follows the numbers


def synthetic(name, values, seeds=3):
    """
    Results with these numbers; those that are not given are the same for all settings, and what differs is a little noise.

    Args:
        values: setting to key to mean.
    """
    usual = {
        "initial_loss": 5.549, "final_loss": 2.5, "best_loss": 2.5, "train_loss": 2.5, "accuracy": 0.4, "seconds": 3.0,
        "confidence": 0.4, "before": 2.6, "after": 2.6, "loss": 2.0, "perplexity": 7.4, "repeated": 0.05, "distinct": 0.7,
    }  # fmt: skip
    runs = {}
    for setting in EXPERIMENTS[name].settings:
        assert set(values) <= set(EXPERIMENTS[name].settings)
        given = values.get(setting, {})
        runs[setting] = {
            seed: {
                "every_loss": [2.5 + given.get("apart", 0.0)] * 3,
                **{
                    key: None if given.get(key, 0) is None else given.get(key, mean) * (1 + seed / 1000)
                    for key, mean in usual.items()
                },
            }
            for seed in range(seeds)
        }
    return Results(runs)


WARMUP, SAME_RATE = "warmup 30, rate 0.03", "warmup 30, rate 0.001"
CASES = [
    ("learning-rate", {"1e-05": {"final_loss": 4.0}, "1": {"final_loss": 4.0}}, "seen"),
    ("learning-rate", {"1e-05": {"final_loss": 4.0}}, "seen in part"),
    ("learning-rate", {"1e-05": {"final_loss": 2.0}, "1": {"final_loss": 2.0}}, "not seen"),
    ("learning-rate", {"1e-05": {"final_loss": 4.0}, "1": {"final_loss": None}}, "seen"),
    ("warmup", {WARMUP: {"final_loss": 2.0}}, "seen"),
    ("warmup", {SAME_RATE: {"final_loss": 2.0}}, "seen in part"),
    ("warmup", {"no warmup, rate 0.01": {"final_loss": 2.0}, "no warmup, rate 0.001": {"final_loss": 4.0}}, "not seen"),
    ("batch-size", {"one rate, batch 16384": {"final_loss": 4.0}}, "seen"),
    ("batch-size", {"rate · √batch, batch 16384": {"final_loss": 4.0}}, "not seen"),
    (
        "initialisation",
        {
            "gpt2, std 0.6": {"initial_loss": 20.0, "final_loss": 5.0},
            "all zero": {"initial_loss": 5.549, "final_loss": 5.549},
        },
        "seen",
    ),
    ("initialisation", {"gpt2, std 0.02": {"initial_loss": 20.0}}, "not seen"),
    (
        "normalisation",
        {f"{norm}, rate {rate}": {"final_loss": 3.0} for norm in ("batch norm", "none") for rate in ("0.002", "0.01")},
        "seen",
    ),
    (
        "normalisation",
        {f"{norm}, rate {rate}": {"final_loss": 2.0} for norm in ("batch norm", "none") for rate in ("0.002", "0.01")},
        "not seen",
    ),
    ("weight-decay", {"decoupled 1": {"final_loss": 2.0}}, "seen"),
    ("weight-decay", {"coupled 0.01": {"final_loss": 2.0}}, "not seen"),
    (
        "label-smoothing",
        {"ε 0.1, 6 KB": {"confidence": 0.3, "final_loss": 2.0}, "ε 0.1, 1.2 MB": {"confidence": 0.3}},
        "seen",
    ),
    (
        "label-smoothing",
        {"ε 0.1, 6 KB": {"confidence": 0.5, "final_loss": 3.0}, "ε 0.1, 1.2 MB": {"confidence": 0.5}},
        "not seen",
    ),
    ("clipping", {f"{o}, not clipped": {"final_loss": 9.0, "after": 30.0} for o in ("SGD", "AdamW")}, "seen"),
    ("clipping", {"SGD, not clipped": {"final_loss": None, "after": None}}, "seen in part"),
    ("clipping", {f"{o}, clipped to 1": {"final_loss": 9.0} for o in ("SGD", "AdamW")}, "not seen"),
    ("accumulation", {}, "seen"),
    ("accumulation", {"4 passes of 16": {"apart": 0.5}, "16 passes of 4": {"apart": 0.5}}, "not seen"),
    ("precision", {}, "seen"),
    ("precision", {"bf16": {"final_loss": 3.0}, "fp16": {"final_loss": 2.0}}, "seen in part"),
    ("precision", {"bf16": {"final_loss": 3.0}, "fp16": {"final_loss": None}}, "not seen"),
    (
        "decoding",
        {
            "greedy": {"loss": 0.5, "repeated": 0.9}, "temperature 0.5": {"loss": 1.0}, "temperature 0.8": {"loss": 1.5},
            "temperature 1.5": {"loss": 3.0}, "8 beams": {"loss": 0.3, "repeated": 0.9},
            **{setting: {"loss": 1.2} for setting in ("top-k 5", "top-k 20", "top-p 0.5", "top-p 0.9")},
        },
        "seen",
    ),
    ("decoding", {"greedy": {"loss": 3.0, "repeated": 0.01}, "8 beams": {"loss": 3.0}}, "not seen"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "values", "expected"), CASES, ids=[f"{name}: {found}" for name, _, found in CASES])
def test_the_verdict_follows_the_numbers(name, values, expected):
    text, found = paragraph(EXPERIMENTS[name], synthetic(name, values))
    assert found == expected
    assert f"The claim is {expected} (3 seeds)." in text
    assert "nan" not in text
    assert "inf" not in text


def test_every_experiment_has_an_outcome_for_and_one_against():
    for name in EXPERIMENTS:
        assert {"seen", "not seen"} <= {expected for case, _, expected in CASES if case == name}


def test_the_words_turn_with_the_numbers():
    def said(values):
        return paragraph(EXPERIMENTS["warmup"], synthetic("warmup", values))[0]

    better = said({WARMUP: {"final_loss": 2.0}})
    assert "ends at 2.002 (2.000 to 2.004), without at 2.502 (2.500 to 2.505) (with it 0.500 nats lower, beyond" in better
    assert "warmup bears the higher rate" in better
    assert "at 0.03 of these rates and raises it at none" in better
    worse = said({"no warmup, rate 0.01": {"final_loss": 2.0}, "no warmup, rate 0.001": {"final_loss": 4.0}})
    assert "(with it 0.500 nats higher, beyond the seeds' spread)" in worse
    assert "does not move the best rate up" in worse
    assert "at 0.001 of these rates and raises it at 0.01" in worse
    assert "not the smallest difference" in worse
    same = said({})
    assert "(with it no difference beyond the seeds' spread)" in same
    assert "at none of these rates and raises it at none" in same


def test_one_seed_shows_nothing():
    good = {"1e-05": {"final_loss": 4.0}, "1": {"final_loss": 4.0}}
    text, found = paragraph(EXPERIMENTS["learning-rate"], synthetic("learning-rate", good, seeds=1))
    assert found == "not seen"
    assert "(1 seed)" in text
    assert "one seed shows no spread" in text


@pytest.mark.parametrize(
    ("one", "other", "words"),
    [
        ((1.0, 1.1), (2.0, 2.1), "1.000 nats lower, beyond the seeds' spread"),
        ((2.0, 2.1), (1.0, 1.1), "1.000 nats higher, beyond the seeds' spread"),
        ((1.0, 2.0), (1.5, 2.5), "no difference beyond the seeds' spread"),
        ((1.0,), (2.0,), "one seed shows no spread"),
        ((math.inf, math.inf), (2.0, 2.1), "incomparably higher, beyond the seeds' spread"),
        ((2.0, 2.1), (math.inf, math.inf), "incomparably lower, beyond the seeds' spread"),
        ((math.inf, math.inf), (math.inf, math.inf), "no difference beyond the seeds' spread"),
    ],
)
def test_comparisons_in_words(one, other, words):
    assert against(Spread(one), Spread(other)) == words
    assert is_lower(Spread(one), Spread(other)) is ("lower" in words)


def test_verdicts():
    yes, no, remark = Part("", True), Part("", False), Part("")
    assert verdict([yes, remark, yes]) == "seen"
    assert verdict([yes, no]) == "seen in part"
    assert verdict([no, remark]) == "not seen"


def test_numbers_as_people_write_them():
    shown = [number(value) for value in (0.0, 0.00012, 2.34567, 12.345, 123.45, 12345.6, 1e7, math.inf)]
    assert shown == ["0.000", "1.2e-04", "2.346", "12.35", "123.5", "12,346", "1.0e+07", "not finite"]
    assert str(Spread((1.0, 2.0, 3.0))) == "2.000 (1.000 to 3.000)"
    assert str(Spread((1.0,))) == "1.000"
    assert percent(Spread((0.25, 0.35))) == "30.0% (25.0% to 35.0%)"


def test_repeated_and_distinct():
    assert repeated([([], list(range(100)))]) == 0
    assert repeated([([], [1, 2] * 50)]) == pytest.approx(1 - 2 / 89)
    assert repeated([(list(range(20)), list(range(20)))]) == 1.0
    assert distinct([[1, 2, 3, 4, 5]]) == 1.0
    assert distinct([[1] * 13]) == pytest.approx(0.1)
    assert distinct([[1, 2, 3, 4], [1, 2, 3, 4]]) == 0.5
    assert (repeated([]), distinct([[1]])) == (0, 0)


def test_the_planted_gradient_is_in_one_step(little_text):
    from groundup.lab.experiments.clipping import FACTOR, plant

    norms = []
    with bench_module.opened_bench() as bench:
        for at in (99, 3):
            with bench.training({**MINIATURE_OF_TRAINING, "max_steps": 3, "max_grad_norm": 1.0}, 0) as training:
                plant(training, at)
                norms.append([step.grad_norm for step in training])
    # The steps before are the same; the planted one is larger, though not wholly: the head's own part is as it was.
    assert norms[0][:2] == norms[1][:2]
    assert 20 < norms[1][2] / norms[0][2] <= FACTOR


def test_what_is_not_finite_can_be_drawn(tmp_path):
    for name in ("learning-rate", "precision"):
        experiment = EXPERIMENTS[name]
        results = synthetic(name, {experiment.settings and list(experiment.settings)[-1]: {"final_loss": None}})
        curve = {"step": [1, 2], "loss": [5.0, None], "eval_step": [0, 2], "eval_loss": [5.5, None]}
        runs = {setting: {seed: {**run, **curve} for seed, run in of.items()} for setting, of in results.runs.items()}
        draw(experiment, Results(runs), tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").stat().st_size > 1000


# ---- nothing that was measured is lost


@pytest.fixture
def plain(monkeypatch):
    """An experiment of two settings."""
    from dataclasses import replace

    return replace(
        EXPERIMENTS["learning-rate"],
        name="plain",
        settings={"low": {"learning_rate": 0.1}, "high": {"learning_rate": 0.2}},
        says=lambda results: [Part(f"{results.spread('low', 'final_loss')}", True)],
        draw=lambda results, figure: None,
    )


def test_what_is_done_is_not_done_again(tmp_path, counted, plain, monkeypatch):
    said = []
    carry_out(plain, tmp_path, 1, said.append)
    assert counted == [(0.1, 0), (0.2, 0)]
    carry_out(plain, tmp_path, 3, said.append)
    assert counted == [(0.1, 0), (0.2, 0), (0.1, 1), (0.2, 1), (0.1, 2), (0.2, 2)]
    assert "2 of 6 runs are done already" in said
    # Fewer seeds: those that are there stay, and are not counted.
    assert len(carry_out(plain, tmp_path, 2, said.append)["runs"]) == 4
    assert len(counted) == 6
    assert len(read_runs(tmp_path / "plain.json", "plain")) == 6


def test_ctrl_c_loses_nothing_that_is_done(tmp_path, counted, plain, monkeypatch):
    measure = carry_out_module.train

    def interrupted(bench, options, seed):
        if len(counted) == 3:
            raise KeyboardInterrupt
        return measure(bench, options, seed)

    monkeypatch.setattr(carry_out_module, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        carry_out(plain, tmp_path, 2, lambda line: None)
    assert len(read_runs(tmp_path / "plain.json", "plain")) == 3
    monkeypatch.setattr(carry_out_module, "train", measure)
    result = carry_out(plain, tmp_path, 2, lambda line: None)
    assert counted == [(0.1, 0), (0.2, 0), (0.1, 1), (0.2, 1)]
    assert [(run["setting"], run["seed"]) for run in result["runs"]] == [("low", 0), ("high", 0), ("low", 1), ("high", 1)]


def test_other_options_are_measured_again(tmp_path, counted, plain):
    from dataclasses import replace

    said = []
    carry_out(plain, tmp_path, 1, said.append)
    other = replace(plain, settings={**plain.settings, "high": {"learning_rate": 0.3}})
    carry_out(other, tmp_path, 1, said.append)
    assert counted == [(0.1, 0), (0.2, 0), (0.3, 0)]
    assert any("1 runs of other settings" in line for line in said)


@pytest.mark.parametrize(
    "content", ["[" * 200_000, "", "[]", "{}", '{"format": 1}', '{"format": "groundup-lab 1", "lab": "other", "runs": []}']
)
def test_somebody_elses_file_is_left_alone(tmp_path, content, plain, counted):
    path = tmp_path / "plain.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match="plain.json") as caught:
        carry_out(plain, tmp_path, 1, lambda line: None)
    assert "\n" not in str(caught.value)
    assert path.read_text() == content
    assert counted == []


def test_two_at_a_time_are_kept_apart_also_while_one_ends(tmp_path, counted, plain, monkeypatch):
    """The lock's file stays: one that goes while it is held lets a third in."""
    carry_out(plain, tmp_path, 1, lambda line: None)
    lock = tmp_path / ".plain.lock"
    inode = lock.stat().st_ino
    with exclusive(lock, "test"), pytest.raises(ConfigError, match="in use by another process"):
        carry_out(plain, tmp_path, 1, lambda line: None)
    carry_out(plain, tmp_path, 1, lambda line: None)
    assert lock.stat().st_ino == inode


# ---- the command


def test_the_list_and_wrong_names():
    done = groundup("lab", "list", "--json")
    assert done.code == 0
    assert [lab["name"] for lab in done.json["labs"]] == list(EXPERIMENTS)
    done = groundup("lab", "wamrup")
    assert done.code == 2
    assert len(done.error_lines) == 1
    assert "did you mean warmup?" in done.err
    assert experiment_named("Learning_Rate").name == "learning-rate"
    with pytest.raises(ConfigError, match="`groundup lab list`"):
        experiment_named("xyz")


@pytest.mark.parametrize(("arguments", "word"), [(["--seeds", "0"], "seeds"), (["--output-dir", "file/lab"], "output-dir")])
def test_what_cannot_be_is_one_line(tmp_path, arguments, word):
    (tmp_path / "file").write_text("")
    done = groundup("lab", "warmup", *arguments, cwd=tmp_path)
    assert done.code == 2
    assert len(done.error_lines) == 1
    assert word in done.err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_command_says_what_was_measured(tmp_path, counted, plain, monkeypatch, capsys):
    from groundup.cli.main import run

    monkeypatch.setitem(EXPERIMENTS, "plain", plain)
    assert run(["lab", "plain", "--seeds", "2", "--output-dir", str(tmp_path), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["text"] == "The claim is seen (2 seeds). 3.005 (3.000 to 3.010)"
    assert run(["lab", "plain", "--seeds", "2", "--output-dir", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[0] == printed["text"]
    results = results_of(plain, read_runs(tmp_path / "plain.json", "plain"), 2)
    assert paragraph(plain, results)[0] == printed["text"]


# ---- the pages


def pages():
    from importlib.util import module_from_spec, spec_from_file_location

    spec = spec_from_file_location("lab_pages", ROOT / "scripts" / "lab_pages.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_pages_say_what_the_kept_numbers_say():
    module, shown = pages(), []
    for path in sorted((ROOT / "docs" / "explanation").glob("*.md")):
        text = path.read_text(encoding="utf-8")
        assert module.filled(text) == text, f"run scripts/lab_pages.py: {path.name} is not what the numbers say"
        shown += [name for _, name, _, _ in module.BLOCK.findall(text)]
    assert sorted(shown) == sorted(EXPERIMENTS)


def test_a_page_that_says_something_else_is_found():
    module = pages()
    page = "before\n<!-- lab: warmup -->\nIt always helps.\n<!-- end -->\nafter\n"
    assert module.filled(page) != page
    assert module.filled(module.filled(page)) == module.filled(page)
    assert "It always helps" not in module.filled(page)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_what_is_kept_is_of_three_seeds_and_small(name):
    kept = ROOT / "docs" / "images" / "lab"
    runs = read_runs(kept / f"{name}.json", name)
    assert {(run.setting, run.seed) for run in runs} == {(s, seed) for s in EXPERIMENTS[name].settings for seed in range(3)}
    assert (kept / f"{name}.json").stat().st_size < 100_000
    assert (kept / f"{name}.png").stat().st_size < 150_000
