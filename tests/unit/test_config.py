"""The YAML loader: the original's files load, every mistake names its key."""

from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mosaicbert.config import (
    ClassifyConfig,
    GlueConfig,
    PretrainConfig,
    check,
    dump_config,
    load_config,
)
from mosaicbert.duration import Duration, Progress
from mosaicbert.errors import ConfigError

ROOT = Path(__file__).parents[2]
TEST_YAML = ROOT / "yamls/test/main.yaml"
OURS = [
    *((PretrainConfig, path) for path in sorted(ROOT.glob("yamls/main/*.yaml"))),
    (PretrainConfig, TEST_YAML),
    (PretrainConfig, ROOT / "tests/golden/original/pretrain.yaml"),
    (ClassifyConfig, ROOT / "tests/golden/original/sequence_classification.yaml"),
    (GlueConfig, ROOT / "tests/golden/original/glue.yaml"),
    (ClassifyConfig, ROOT / "yamls/test/sequence_classification.yaml"),
    *((ClassifyConfig, path) for path in sorted(ROOT.glob("yamls/finetuning/*uncased.yaml"))),
    (GlueConfig, ROOT / "yamls/test/glue.yaml"),
    *((GlueConfig, path) for path in sorted(ROOT.glob("yamls/finetuning/glue/*uncased.yaml"))),
]


@pytest.mark.parametrize(("schema", "path"), OURS, ids=lambda v: getattr(v, "name", ""))
def test_yamls_of_ours_and_the_originals_load_and_dump_and_load_again(schema, path, tmp_path):
    config = load_config(schema, path)
    again = tmp_path / "again.yaml"
    again.write_text(dump_config(config))
    assert load_config(schema, again) == config


@pytest.mark.parametrize(
    ("schema", "name"), [(PretrainConfig, "main"), (ClassifyConfig, "sequence_classification")]
)
def test_a_run_without_a_folder_can_be_asked_for(schema, name):
    config = load_config(schema, ROOT / f"yamls/test/{name}.yaml", ["run_folder=null"])
    assert config.run_folder is None
    assert load_config(schema, config.model_dump(mode="json", by_alias=True)) == config


def test_glue_has_no_run_without_a_folder():
    with pytest.raises(ConfigError, match="run_folder: None is not allowed: must be a string"):
        load_config(GlueConfig, ROOT / "yamls/test/glue.yaml", ["run_folder=null"])


def test_a_task_without_settings_is_a_task():
    config = load_config(GlueConfig, ROOT / "tests/golden/original/glue.yaml")
    assert list(config.tasks) == ["mnli", "rte", "qqp", "cola"]


def test_main_recipe_has_the_published_values():
    config = load_config(PretrainConfig, ROOT / "yamls/main/mosaic-bert-base-uncased.yaml")
    assert config.max_duration == "286720000sp"
    assert config.global_train_batch_size == 4096
    assert (config.optimizer.lr, config.optimizer.betas) == (5e-4, (0.9, 0.98))
    assert (config.optimizer.eps, config.optimizer.weight_decay) == (1e-6, 1e-5)
    assert (config.scheduler.t_warmup, config.scheduler.alpha_f) == ("0.06dur", 0.02)
    assert config.train_loader.dataset.mlm_probability == 0.3
    assert config.eval_loader.dataset.mlm_probability == 0.15
    assert config.model.overrides["attention_probs_dropout_prob"] == 0.0


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("train_loader.dataset.shufle=true", 'dataset.shufle: unknown key. Did you mean "shuffle"'),
        ("optimizer.name=adamq", "optimizer.name: 'adamq' is not allowed: must be 'decoupled"),
        ("max_duration=10b", "max_duration: '10b' is not allowed: must be a time string"),
        (
            "global_train_batch_size=x",
            "global_train_batch_size: 'x' is not allowed: must be an int",
        ),
        ("global_train_batch_size=0", "global_train_batch_size: 0 is not allowed: must be greater"),
        ("device_train_microbatch_size=foo", "'foo' is not allowed: must be an integer or 'auto'"),
        ("optimizer.betas=[0.9]", "[0.9] is not allowed: must be a list of two values"),
        ("mlm_probability=a", "'a' is not allowed: must be a number or a list, such as [a]"),
        ("optimizer=5", "optimizer: 5 is not allowed: must be a section of keys"),
        ("optimizer.lr=-1", "optimizer.lr: -1 is not allowed: must be greater than 0"),
        ("optimizer.betas=[0.9,1.0]", "betas.1: 1.0 is not allowed: must be less than 1"),
        ("save_num_checkpoints_to_keep=-5", "-5 is not allowed: must be greater than or equal to"),
        ("foo=1", "foo: unknown key. Allowed here: run_name, seed"),
        ("eval_subset_num_batches=-2", "-2 is not allowed: must be greater than 0 or -1"),
        ("eval_subset_num_batches=0", "0 is not allowed: must be greater than 0 or -1"),
        ("train_subset_num_batches=-2", "-2 is not allowed: must be greater than 0 or -1"),
        ("seed=-1", "seed: -1 is not allowed: must be greater than or equal to 0"),
        ("seed=4294967296", "seed: 4294967296 is not allowed: must be less than or equal to"),
        ("train_loader.dataset.shuffle_seed=-1", "dataset.shuffle_seed: -1 is not allowed"),
        ("max_duration=", "max_duration: this key is needed"),
        ("foo", '"foo" is no override'),
        ("train_loader.dataset.local=${nowhere}", "'nowhere' not found"),
        ("model.model_config=3", "model.model_config: 3 is not allowed"),
        ("train_loader.dataset.streams={a: {sp: 1}}", "train_loader.dataset.streams.a.sp: unknown"),
    ],
)
def test_mistakes_name_their_key(word, said):
    with pytest.raises(ConfigError) as caught:
        load_config(PretrainConfig, TEST_YAML, [word])
    assert said in str(caught.value)


