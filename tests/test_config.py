"""Options: layers, where values come from, what is refused, and the arithmetic of a plan."""

import tomllib
from collections import Counter
from dataclasses import fields
from pathlib import Path

import pytest
import tomli_w
from hypothesis import given, settings
from hypothesis import strategies as st

import groundup
from groundup.config.load import Given, read_config_file, resolve
from groundup.config.options import (
    COMMANDS,
    EXPORT_GROUPS,
    IMPORT_GROUPS,
    PREPARE_GROUPS,
    TRAIN_GROUPS,
    BatchOptions,
    ModelOptions,
    RunOptions,
    ScheduleOptions,
)
from groundup.config.plan import micro_batches, plan_run
from groundup.config.presets import FINE_TUNING, PRESET_OPTIONS, PRESETS
from groundup.config.reference import reference
from groundup.errors import ConfigError
from tests.conftest import groundup as command

GROUPS = list(dict.fromkeys(group for groups in COMMANDS.values() for group in groups))
DECLARED = [pytest.param(group, f, id=f"{group.__name__}.{f.name}") for group in GROUPS for f in fields(group)]


# Above what a float holds.
HUGE = pytest.param(10**400, id="huge")


def train_settings(origin="flag", **options):
    return resolve(TRAIN_GROUPS, {name: Given(value, origin) for name, value in options.items()})


def refusal(groups=TRAIN_GROUPS, origin="--flag", **options) -> str:
    with pytest.raises(ConfigError) as error:
        resolve(groups, {name: Given(value, origin) for name, value in options.items()})
    return str(error.value)


# --- layers ---


def test_a_default_gives_way_to_a_preset():
    assert ModelOptions().n_layer == 12
    resolved = train_settings(model="gpt2-nano")
    assert resolved[ModelOptions].n_layer == PRESETS["gpt2-nano"]["n_layer"] == 4
    assert resolved.origins["n_layer"] == "preset gpt2-nano"
    assert resolved.origins["weight_decay"] == "default"


