"""Data sets: paths, numbers and texts mean what their author wrote, or their row is refused."""

import json
import re
import time
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, Features, Value

from socpo_fast.socratic.data import load_questions
from socpo_fast.socratic.data_files import MAX_LINE_BYTES
from socpo_fast.socratic.question_rows import MAX_PROMPT_CHARS

MARK = "\ufeff"


def write(path: Path, *rows: Any) -> Path:
    """Writes rows, or lines as they are, to a JSONL file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def line(truth: str) -> str:
    return '{"question": "?", "ground_truth": ' + truth + "}"


def truths(path: Path, **options: Any) -> list[str]:
    return [question.ground_truth for question in load_questions(str(path), **options)]


def refusal(path: Path, **options: Any) -> str:
    with pytest.raises(ValueError, match="data: ") as error:
        load_questions(str(path), **options)
    return str(error.value)


@pytest.mark.parametrize("name", ["[v1]", "a*", "what?", "{a,b}", "**", "a b", "test", "#1"])
def test_a_path_is_no_pattern(tmp_path: Path, name: str) -> None:
    """Files and folders beside it that the name would match as a pattern are not read."""
    for folder in ("v", "1", "ab", "whatx", "a", "x"):
        write(tmp_path / folder / "train.jsonl", line('"wrong"'))
        write(tmp_path / f"{folder}.jsonl", line('"wrong"'))
    path = write(tmp_path / name / f"train-{name}.jsonl", line("1"))
    assert truths(path) == truths(path.parent) == ["1"]
    parquet = tmp_path / f"{name}.parquet"
    Dataset.from_list([{"question": "?", "ground_truth": "2"}]).to_parquet(parquet)
    assert truths(parquet) == ["2"]


def test_a_file_gives_the_rows_of_its_folder(tmp_path: Path) -> None:
    written = ["9007199254740993", "2.5", '"2020-01-01"', '"007"', "1.50", '"1e3"', '"NaN"', "0"]
    path = write(tmp_path / "a" / "train.jsonl", *map(line, written))
    read = ["9007199254740993", "2.5", "2020-01-01", "007", "1.50", "1e3", "NaN", "0"]
    assert truths(path) == truths(path.parent) == read
    listed = tmp_path / "b" / "train.json"
    listed.parent.mkdir()
    listed.write_text("[" + ",\n".join(map(line, written)) + "]", encoding="utf-8")
    assert truths(listed.parent) == read


def test_bad_rows_of_a_folder_name_their_file(tmp_path: Path) -> None:
    write(tmp_path / "train-0.jsonl", line("1"))
    write(tmp_path / "train-1.jsonl", line("1"), "", line("null"))
    assert refusal(tmp_path) == "data: train-1.jsonl row 3: ground_truth is missing"
    assert truths(write(tmp_path / "ok" / "train.jsonl", line("1"))) == ["1"]


def test_kinds_that_guess_types_are_refused(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("question,ground_truth\n?,007\n")
    error = refusal(tmp_path)
    assert "must hold parquet or JSON lines" in error
    assert f"{tmp_path}/train.csv" in error


def test_byte_order_marks(tmp_path: Path) -> None:
    """The first one is an editor's; later ones come from joined files."""
    path = write(tmp_path / "a" / "train.jsonl", MARK + line("1"), MARK + line("2"), MARK)
    assert truths(path) == truths(path.parent) == ["1", "2"]


FLOATS = ["0.1", "0.00001", "-0.0"]
NUMBERS = {
    "0.00001": "0.00001",
    "1e-5": "0.00001",
    "1e22": "1" + "0" * 22,
    "-0.0": "-0.0",
    "2.50": "2.50",
    "123456789012345678901234567890.5": "123456789012345678901234567890.5",
    "-7": "-7",
}