@pytest.mark.parametrize("key", ["model", "train_loader.dataset", "eval_loader.dataset"])
def test_data_model_and_checkpoints_have_one_tokenizer(key):
    """The section's own can only repeat the top-level one, which the others get."""
    with pytest.raises(ConfigError, match=rf"{key}\.tokenizer_name is 'mine', but tokenizer_name"):
        load_config(PretrainConfig, TEST_YAML, [f"{key}.tokenizer_name=mine"])
    config = load_config(PretrainConfig, TEST_YAML, ["tokenizer_name=mine"])
    assert config.train_loader.dataset.tokenizer_name == "mine"  # ${tokenizer_name}
    values = config.model_dump(mode="json", by_alias=True)
    for section in (values["model"], values["train_loader"]["dataset"]):
        del section["tokenizer_name"]
    config = load_config(PretrainConfig, values)
    assert config.train_loader.dataset.tokenizer_name == config.model.tokenizer_name == "mine"


def test_loaders_of_classification_have_the_tokenizer_of_the_run():
    path = TEST_YAML.with_name("sequence_classification.yaml")
    with pytest.raises(ConfigError, match=r"eval_loader\.tokenizer_name is 'mine'"):
        load_config(ClassifyConfig, path, ["eval_loader.tokenizer_name=mine"])


def test_subsets_may_be_all():
    words = ["train_subset_num_batches=-1", "eval_subset_num_batches=-1"]
    config = load_config(PretrainConfig, TEST_YAML, words)
    assert (config.train_subset_num_batches, config.eval_subset_num_batches) == (-1, -1)


@pytest.mark.parametrize("word", ["default_seed=-1", "tasks.rte.seeds=[1,-1]"])
def test_seeds_of_glue_are_bounded_too(word):
    with pytest.raises(ConfigError, match="-1 is not allowed: must be greater than or equal to 0"):
        load_config(GlueConfig, ROOT / "yamls/test/glue.yaml", [word])


def test_a_key_of_the_files_own_is_free_if_something_uses_it(tmp_path):
    text = TEST_YAML.read_text().replace("max_duration: 10ba", "max_duration: ${length}")
    path = tmp_path / "own.yaml"
    path.write_text(text + "\nlength: 7ba\n")
    assert load_config(PretrainConfig, path).max_duration == "7ba"
    path.write_text(TEST_YAML.read_text() + "\nlength: 7ba\n")
    with pytest.raises(ConfigError, match="length: unknown key"):
        load_config(PretrainConfig, path)


def test_files_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"no configuration file .*gone\.yaml"):
        load_config(PretrainConfig, tmp_path / "gone.yaml")
    bad = tmp_path / "bad.yaml"
    bad.write_text("a: [1,\nb: 2")
    with pytest.raises(ConfigError, match=r"bad\.yaml, line \d+: this is not YAML"):
        load_config(PretrainConfig, bad)
    bad.write_text("- 1\n- 2\n")
    with pytest.raises(ConfigError, match="keys and values"):
        load_config(PretrainConfig, bad)
    bad.write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(ConfigError, match=r"bad\.yaml"):
        load_config(PretrainConfig, bad)
    bad.write_text("a: !!python/object/apply:os.system ['true']")
    with pytest.raises(ConfigError, match="not YAML"):
        load_config(PretrainConfig, bad)


