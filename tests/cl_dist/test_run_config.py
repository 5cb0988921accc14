import json
import re
from pathlib import Path

import pytest
import yaml
from jsonschema import Draft202012Validator

from cl_dist.config import Section, Tree, apply_overrides, parse, read_yaml
from cl_dist.errors import ConfigError
from cl_dist.methods import METHODS
from cl_dist.methods.ctr import CtrConfig
from cl_dist.methods.finetune import FinetuneConfig
from cl_dist.run_config import ClusterConfig, RunConfig, RunSection, Science, json_schema, read_run_file

RECIPES = sorted((Path(__file__).parents[2] / "launcher" / "recipes").glob("*.yaml"))
IDS = ("food", "film", "topic")


def tree(*overrides: str) -> Tree:
    tasks = [{"id": name, "source": {"kind": "jsonl", "path": f"{name}.jsonl"}} for name in IDS]
    science = {"model": {"source": "bert"}, "method": {"name": "ctr"}, "tasks": tasks}
    return apply_overrides({"run": {"name": "r"}, "science": science}, overrides)


def config(*overrides: str) -> RunConfig:
    return parse(RunConfig, tree(*overrides))


def order(*overrides: str) -> list[str]:
    return [task.id for task in config(*overrides).science.sequence().tasks]


def test_the_settings_of_a_method_are_those_of_its_name() -> None:
    ctr = config("science.method.sparsity=0.5").science.method
    assert ctr == CtrConfig(sparsity=0.5)
    tuned = config("science.method={name: joint, tune: head}").science.method
    assert tuned == FinetuneConfig(name="joint", tune="head")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("science.method.name=crt", r"^science.method: name='crt' is not a method; did you mean 'ctr'\?$"),
        ("science.method={tune: head}", r"name=None is not a method; known: adapter, ctr, .*, sequential"),
        ("science.method.tsm_sise=3", r"unknown key 'tsm_sise'; did you mean 'tsm_size'\?"),
        ("science.method={name: joint, sparsity: 1}", r"unknown key 'sparsity'"),
        ("science.method.sparsity=-1", r"sparsity.*greater than or equal to 0"),
        ("science.rows={train: 0}", r"^science.rows.train=0: .*greater than 0"),
        ("science.rows={tran: 9}", r"^science.rows: unknown key 'tran'; did you mean 'train'\?$"),
        ("science.methd=1", r"^science: unknown key 'methd'; did you mean 'method'\?$"),
        ("cluster.worker=2", r"^cluster: unknown key 'worker'; did you mean 'workers'\?$"),
        ("run.name=../x", r"^run.name='../x'"),
        ("run.dir=/etc/passwd", r"^run: dir='/etc/passwd': /etc/passwd is not a directory; choose a directory"),
        ("run.dir=/dev/null/x", r"^run: dir='/dev/null/x': /dev/null is not a directory"),
        ("run.dir=~no.such.user/x", r"^run: dir=~no.such.user/x: this user does not exist on this machine"),
        ('run.dir="a\\0b"', r"^run.dir='a\\x00b': contains a zero byte"),
        (f"run.dir={'x' * 5000}", r"^run.dir='x{199}: is too long: at most"),
        (f"run.dir={'x/' * 2000}", r"is too long: at most"),
        ('science.order_file="\\0"', r"^science.order_file='\\x00': contains a zero byte"),
        ('science.tasks.0.source.path="\\0"', r"^science.tasks.0.source.path='\\x00': contains a zero byte"),
        ('science.tasks.0.source.path="\\ud800"', r"^science.tasks.0.source.path: contains half"),
        ('science.model.source="a\\0b"', r"^science.model.source='a\\x00b': contains a zero byte"),
        ("science.model.config={initializer_range: .nan}", r"initializer_range=nan: expected a finite number"),
        ("science.train.global_batch=1000000000000000", r"train.global_batch=10{15}: Input should be less than"),
        ("science.tasks.1.train={global_batch: 2000000}", r"film.train: global_batch=2000000: Input should be less"),
        ("science.tasks=[]", r"^science.tasks: "),
        ("science.tasks.1.id=food", r"ids must be distinct, got \['food', 'food', 'topic'\]"),
        ("science.tasks.1.train={epoch: 2}", r"tasks.film.train: .*'epoch'; did you mean 'epochs'"),
        ("science.tasks.1.train={epochs: 0}", r"tasks.film.train: epochs=0: .*greater than 0"),
        ("cluster={workers: 2, dispatcher: local}", r"workers=2 is not supported with dispatcher: local"),
        ("cluster={workers: 2, engine: torch}", r"workers=2 is not supported with engine: torch"),
    ],
)
def test_a_bad_setting_is_named_with_what_was_expected(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(override)


def test_a_task_may_depart_from_the_training_settings() -> None:
    science = config("science.train={lr: 0.1, epochs: 3}", "science.tasks.film.train={epochs: 9}").science
    food, film, _ = (science.train_of(task) for task in science.tasks)
    assert (food.lr, food.epochs) == (0.1, 3)
    assert (film.lr, film.epochs) == (0.1, 9)


def test_without_an_order_tasks_are_learned_as_listed() -> None:
    assert order() == list(IDS)


def test_an_order_is_a_list_a_name_or_a_line_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "orders.txt"
    file.write_text("0\ttopic\tfood\n1\tfilm\ttopic # a comment\n")
    assert order("science.order=[topic, food]") == ["topic", "food"]
    named = "science.orders={a: [film, food], b: [topic]}"
    assert order(named, "science.order=a") == ["film", "food"]
    assert order(named, "science.order=b") == ["topic"]
    assert order(f"science.order_file={file}") == ["topic", "food"]
    assert order(f"science.order_file={file}", "science.order=row1") == ["film", "topic"]
    assert order(f"science.order_file={file}", "science.order=[film]") == ["film"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["science.order=[food, flim]"], r"order\[1\]='flim': no such task; did you mean 'film'"),
        (["science.order=[food, food]"], r"order\[1\]='food': already at position 0"),
        (["science.orders={fast: [food]}", "science.order=fats"], r"'fats': no such order; did you mean 'fast'"),
        (["science.order_file=gone.txt"], r"gone.txt: no such file"),
    ],
)
def test_an_order_of_unknown_tasks_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        order(*overrides)