def test_json_numbers_keep_their_digits(tmp_path: Path) -> None:
    path = write(tmp_path / "train.jsonl", *map(line, NUMBERS))
    assert truths(path) == truths(tmp_path) == list(NUMBERS.values())


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    ("values", "read"),
    [
        (pa.array([0.1, 1e-5, -0.0, 1e22], pa.float64()), [*FLOATS, "1" + "0" * 22 + ".0"]),
        (pa.array([0.1, 1e-5, 16777216.0], pa.float32()), ["0.1", "0.00001", "16777216.0"]),
        (pa.array([0.1], pa.float16()), ["0.1"]),
        (pa.array([2**63 - 1, -1], pa.int64()), ["9223372036854775807", "-1"]),
        (pa.array([2**64 - 1], pa.uint64()), ["18446744073709551615"]),
        (pa.array([Decimal("2.50"), Decimal("1.00")], pa.decimal128(9, 2)), ["2.50", "1.00"]),
        (pa.array([Decimal("0.0000000100")], pa.decimal128(12, 10)), ["0.0000000100"]),
        (pa.array(["007", "1e3"], pa.large_string()), ["007", "1e3"]),
        (pa.array(["B", "A"]).dictionary_encode(), ["B", "A"]),
    ],
)
def test_parquet_numbers(tmp_path: Path, values: Any, read: list[str], nested: bool) -> None:
    path = tmp_path / "train.parquet"
    names = ["prompt", "reward_model"] if nested else ["question", "ground_truth"]
    column = pa.StructArray.from_arrays([values], ["ground_truth"]) if nested else values
    pq.write_table(pa.table([["?"] * len(values), column], names), path)
    assert truths(path) == truths(tmp_path) == read


def test_labels_are_read_by_name(tmp_path: Path) -> None:
    features = Features({"question": Value("string"), "ground_truth": ClassLabel(names=["A", "B"])})
    rows = {"question": ["?", "?"], "ground_truth": [1, 0]}
    Dataset.from_dict(rows, features).to_parquet(tmp_path / "train.parquet")
    assert truths(tmp_path) == ["B", "A"]


def test_a_column_may_be_empty_in_a_row(tmp_path: Path) -> None:
    rows = [
        {"prompt": "1?", "reward_model": {"ground_truth": "1"}, "question": None},
        {"prompt": None, "reward_model": None, "question": "2?", "ground_truth": "2"},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="row 2: ground_truth is missing"):
        load_questions(str(tmp_path / "a.parquet"))
    pq.write_table(
        pa.Table.from_pylist([{**rows[0], "ground_truth": None}, rows[1]]), tmp_path / "b.parquet"
    )
    assert truths(tmp_path / "b.parquet") == ["1", "2"]


@pytest.mark.parametrize(
    ("truth", "reason"),
    [
        ('["4", "four"]', "ground_truth must be text or a number, got ['4', 'four']"),
        ('{"target": "4"}', "ground_truth must be text or a number, got {'target': '4'}"),
        ("[]", "ground_truth must be text or a number, got []"),
        ("true", "ground_truth must be text or a number, got True"),
        ("Infinity", "ground_truth must be text or a number, got inf"),
        ("1e4000", "ground_truth must be a number of at most 1000 digits, got 1E+4000"),
        ("1e99999999999999999999", "must be a JSON object, got"),
        ('"  "', "ground_truth must not be blank, got '  '"),
        (r'"\u200b\ufeff\n"', "ground_truth must not be blank, got"),
    ],
)
def test_bad_ground_truths_name_their_row(tmp_path: Path, truth: str, reason: str) -> None:
    path = write(tmp_path / "train.jsonl", line("1"), line(truth))
    assert refusal(path).startswith(f"data: train.jsonl row 2: {reason}")
    assert refusal(path) == refusal(tmp_path)