def test_a_preset_gives_way_to_a_file_and_a_file_to_a_flag(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text('model = "gpt2-nano"\nn_layer = 3\nlearning_rate = 0.5\n')
    layers = read_config_file(file) | {"n_layer": Given("2", "--n-layer")}
    resolved = resolve(TRAIN_GROUPS, layers)
    assert (resolved[ModelOptions].n_layer, resolved.origins["n_layer"]) == (2, "--n-layer")
    assert resolved[ScheduleOptions].learning_rate == 0.5
    assert str(file) in resolved.origins["learning_rate"]
    assert resolved[ModelOptions].n_embd == PRESETS["gpt2-nano"]["n_embd"]


def test_the_command_line_merges_file_and_flag(tmp_path, text_file):
    """The real command: the file says strict, the flag says replace, the dataset remembers what won."""
    file = tmp_path / "run.toml"
    file.write_text('[data]\nencoding_errors = "strict"\nvalidation-fraction = 0.25\n[any]\ntokenizer = "byte"\n')
    result = command(
        "prepare", text_file, "--output-dir", tmp_path / "data", "--config", file, "--encoding_errors=replace", "--json"
    )  # fmt: skip
    assert result.code == 0, result.err
    share = result.json["validation_tokens"] / (result.json["train_tokens"] + result.json["validation_tokens"])
    assert share == pytest.approx(0.25, abs=0.01)
    assert '"encoding_errors": "replace"' in (tmp_path / "data" / "dataset.json").read_text()


def test_every_preset_resolves():
    for name in PRESETS:
        assert train_settings(model=name).flat()["n_embd"] == PRESETS[name]["n_embd"]


def test_settings_are_frozen():
    with pytest.raises(AttributeError):
        train_settings()[ModelOptions].n_layer = 5


def test_a_resolved_configuration_resolves_to_itself(tmp_path):
    """RUN/config.toml says that it starts another run like it."""
    for options in ({}, {"model": "gpt2", "bf16": False}, {"gradient_accumulation_steps": 4}):
        first = train_settings(**options)
        file = tmp_path / "config.toml"
        file.write_text(tomli_w.dumps({k: v for k, v in first.flat().items() if v is not None}))
        assert resolve(TRAIN_GROUPS, read_config_file(file)).flat() == first.flat()


# --- errors: where a value came from, all at once, the nearest name ---


@pytest.mark.parametrize("origin", ["--n-layer", "run.toml", "argument n_layer"])
def test_an_error_names_the_value_and_where_it_came_from(origin):
    message = refusal(origin=origin, n_layer="zero")
    assert "n_layer" in message
    assert "'zero'" in message
    assert f"from {origin}" in message


def test_a_contradiction_names_the_origin_of_both_values():
    message = refusal(model="gpt2-nano", n_head="3")
    assert "n_embd: 128 (from preset gpt2-nano)" in message
    assert "n_head 3 (from --flag)" in message


def test_all_problems_come_in_one_error():
    message = refusal(n_layer="x", learning_rate=-1.0, n_lair=1, lr_scheduler_type="cosin", bf16="maybe")
    for name in ("n_layer", "learning_rate", "n_lair", "lr_scheduler_type", "bf16"):
        assert name in message
    assert len(message.splitlines()) == 5


def test_an_unknown_preset_does_not_hide_other_problems():
    message = refusal(model="gpt3", n_layer="x")
    assert "gpt3" in message
    assert "n_layer" in message


def test_an_unknown_preset_names_the_nearest():
    message = refusal(model="gpt2-nanno")
    assert "gpt2-nano" in message
    assert "--flag" in message


@pytest.mark.parametrize(("typo", "right"), [("n_layr", "n_layer"), ("lerning_rate", "learning_rate"), ("seeds", "seed")])
def test_a_misspelt_python_argument_names_the_nearest(tmp_path, typo, right):
    with pytest.raises(ConfigError, match=f"{typo}: no such option .*argument {typo}.*did you mean.*{right}"):
        groundup.train("nowhere", tmp_path / "run", **{typo: 1})
    assert not (tmp_path / "run").exists()


def test_a_misspelt_key_in_a_file_names_the_nearest_and_the_file(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text("[model]\nn-layr = 2\n")
    with pytest.raises(ConfigError, match="n_layr: no such option .*run.toml.*did you mean n_layer"):
        resolve(TRAIN_GROUPS, read_config_file(file))


@pytest.mark.parametrize("typo", ["--n-layr", "--n_layr"])
def test_a_misspelt_flag_names_the_nearest(tmp_path, typo):
    result = command("train", "nowhere", "--output-dir", tmp_path / "run", typo, "2")
    assert result.code == 2
    assert "--n-layer" in result.err
    assert len(result.err.splitlines()) == 1


def test_an_option_of_another_command_is_refused():
    assert "n_layer: no such option" in refusal(PREPARE_GROUPS, n_layer=2)


def test_a_missing_file_and_a_malformed_file_are_named(tmp_path):
    with pytest.raises(ConfigError, match="absent.toml: not found"):
        read_config_file(tmp_path / "absent.toml")
    bad = tmp_path / "bad.toml"
    bad.write_text("n_layer = = 2\n")
    with pytest.raises(ConfigError, match="bad.toml: cannot be read as TOML.*line 1"):
        read_config_file(bad)
    with pytest.raises(ConfigError, match="cannot be read as TOML"):
        read_config_file(tmp_path)


def test_width_must_be_divisible_by_heads_and_the_nearest_is_offered():
    message = refusal(n_embd=130, n_head=4)
    assert "n_embd: 130" in message
    nearest = int(message.rsplit(" ", 1)[1])
    assert nearest in (128, 132)
    train_settings(n_embd=nearest, n_head=4)


def test_two_ways_to_set_the_global_batch_contradict_each_other():
    assert "both set the global batch" in refusal(total_batch_tokens=4096, gradient_accumulation_steps=4)
    # The preset's batch is nobody's wish, so the explicit one wins.
    assert train_settings(gradient_accumulation_steps=4)[BatchOptions].gradient_accumulation_steps == 4


def test_a_global_batch_below_one_window_is_refused():
    assert "give at least 64" in refusal(n_positions=64, total_batch_tokens=63)
    assert train_settings(n_positions=64, total_batch_tokens=64)[BatchOptions].total_batch_tokens == 64


# --- somebody's weights ---


def test_weights_of_somebody_bring_the_defaults_of_fine_tuning_and_no_preset():
    resolved = train_settings(init_from="somewhere")
    assert {name: resolved.flat()[name] for name in FINE_TUNING} == FINE_TUNING
    assert {resolved.origins[name] for name in FINE_TUNING} == {"fine-tuning"}
    assert {resolved.origins[name] for name in ("n_layer", "n_embd", "n_head", "n_positions")} == {"default"}
    assert set(FINE_TUNING) <= PRESET_OPTIONS, "what a preset sets beyond the shape"
    for name, value in {"learning_rate": 0.5, "total_batch_tokens": 64}.items():
        assert train_settings(init_from="somewhere", **{name: value}).flat()[name] == value


def test_no_weights_of_somebody_are_a_preset_as_ever():
    assert train_settings(init_from="").flat() == train_settings().flat()
    assert train_settings(init_from="", model="gpt2-nano").flat() == train_settings(model="gpt2-nano").flat()


def test_a_preset_beside_weights_names_the_origin():
    message = refusal(init_from="somewhere", model="gpt2", n_layer="x")
    assert "model: 'gpt2' (from --flag) names a shape, but init_from 'somewhere' has its own" in message
    assert "n_layer: 'x'" in message, "all problems come in one error"


def test_a_flag_and_a_file_that_name_preset_and_weights_contradict_each_other():
    for model, init_from in (("file a.toml", "--init-from"), ("--model", "file a.toml"), ("file a.toml", "file b.toml")):
        given = {"model": Given("gpt2-nano", model), "init_from": Given("somewhere", init_from)}
        with pytest.raises(ConfigError, match=rf"model: 'gpt2-nano' \(from {model}\)"):
            resolve(TRAIN_GROUPS, given)


def test_a_resolved_configuration_with_weights_resolves_to_itself(tmp_path):
    """It holds a preset's name too, which took no effect, and a shape that is written out."""
    first = train_settings(init_from="somewhere", n_positions=64, freeze=["wte*"], gradient_accumulation_steps=2)
    file = tmp_path / "config.toml"
    file.write_text(tomli_w.dumps({k: v for k, v in first.flat().items() if v is not None}))
    assert resolve(TRAIN_GROUPS, read_config_file(file)).flat() == first.flat()


def test_the_batch_of_fine_tuning_gives_way_to_accumulation():
    """It is nobody's wish, like a preset's."""
    for more in ({}, {"n_positions": 64}):
        resolved = train_settings(init_from="somewhere", gradient_accumulation_steps=4, **more)
        assert resolved[BatchOptions].gradient_accumulation_steps == 4
    with pytest.raises(ConfigError, match="both set the global batch"):
        train_settings(init_from="somewhere", n_positions=64, gradient_accumulation_steps=4, total_batch_tokens=64)


def test_a_shape_that_is_not_known_yet_contradicts_nothing():
    """Width and context are the weights'; what their defaults would say is not asked."""
    for more in ({}, {"n_positions": 64}):
        resolved = train_settings(init_from="somewhere", n_head=5, **more)
        assert resolved[ModelOptions].n_head == 5
    assert train_settings(init_from="somewhere", stride=2000)[BatchOptions].stride == 2000


def test_patterns_to_freeze_are_one_or_several():
    assert train_settings(freeze="wte*").flat()["freeze"] == ("wte*",)
    assert train_settings(freeze=["wte*", "h.0.*"]).flat()["freeze"] == ("wte*", "h.0.*")
    assert "freeze" in refusal(freeze=[1])


@pytest.mark.parametrize(
    ("name", "wrong", "near"), [("format", "gguv", "gguf"), ("dtype", "q8", "q8_0"), ("format", "openai", "openai-state-dict")]
)
def test_forms_of_an_export_are_named(name, wrong, near):
    message = refusal(EXPORT_GROUPS, **{name: wrong})
    assert f"{name}: '{wrong}'" in message
    assert near in message


def test_heads_of_an_import_are_a_number():
    assert "at least 0" in refusal(IMPORT_GROUPS, n_head=-1)
    assert "n_head" in refusal(IMPORT_GROUPS, n_head="two")
    assert resolve(IMPORT_GROUPS, {"n_head": Given("12", "x")}).flat()["n_head"] == 12


# --- spellings, bounds, choices ---


@pytest.mark.parametrize(
    "text", ["524288", "524_288", "524,288", "2^19", "2**19", " 524288 ", "5.24288e5", 524288, 524288.0, "+524288"]
)
def test_a_whole_number_has_many_spellings(text):
    value = train_settings(total_batch_tokens=text)[BatchOptions].total_batch_tokens
    assert value == 2**19
    assert type(value) is int


@pytest.mark.parametrize(
    "text", ["", "2^", "^2", "2^-1", "2^0.5", "2^99999999999", "1.5", "0x10", "²", "nan", "inf", "1e999", True, None, [1], HUGE]
)  # fmt: skip
def test_what_is_no_whole_number_is_refused(text):
    assert "total_batch_tokens" in refusal(total_batch_tokens=text)


@settings(max_examples=30)
@given(st.integers(1, 2**62))
def test_any_whole_number_survives_its_spellings(number):
    for text in (str(number), f"{number:_}", f"{number:,}"):
        assert train_settings(total_batch_tokens=text, n_positions=1)[BatchOptions].total_batch_tokens == number


@settings(max_examples=50)
@given(st.text(max_size=12))
def test_no_text_crashes_a_number(text):
    """Whatever is typed, the answer is a value or an explanation."""
    for name in ("n_layer", "learning_rate", "bf16"):
        try:
            outcome = str(train_settings(**{name: text}).flat()[name])
        except ConfigError as error:
            outcome = str(error)
        assert outcome.lstrip("-")[:1].isdigit() or outcome in ("True", "False") or f"{name}: {text!r}" in outcome


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "1e999", "abc", "", True, None, "1,5", HUGE])
def test_what_is_no_finite_number_is_refused(text):
    assert "learning_rate" in refusal(learning_rate=text)