@pytest.mark.parametrize("word", ["run_name=\udcff", "run_name=${a\udcff}", "seed=\udcff"])
def test_bytes_on_the_command_line_that_are_no_utf8(word):
    with pytest.raises(ConfigError):
        load_config(PretrainConfig, TEST_YAML, [word])


@pytest.mark.parametrize("word", ["1e286720000sp", "9" * 400 + "ba", "9" * 400 + "s", "1e999dur"])
def test_times_beyond_all_numbers(word):
    with pytest.raises(ConfigError, match="longer than anything"):
        Duration.parse(word)


def test_all_mistakes_are_listed_at_once():
    with pytest.raises(ConfigError) as caught:
        load_config(PretrainConfig, TEST_YAML, ["seeed=1", "optimizer.lrr=2"])
    assert "seeed" in str(caught.value)
    assert "optimizer.lrr" in str(caught.value)


@given(st.dictionaries(st.text(max_size=8), st.text(max_size=8) | st.integers() | st.none()))
def test_any_mapping_is_an_error_for_people(values):
    with pytest.raises(ConfigError):
        check(GlueConfig, values)


@pytest.mark.parametrize(
    ("text", "value", "unit"),
    [
        ("10ba", 10, "ba"),
        ("10iter", 10, "ba"),
        ("286720000sp", 286720000, "sp"),
        ("1.5e9tok", 1.5e9, "tok"),
        ("0.06dur", 0.06, "dur"),
        ("1h30m", 5400, "sec"),
        ("90sec", 90, "sec"),
        ("3 ep", 3, "ep"),
        (7, 7, "ba"),
    ],
)
def test_time_strings(text, value, unit):
    assert Duration.parse(text) == Duration(value, unit)
    assert Duration.parse(str(Duration.parse(text))) == Duration(value, unit)


@given(
    st.builds(Duration, st.floats(0, allow_infinity=False), st.sampled_from(["dur", "sec"]))
    | st.builds(Duration, st.integers(0, 2**53), st.sampled_from(["ep", "ba", "sp", "tok"]))
)
@example(Duration(0.00005, "dur"))
@example(Duration(1234567.5, "sec"))
@example(Duration(0.123456789, "dur"))
def test_a_time_can_be_read_as_it_is_written(duration):
    assert Duration.parse(str(duration)) == duration


@pytest.mark.parametrize("text", ["", "ba", "10", "10b", "-1ba", "0.5ba", "1e", "h", "nanba", True])
def test_what_is_no_time_string_says_what_is(text):
    with pytest.raises(ConfigError, match=r"time string|whole number"):
        Duration.parse(text, "max_duration")


@given(st.text(max_size=12))
def test_any_text_is_a_time_or_a_clear_error(text):
    try:
        parsed = Duration.parse(text)
    except ConfigError:
        return
    assert parsed.value >= 0


def test_progress_counts_epochs_in_parts():
    progress = Progress(epoch=1, batch=30, batch_in_epoch=10, sample=480)
    assert progress.fraction_of(Duration(2, "ep"), batches_per_epoch=20) == 0.75
    assert progress.fraction_of(Duration(960, "sp")) == 0.5


def test_keys_of_a_section_are_listed_once():
    words = ["qqqq=1", "zzzz=2"]
    with pytest.raises(ConfigError) as error:
        load_config(PretrainConfig, {"max_duration": "1ba"}, words)
    assert str(error.value).count("Allowed here") == 1
    assert "zzzz: unknown key." in str(error.value)


@pytest.mark.parametrize(
    ("schema", "name", "job"),
    [
        (PretrainConfig, "glue", "glue"),
        (PretrainConfig, "sequence_classification", "classify"),
        (ClassifyConfig, "main", "pretrain"),
        (GlueConfig, "main", "pretrain"),
    ],
)
def test_a_yaml_of_another_job_is_told_by_its_command(schema, name, job):
    with pytest.raises(ConfigError, match=f"is a YAML for `mosaicbert {job}`"):
        load_config(schema, ROOT / f"yamls/test/{name}.yaml")


def test_a_folder_or_a_slip_in_place_of_a_yaml():
    with pytest.raises(ConfigError, match=r"is a folder\. .* has: glue\.yaml, main\.yaml"):
        load_config(PretrainConfig, ROOT / "yamls/test")
    with pytest.raises(ConfigError, match=r'Did you mean "main\.yaml"'):
        load_config(PretrainConfig, ROOT / "yamls/test/man.yaml")