@pytest.mark.parametrize(
    ("truth", "text"),
    [
        ('["4", "four", 0.00001]', '["4", "four", 0.00001]'),
        (
            '{"target":1e2,"unit":null,"é":[true]}',
            '{"target": 100, "unit": null, "é": [true]}',
        ),
        ("2.50", "2.50"),
        ('"4"', "4"),
    ],
)
def test_truths_as_json(tmp_path: Path, truth: str, text: str) -> None:
    """With the setting, a list or an object reaches the user's grader, its digits kept."""
    path = write(tmp_path / "train.jsonl", line(truth))
    (question,) = load_questions(str(path), truths_as_json=True)
    assert question.ground_truth == text


def test_objects_of_parquet_as_json(tmp_path: Path) -> None:
    truth = {"target": 0.5, "accept": ["half", "1/2"]}
    table = pa.Table.from_pylist([{"question": "?", "ground_truth": truth}])
    pq.write_table(table, tmp_path / "train.parquet")
    (question,) = load_questions(str(tmp_path / "train.parquet"), truths_as_json=True)
    assert json.loads(question.ground_truth) == truth


@pytest.mark.parametrize("truth", ["[]", "{}", "[NaN]", "true", "null"])
def test_truths_that_stay_bad(tmp_path: Path, truth: str) -> None:
    path = write(tmp_path / "train.jsonl", line(truth))
    with pytest.raises(ValueError, match="row 1: ground_truth (must be|is missing)"):
        load_questions(str(path), truths_as_json=True)


@pytest.mark.parametrize("value", [date(2020, 1, 1), b"4", [4.0], {"a": 1}, True])
def test_bad_parquet_ground_truths(tmp_path: Path, value: Any) -> None:
    path = tmp_path / "train.parquet"
    pq.write_table(pa.Table.from_pylist([{"question": "?", "ground_truth": value}]), path)
    assert "train.parquet row 1: ground_truth must be text or a number, got" in refusal(path)


def messages_of(tmp_path: Path, prompt: Any) -> tuple[dict[str, str], ...]:
    row = {"prompt": prompt, "reward_model": {"ground_truth": "1"}}
    return load_questions(str(write(tmp_path / "train.jsonl", row)))[0].messages


def test_forms_of_a_prompt(tmp_path: Path) -> None:
    user = {"role": "user", "content": "1 + 1?"}
    parts = [{"type": "text", "text": "1 + "}, {"type": "text", "text": "1?", "image": None}]
    assert messages_of(tmp_path, "1 + 1?") == (user,)
    assert messages_of(tmp_path, [{"role": "user", "content": parts}]) == (user,)
    system = {"role": "system", "content": "Add."}
    assert messages_of(tmp_path, [{**system, "role": "developer"}, user]) == (system, user)
    image = {"type": "image_url", "image_url": {"url": "x"}}
    for part in (image, "text", {"type": "text"}, {"text": "x"}):
        with pytest.raises(ValueError, match=r"row 1: the user message must have text, got "):
            messages_of(tmp_path, [{"role": "user", "content": [parts[0], part]}])
    with pytest.raises(ValueError, match=r"row 1: the user message must have text, got ''"):
        messages_of(tmp_path, [{"role": "user", "content": []}])


CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": "{}"}}


@pytest.mark.parametrize(
    ("field", "value"),
    [("tool_calls", [CALL]), ("reasoning_content", "2"), ("name", "Ann"), ("weight", 1)],
)
def test_other_fields_of_messages_are_refused(tmp_path: Path, field: str, value: Any) -> None:
    """A template might read them. Empty ones are columns that other rows use."""
    user = {"role": "user", "content": "1 + 1?"}
    answer = {"role": "assistant", "content": "2"}
    empty = {field: type(value)()}
    assert messages_of(tmp_path, [user, {**answer, **empty}, user]) == (user, answer, user)
    assert messages_of(tmp_path, [{**user, field: None}]) == (user,)
    reason = f"row 1: a message must have no other field than role and content, got {[field]}"
    with pytest.raises(ValueError, match=re.escape(reason)):
        messages_of(tmp_path, [user, {**answer, field: value}, user])