@pytest.mark.parametrize(("text", "value"), [("true", True), ("False", False), (True, True), (None, None)])
def test_yes_and_no(text, value):
    assert train_settings(bf16=text).flat()["bf16"] is value


@pytest.mark.parametrize("text", ["yes", 1, 0, "", []])
def test_what_is_neither_yes_nor_no_is_refused(text):
    assert "torch_compile" in refusal(torch_compile=text)


@pytest.mark.parametrize(
    ("name", "good", "bad", "words"),
    [
        ("n_layer", 1, 0, "at least 1"),
        ("validation_fraction", 0, -0.1, "at least 0"),
        ("validation_fraction", 0.999, 1, "below 1"),
        ("min_lr_rate", 1, 1.01, "at most 1"),
        ("num_train_epochs", 0.001, 0, "above 0"),
        ("vocab_size", 257, 256, "at least 257 tokens"),
        ("learning_rate", 0, -1e-9, "at least 0"),
        ("adam_beta2", 0.9999, 1.0, "below 1"),
    ],
)
def test_bounds_hold_exactly_at_the_edge(name, good, bad, words):
    assert train_settings(**{name: good}).flat()[name] == good
    message = refusal(**{name: bad})
    assert words in message
    assert str(bad) in message


def test_a_choice_names_all_and_the_nearest():
    message = refusal(lr_scheduler_type="cosin")
    assert "linear" in message
    assert "did you mean cosine?" in message
    assert train_settings(lr_scheduler_type="linear")[ScheduleOptions].lr_scheduler_type == "linear"