@pytest.mark.parametrize("cluster", ["{zero_stage: 0}", "{engine: torch}"])
def test_bfloat16_is_refused_where_no_float32_masters_are_kept(cluster: str) -> None:
    half = "science.model.dtype=bfloat16"
    with pytest.raises(ConfigError, match=r"dtype='bfloat16' needs .*zero_stage 1, 2 or 3"):
        config(half, f"cluster={cluster}")
    for stage in (1, 2, 3):
        assert config(half, f"cluster.zero_stage={stage}").science.model.dtype == "bfloat16"


def test_a_baseline_replaces_the_method_and_keeps_the_rest() -> None:
    run = config(
        "science.method={name: ctr, sparsity: 0.5}",
        "science.train={lr: 0.1, epochs: 3}",
        "cluster.workers=2",
        "baselines={alone: {method: {name: individual}, train: {lr: 0.2}}, sparse: {seed: 5}}",
    )
    alone = run.baseline("alone")
    assert alone.science.method == FinetuneConfig(name="individual")
    assert (alone.science.train.lr, alone.science.train.epochs) == (0.2, 3)
    assert alone.science.tasks == run.science.tasks
    assert alone.cluster == run.cluster
    assert alone.folder == Path("runs/r/baselines/alone")
    assert run.baseline("sparse").science.method == run.science.method
    assert run.baseline("sparse").science.seed == 5


def test_a_baseline_that_does_not_parse_is_told_with_the_run_file() -> None:
    with pytest.raises(ConfigError, match=r"baselines.alone.science.method: name='alone' is not a method"):
        config("baselines={alone: {method: {name: alone}}}")


def test_a_run_file_survives_being_written_out_resolved() -> None:
    run = config("science.method.sparsity=0.5", "baselines.b.seed=1", "science.tasks.0.rows={train: 3}")
    assert parse(RunConfig, yaml.safe_load(yaml.safe_dump(run.tree()))) == run


def test_a_file_names_the_run_unless_it_says_otherwise(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"science": tree()["science"]}))
    assert read_run_file(path).run.name == "mine"
    assert read_run_file(path, ["run.name=other", "science.seed=4"]).folder == Path("runs/other")


