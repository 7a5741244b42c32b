"""A task of `zconvert evaluate`: where its problems are, how they are asked, and how an answer is judged.

In a template `{field}` is what a row has under `field`; `{a.b}` goes into a mapping, or into JSON text; a list is its
lines; `{{` and `}}` are braces. Braces around anything else are left alone, so that `\\boxed{}` needs no care.
"""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from zconvert.recipe.sections import Count, CountOrZero, RecipeFile, Section, Text


def _pattern(value: str | None) -> str | None:
    if value is None:
        return None
    try:
        groups = re.compile(value).groups
    except re.error as error:
        raise ValueError(f"expected a regular expression: {error}") from None
    if groups != 1:
        raise ValueError(f"expected one group, which is what is taken, found {groups}")
    return value


class TaskDataset(Section):
    """The `dataset:` of a task; `--tasks NAME=FILE` reads the same rows from elsewhere."""

    path: Text = Field(description="a .jsonl or .parquet file, a folder of these, or a dataset's Hub id")
    name: Text | None = Field(None, description="configuration of a Hub dataset")
    split: Text = Field("test", description="split of a Hub dataset")
    revision: Text | None = Field(None, description="branch, tag or commit of a Hub dataset; null: its main branch")


class ExamplesSection(Section):
    """The `examples:` of a task: problems shown with their answers before the one that is asked."""

    rows: list[dict[str, Any]] = Field([], description="rows as the dataset's, written out")
    path: Text | None = Field(None, description="where they are read from, as dataset.path; null: the same dataset")
    split: Text | None = Field(None, description="split of a Hub dataset to read them from; null: none are read")
    count: CountOrZero = Field(0, description="how many are read, from the start")
    answer: str = Field("", description="template of what stands after an example's prompt")

    @model_validator(mode="after")
    def _one_kind(self) -> ExamplesSection:
        reads = self.path is not None or self.split is not None
        if reads and self.rows:
            raise ValueError("expected either rows, or path or split to read them from")
        if reads != (self.count > 0):
            raise ValueError("expected count together with path or split")
        if (reads or self.rows) and not self.answer:
            raise ValueError("expected answer: what stands after an example's prompt")
        return self


class AnswerSection(Section):
    """The `answer:` of a task: what counts as the answer in a text."""

    take: Literal["text", "regex", "last_number", "boxed", "code_block", "choice"] = Field(
        "text",
        description="text: all of it; regex: the group of the last match of pattern; last_number; boxed: what the last "
        "\\boxed{…} holds; code_block: the last fenced one, or all text where there is no fence; choice: the last "
        "letter that stands for an option",
    )
    pattern: Text | None = Field(None, description="regular expression with one group, for regex")
    choices: Text = Field("ABCD", description="letters of the options, for choice")

    @field_validator("pattern")
    @classmethod
    def _one_group(cls, value: str | None) -> str | None:
        return _pattern(value)

    @model_validator(mode="after")
    def _has_pattern(self) -> AnswerSection:
        if (self.take == "regex") != (self.pattern is not None):
            raise ValueError("expected a pattern where take is regex, and only there")
        return self


class CheckSection(Section):
    """The `check:` of a task: when an answer is right."""

    method: Literal["exact", "numeric", "set", "math", "code"] = Field(
        description="exact: the same text but for case and space; numeric: the same number; set: the same entries "
        "between commas; math: the same by symbolic maths (pip install 'zconvert[math]'); code: the tests pass"
    )
    target: Text | None = Field(None, description="template of the right answer, or of a text that holds it")
    target_pattern: Text | None = Field(
        None, description="regular expression with one group: the right answer in target"
    )
    tolerance: float = Field(1e-6, ge=0, description="numeric: how far off, relative to the right number and to 1")
    program: Text | None = Field(None, description="code: template of what is run; {answer} is the answer")
    tests: Text | None = Field(None, description="code: template of the source that is run after it and must not raise")
    cases: list[Text] = Field(
        [],
        description="code: fields with lists of {input, output}, as JSON or packed as LiveCodeBench does; each is "
        "given on stdin and compared with stdout, or given to function",
    )
    function: Text | None = Field(None, description="code: template of the name of the function, or method, under test")
    seconds: float = Field(10.0, gt=0, description="code: time for the program and its tests, or for each case")
    memory_mb: Count = Field(2048, description="code: address space of the program")

    @field_validator("target_pattern")
    @classmethod
    def _one_group(cls, value: str | None) -> str | None:
        return _pattern(value)

    @field_validator("tests")
    @classmethod
    def _tests_are_of_code(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is not None and info.data.get("method") != "code":
            raise ValueError("expected none, since method is not code")
        return value

    @model_validator(mode="after")
    def _is_whole(self) -> CheckSection:
        if self.method == "code":
            if self.program is None or (self.tests is None) == (not self.cases):
                raise ValueError("expected program, and one of tests and cases, since method is code")
        elif self.target is None:
            raise ValueError("expected target, the right answer")
        return self


class TaskRecipe(RecipeFile):
    """A task's file."""

    stage = "task"

    description: Text = Field(description="what is asked, in a line")
    dataset: TaskDataset = Field(description="where the problems are")
    id: Text | None = Field(None, description="template of a problem's name; null: its number")
    prompt: Text = Field(description="template of the question")
    chat: bool = Field(False, description="ask as a user does, by the tokenizer's chat template")
    system: Text | None = Field(None, description="system message, where chat")
    examples: ExamplesSection = Field(ExamplesSection(), description="problems shown with their answers")
    separator: str = Field("\n\n", description="between examples, where not chat")
    stop: list[Text] = Field([], description="texts at which an answer ends, not part of it")
    max_new_tokens: Count = Field(512, description="tokens of an answer, at most; an EOS token ends it earlier")
    answer: AnswerSection = Field(AnswerSection(), description="what counts as the answer")
    check: CheckSection = Field(description="when an answer is right")
    solution: Text | None = Field(
        None, description="template of a text with the right answer, for `zconvert tasks check`; null: rows have none"
    )