def test_texts_are_one_or_several():
    def sources(value):
        return resolve(PREPARE_GROUPS, {"validation_source": Given(value, "x")}).flat()["validation_source"]

    assert sources("a.txt") == sources(["a.txt"]) == sources((Path("a.txt"),)) == ("a.txt",)
    assert sources(["a", "b"]) == ("a", "b")
    for wrong in (5, [1], None):
        assert "validation_source" in refusal(PREPARE_GROUPS, validation_source=wrong)


def test_flags_are_accepted_with_dash_and_underscore(tmp_path, text_file):
    for number, spelling in enumerate((["--shard_tokens", "1000"], ["--shard-tokens=1000"], ["--shard_tokens=1000"])):
        result = command("prepare", text_file, "--output_dir", tmp_path / str(number), "--tokenizer", "byte", *spelling)
        assert result.code == 0, result.err
        assert (tmp_path / str(number) / "train-00001.npy").is_file()


# --- the plan ---


@given(st.integers(1, 3000), st.integers(1, 70), st.integers(1, 9))
def test_micro_batches_partition_the_global_batch_for_any_world(windows, micro, world):
    world = min(world, windows)
    passes = [micro_batches(windows, micro, world, rank) for rank in range(world)]
    covered = [first + i for own in passes for first, count in own for i in range(count)]
    # Every window once, in the same order whatever the number of ranks.
    assert covered == list(range(windows))
    assert all(0 < count <= micro for own in passes for _, count in own)
    # No rank works more than one window longer than another.
    sizes = [sum(count for _, count in own) for own in passes]
    assert max(sizes) - min(sizes) <= 1


def plan(windows=100, world_size=1, rank=0, **options):
    resolved = train_settings(n_positions=16, n_embd=16, n_head=2, **options)
    groups = (resolved[group] for group in (ModelOptions, BatchOptions, ScheduleOptions, RunOptions))
    return plan_run(*groups, windows=windows, world_size=world_size, rank=rank)


def test_accumulation_follows_from_the_global_batch():
    made = plan(total_batch_tokens=165, per_device_train_batch_size=4)
    assert (made.windows_per_step, made.tokens_per_step) == (10, 160)
    assert made.micro_batches_at(1) == ((0, 4), (4, 4), (8, 2))