def test_the_run_folder_may_be_below_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    run = config("run.dir=~/runs", "baselines={b: {seed: 1}}")
    assert run.folder == tmp_path / "runs" / "r"
    assert run.baseline("b").folder == tmp_path / "runs" / "r" / "baselines" / "b"
    assert run.tree()["run"]["dir"] == "~/runs"  # another machine's home may be elsewhere


@pytest.mark.parametrize(
    ("sizes", "limit"),
    [
        ({"model_type": "bert", "max_position_embeddings": 32}, 32),
        ({"model_type": "distilbert", "max_position_embeddings": 32}, 32),
        ({"model_type": "roberta", "max_position_embeddings": 34, "pad_token_id": 1}, 32),
        ({"model_type": "roberta", "max_position_embeddings": 34}, 32),
        ({"model_type": "gpt2", "n_positions": 32}, 32),
        ({"model_type": "deberta-v2", "max_position_embeddings": 32}, 32),
        ({"model_type": "deberta-v2", "max_position_embeddings": 32, "position_biased_input": False}, None),
        ({"model_type": "modernbert", "max_position_embeddings": 32}, None),
        ({"model_type": "llama", "max_position_embeddings": 32}, None),
        ({"model_type": "bert"}, None),
    ],
)
def test_rows_longer_than_the_positions_of_a_model_are_refused_when_a_run_file_is_read(
    tmp_path: Path, sizes: Tree, limit: int | None
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"science": tree()["science"]}))
    for model in (f"science.model.source={tmp_path}", f"science.model.config={json.dumps(sizes)}"):
        assert read_run_file(path, [model, "science.train.max_length=32"])
        longer = [model, "science.train.max_length=32", "science.tasks.film.train={max_length: 33}"]
        if limit is None:
            assert read_run_file(path, longer)
            continue
        with pytest.raises(ConfigError, match=r"train.max_length=33: this model reads at most 32 tokens"):
            read_run_file(path, longer)


def test_a_model_that_writes_reads_no_more_than_it_was_trained_for(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"science": tree("science.method={name: lamol}")["science"]}))
    with pytest.raises(ConfigError, match=r"train.max_length=128: this model reads at most 32 tokens"):
        read_run_file(path, ["science.model.config={model_type: llama, max_position_embeddings: 32}"])


def properties(schema: Tree, name: str) -> set[str]:
    return set(schema["$defs"][name]["properties"])


def test_the_schema_holds_every_setting_of_every_section_and_method() -> None:
    schema = json_schema()
    sections: list[type[Section]] = [RunSection, Science, ClusterConfig, *(m.config for m in METHODS.values())]
    for section in sections:
        assert properties(schema, section.__name__) == set(section.model_fields)
    *known, other = schema["$defs"]["Science"]["properties"]["method"]["oneOf"]
    assert re.match(other["properties"]["name"]["anyOf"][0]["pattern"], "my_pkg.probe:METHOD")
    choices = {choice["$ref"].rpartition("/")[2] for choice in known}
    assert choices == {method.config.__name__ for method in METHODS.values()}
    assert set(schema["properties"]) == {"run", "science", "cluster", "baselines"}


def test_the_schema_is_one() -> None:
    Draft202012Validator.check_schema(json_schema())


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_fit_the_schema_and_parse(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ASC_DIR", "DSC_DIR", "TC_DIR", "WOZ_DIR", "ERASER_DIR"):
        monkeypatch.setenv(name, "somewhere")
    recipe = read_yaml(path)
    Draft202012Validator(json_schema()).validate(recipe)
    order = [task.id for task in read_run_file(path).science.sequence().tasks]
    asked = recipe["science"].get("order")
    if isinstance(asked, str):
        asked = recipe["science"]["orders"][asked]
    assert order == (asked or [task["id"] for task in recipe["science"]["tasks"]])
    for name in recipe.get("baselines", {}):
        assert read_run_file(path).baseline(name).science.sequence() == read_run_file(path).science.sequence()


@pytest.mark.parametrize(
    "override",
    [
        "science.methd=1",
        "science.method.tsm_sise=3",
        "science.method.name=crt",
        "cluster.zero_stage=4",
        "run.name=../x",
    ],
)
def test_the_schema_refuses_what_the_parser_refuses(override: str) -> None:
    validator = Draft202012Validator(json_schema())
    assert validator.is_valid(tree())
    assert not validator.is_valid(tree(override))
