"""Defines the section of the data: where questions come from, and who grades an answer."""

from typing import Annotated, Any

from pydantic import Field, model_validator

from socpo_fast.config.sections import Section, Tokens
from socpo_fast.config.text import LocalPath, one_of
from socpo_fast.registries import GRADERS


class DataConfig(Section):
    """Questions and how an answer is graded."""

    train: LocalPath = Field(
        default="builtin",
        min_length=1,
        description="JSONL or parquet file, hub data set, or builtin",
    )
    eval: LocalPath | None = Field(
        default="builtin",
        description="held-out questions, the same kinds; none = no evaluation (default with own "
        "data.train)",
    )
    train_split: str = Field(
        default="train", min_length=1, description="split of a folder or hub data set to train on"
    )
    eval_split: str = Field(
        default="test", min_length=1, description="split of a folder or hub data set held out"
    )
    subset: str | None = Field(
        default=None, description="subset of a hub data set that has several; none = it has one"
    )
    question_column: str | None = Field(
        default=None,
        min_length=1,
        description="column with the question, text or messages, a.b = b inside a; none = prompt "
        "or question",
    )
    ground_truth_column: str | None = Field(
        default=None,
        min_length=1,
        description="column with the right answer; none = reward_model.ground_truth beside prompt, "
        "else ground_truth",
    )
    reference_solution_column: str | None = Field(
        default=None,
        min_length=1,
        description="column with a worked solution; none = extra_info.reference_solution or "
        "extra_info.answer beside prompt, else reference_solution",
    )
    system_column: str | None = Field(
        default=None,
        min_length=1,
        description="column with a system message; none = system beside question",
    )
    grader: Annotated[str, *one_of(GRADERS, or_function=True)] = Field(
        default="exact",
        description="who grades an answer; module:function(text, question) is your own",
    )
    truths_as_json: bool = Field(
        default=False, description="truths may be lists or objects; your grader gets their JSON"
    )
    max_prompt_tokens: Tokens = Field(
        default=2048, ge=1, description="longest prompt in tokens; longer ones are left out"
    )
    builtin_train_questions: int = Field(
        default=20_000, ge=1, le=20_000, description="built-in training questions"
    )
    builtin_eval_questions: int = Field(
        default=200, ge=1, le=20_000, description="built-in held-out questions"
    )

    @model_validator(mode="before")
    @classmethod
    def _no_evaluation_on_other_data(cls, table: Any) -> Any:
        """Makes eval default to none if data.train is the user's own."""
        # The built-in held-out questions would say nothing about such a student.
        is_user_data = isinstance(table, dict) and table.get("train", "builtin") != "builtin"
        return {"eval": None, **table} if is_user_data else table