def test_fields_of_messages_in_parquet(tmp_path: Path) -> None:
    """A column of structs gives every message all fields."""
    messages = [[{"role": "user", "content": "?"}], [{"role": "user", "content": "?", "name": "A"}]]
    rows = [{"prompt": prompt, "reward_model": {"ground_truth": "1"}} for prompt in messages]
    pq.write_table(pa.Table.from_pylist(rows[:1]), tmp_path / "a.parquet")
    table = pa.Table.from_pylist(rows[::-1])
    pq.write_table(table, tmp_path / "b.parquet")
    assert truths(tmp_path / "a.parquet") == ["1"]
    assert refusal(tmp_path / "b.parquet") == (
        "data: b.parquet row 1: a message must have no other field than role and content, got "
        "['name']"
    )


class Bridge:
    """A bridge whose template drops system messages."""

    takes_system = False
    counted: ClassVar[list[int]] = []

    def prompt_ids(self, messages: tuple[dict[str, str], ...]) -> list[int]:
        self.counted.append(len(messages))
        return [0]


def test_dropped_system_messages_are_refused(tmp_path: Path) -> None:
    options: dict[str, Any] = {"bridge": Bridge(), "max_prompt_tokens": 9}
    user = {"role": "user", "content": "?"}
    developer = {"role": "developer", "content": "Add."}
    row = {"prompt": [developer, user], "reward_model": {"ground_truth": "1"}}
    path = write(tmp_path / "train.jsonl", line("1"), row)
    assert refusal(path, **options) == (
        "data: train.jsonl row 2: must have no system message, the chat template drops it"
    )
    assert truths(write(path, line("1")), **options) == ["1"]


def test_the_reference_of_verl_rows(tmp_path: Path) -> None:
    row = {"prompt": "?", "reward_model": {"ground_truth": "4"}}
    extras: list[Any] = [
        {"answer": "2 + 2 #### 4"},
        {"answer": "4", "reference_solution": "2 + 2 = 4"},
        {"answer": None},
        {"answer": ""},
        None,
        {"answer": 4},
        {"answer": ["4"]},
    ]
    path = tmp_path / "train.jsonl"
    write(path, *({**row, "extra_info": extra} for extra in extras[:5]))
    assert [question.reference_solution for question in load_questions(str(path))] == [
        "2 + 2 #### 4",
        "2 + 2 = 4",
        None,
        None,
        None,
    ]
    for extra, value in ((extras[5], "4"), (extras[6], r"\['4'\]")):
        write(path, {**row, "extra_info": extra})
        with pytest.raises(ValueError, match=f"row 1: extra_info.answer must be text, got {value}"):
            load_questions(str(path))


def test_length_is_checked_before_content(tmp_path: Path) -> None:
    """Broken JSON of that length is refused for its length; the prompt is never tokenized."""
    path = write(tmp_path / "train.jsonl", "{" + "x" * MAX_LINE_BYTES)
    assert refusal(path) == (
        f"data: train.jsonl row 1: must have at most {MAX_LINE_BYTES} bytes, got "
        f"{MAX_LINE_BYTES + 1}"
    )
    write(path, {"question": "x" * 20_000_000, "ground_truth": "1"})
    Bridge.counted.clear()
    assert refusal(path, bridge=Bridge(), max_prompt_tokens=9) == (
        f"data: train.jsonl row 1: prompt must have at most {MAX_PROMPT_CHARS} characters, got "
        "20000000"
    )
    assert Bridge.counted == []


def test_time_is_linear_in_the_rows(tmp_path: Path) -> None:
    seconds = []
    for number in (4_000, 40_000):
        path = write(tmp_path / f"{number}.jsonl", *[line("2.5")] * number)
        start = time.perf_counter()
        assert len(truths(path)) == number
        seconds.append(time.perf_counter() - start)
    assert seconds[1] <= 15 * seconds[0]
