import pickle
import re
from pathlib import Path

import pytest

from cl_dist import errors
from cl_dist.errors import ClDistError, ConfigError, DataError, StageConflictError, require

ALL = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, ClDistError)]


def test_exit_codes_are_those_of_the_command_line() -> None:
    codes = {kind.__name__: kind.exit_code for kind in ALL}
    assert codes == {
        "ClDistError": 1,
        "ConfigError": 2,
        "DataError": 3,
        "ClusterError": 4,
        "TrainingError": 5,
        "ProtectionError": 5,
        "EmptiedParameterError": 5,
        "CheckpointError": 6,
        "StorageError": 6,
        "OrderError": 6,
        "RunInUseError": 2,
        "StoppedError": 75,
        "StageConflictError": 6,
        "JobError": 7,
        "QualityError": 8,
    }


def test_the_page_of_commands_lists_every_exit_code() -> None:
    page = (Path(__file__).parents[2] / "launcher/README.md").read_text(encoding="utf8")
    codes = {int(code) for code in re.findall(r"^\| (\d+) \|", page, flags=re.MULTILINE)}
    assert codes == {kind.exit_code for kind in ALL} | {0, 130}


def test_a_conflict_names_each_setting_with_both_values_and_what_to_do() -> None:
    error = StageConflictError("01-film/train", {"train.lr": (0.1, 0.2), "seed": (0, 1)})
    assert "01-film/train is already done with different settings" in str(error)
    assert "  train.lr: finished with 0.1, now 0.2" in str(error)
    assert "  seed: finished with 0, now 1" in str(error)
    assert "run.name=" in str(error)


@pytest.mark.parametrize("kind", ALL)
def test_errors_survive_the_way_back_from_a_worker(kind: type[ClDistError]) -> None:
    error = StageConflictError("a/b", {"seed": (0, 1)}) if kind is StageConflictError else kind("what happened")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind
    assert str(copy) == str(error)
    assert vars(copy) == vars(error)


def test_require_names_the_field_its_value_and_what_was_expected() -> None:
    require(True, "lr", 1.0, "anything")
    with pytest.raises(ConfigError, match=r"^lr=-1: expected a number above 0$"):
        require(False, "lr", -1, "a number above 0")


def test_no_message_holds_what_a_terminal_obeys() -> None:
    said = str(DataError("file \x1b[31m\x9b\r\ud83d:\n\tline"))
    assert said == "file \\x1b[31m\\x9b\\r\\ud83d:\n\tline"