def test_the_global_batch_follows_from_accumulation():
    made = plan(gradient_accumulation_steps=3, per_device_train_batch_size=4, world_size=2, rank=1)
    assert made.windows_per_step == 24
    assert made.micro_batches_at(1) == ((12, 4), (16, 4), (20, 4))


def test_epochs_and_steps_agree():
    made = plan(windows=101, total_batch_tokens=160, num_train_epochs=2.0)
    assert made.total_steps == 21
    assert made.epochs == pytest.approx(2.079, abs=1e-3)
    assert plan(max_steps=7).total_steps == 7


@pytest.mark.parametrize(("warmup", "steps"), [(0, 0), (0.05, 10), (1, 1), (30, 30), (0.5, 100)])
def test_warmup_below_one_is_a_fraction(warmup, steps):
    assert plan(max_steps=200, warmup_steps=warmup).warmup_steps == steps


def test_more_ranks_than_windows_is_refused_with_the_number_that_works():
    with pytest.raises(ConfigError, match="give at least 64"):
        plan(total_batch_tokens=48, world_size=4)
    assert plan(total_batch_tokens=64, world_size=4, rank=3).micro_batches_at(1) == ((3, 1),)


# --- the contract with Hugging Face's names ---


@pytest.fixture(scope="module")
def hugging_face():
    """Name to default of TrainingArguments, GPT2Config and GenerationConfig."""
    from transformers import GenerationConfig, GPT2Config, TrainingArguments

    generation = GenerationConfig()
    # Since version 5 the class holds None, and what that stands for is filled in when generating.
    filled = generation._get_default_generation_params()
    found = {name: filled.get(name, value) for name, value in generation.to_dict().items()}
    return found | GPT2Config().to_dict() | {f.name: f.default for f in fields(TrainingArguments)}


@pytest.mark.parametrize(("group", "declaration"), DECLARED)
def test_an_option_is_hugging_faces_or_says_why(group, declaration, hugging_face):
    name, why = declaration.name, declaration.metadata["why"]
    assert declaration.metadata["help"].strip()
    if why.strip():
        return
    assert name in hugging_face, f"{name} is no field of Hugging Face's, and does not say why"
    if name not in PRESET_OPTIONS or group is not ModelOptions:
        assert declaration.default == hugging_face[name], f"{name} has another default, and does not say why"


def test_the_preset_gpt2_is_hugging_faces_shape(hugging_face):
    shape = {name: value for name, value in PRESETS["gpt2"].items() if name in hugging_face and name.startswith("n_")}
    assert len(shape) == 4
    assert all(hugging_face[name] == value for name, value in shape.items())


@pytest.mark.parametrize("name", COMMANDS)
def test_names_are_unique_within_a_command(name):
    counts = Counter(f.name for group in COMMANDS[name] for f in fields(group))
    assert [option for option, count in counts.items() if count > 1] == []


@pytest.mark.parametrize(("group", "declaration"), DECLARED)
def test_a_default_keeps_its_own_rules(group, declaration):
    name, groups = declaration.name, next(groups for groups in COMMANDS.values() if group in groups)
    options = {"model": Given("gpt2", "test")} if groups is TRAIN_GROUPS and name != "model" else {}
    resolved = resolve(groups, options | {name: Given(declaration.default, "test")})
    assert getattr(resolved[group], name) == declaration.default
    assert resolved.origins[name] == "test"


def test_presets_set_only_declared_options_and_all_the_same_ones():
    declared = {f.name for group in TRAIN_GROUPS for f in fields(group)}
    assert declared >= PRESET_OPTIONS
    assert {frozenset(values) for values in PRESETS.values()} == {PRESET_OPTIONS}


def test_the_reference_page_is_up_to_date():
    page = Path(__file__).parents[1] / "docs" / "reference" / "options.md"
    assert page.read_text(encoding="utf-8") == reference()
    assert all(f"`{f.name}`" in reference() for group in GROUPS for f in fields(group))


@settings(max_examples=30)
@given(st.dictionaries(st.sampled_from(["n_layer", "n_head", "n_embd", "seed"]), st.integers(-5, 5)))
def test_a_file_and_python_arguments_give_the_same(tmp_path_factory, options):
    """One parser: what TOML says and what Python says differ only in the origin."""
    document = tomllib.loads(tomli_w.dumps(options))

    def outcome(values, origin):
        try:
            return train_settings(origin, **values).flat()
        except ConfigError as error:
            return str(error).replace(origin, "")

    assert outcome(document, "a.toml") == outcome(options, "argument")
