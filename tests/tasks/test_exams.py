"""Exam files of three layouts become the prompts that their authors published."""

from pathlib import Path
from typing import Any

import pytest

from tasks.exams import (
    Task,
    exam_requests,
    preset_hash,
    read_minimal_pairs,
    read_own_tasks,
    read_questions,
    subjects,
)

CEVAL = 'id,question,A,B,C,D,answer\n0,"猫是什么颜色，大家说？",红,蓝,绿,白,B\n'


def _write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, "utf-8")
    return path


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("animals_val.csv", CEVAL),
        ("animals.csv", ',Question,A,B,C,D,Answer\n0,"猫是什么颜色，大家说？",红,蓝,绿,白,B\n'),
        ("animals_test.csv", '"猫是什么颜色，大家说？",红,蓝,绿,白,B\n'),
    ],
)
def test_three_layouts_read_the_same(tmp_path: Path, name: str, text: str) -> None:
    (question,) = read_questions(_write(tmp_path, name, text))
    assert question.subject == "animals"
    assert question.text == "猫是什么颜色，大家说？"
    assert question.options == ("红", "蓝", "绿", "白")
    assert question.answer == 1


def test_empty_file_has_no_question(tmp_path: Path) -> None:
    assert read_questions(_write(tmp_path, "x.csv", "")) == []


def test_question_without_answer_names_its_row(tmp_path: Path) -> None:
    path = _write(tmp_path, "x.csv", CEVAL + "1,q,a,b,c,d,\n")
    with pytest.raises(ValueError, match=r"x\.csv, row 3: answer '' is none of"):
        read_questions(path)


def test_short_row_names_its_row(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="row 3: 2 fields"):
        read_questions(_write(tmp_path, "x.csv", CEVAL + "1,q\n"))


def test_letter_prompt_is_the_published_one(tmp_path: Path) -> None:
    questions = read_questions(_write(tmp_path, "animals_val.csv", CEVAL))
    (request,) = exam_requests(questions, questions, preset="ceval", shots=5, scoring=["letter"])
    asked = "猫是什么颜色，大家说？\nA. 红\nB. 蓝\nC. 绿\nD. 白\n答案："
    assert request.header == "以下是中国关于animals考试的单项选择题，请选出其中的正确答案。\n\n"
    assert request.prefix == (asked + "B\n\n",)
    assert request.prompt == asked
    assert request.continuations == ("A", "B", "C", "D")
    assert request.right == 1


def test_option_prompt_scores_whole_options(tmp_path: Path) -> None:
    text = "question,A,B,C,D,answer\nWhat does the cat eat?,rice,fish,nuts,bread,B\n"
    questions = read_questions(_write(tmp_path, "food.csv", text))
    (request,) = exam_requests(questions, [], preset="plain", shots=5, scoring=["option"])
    assert request.prompt + request.continuations[request.right] == "What does the cat eat? fish"


def test_wording_decides_the_hash() -> None:
    assert len({preset_hash(preset) for preset in ("ceval", "cmmlu", "mmlu", "plain")}) == 4


@pytest.mark.parametrize(
    ("preset", "header", "asked", "answer", "category"),
    [
        ("ceval", "以下是中国关于高中物理考试的单项选择题，请选出其中的正确答案。\n\n",
         "1+1？\nA. 1\nB. 2\nC. 3\nD. 4\n答案：", "B", ("STEM",)),
        ("cmmlu", "以下是关于高中物理学的单项选择题，请直接给出正确答案的选项。\n\n",
         "题目：1+1？\nA. 1\nB. 2\nC. 3\nD. 4\n答案是：", "B", ("STEM",)),
        ("mmlu", "The following are multiple choice questions (with answers) about high school "
         "physics.\n\n", "1+1？\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer:", " B", ("STEM",)),
    ],
)  # fmt: skip
def test_prompts_are_the_authors_own(
    tmp_path: Path, preset: Any, header: str, asked: str, answer: str, category: tuple[str, ...]
) -> None:
    text = "question,A,B,C,D,answer\n1+1？,1,2,3,4,B\n"
    questions = read_questions(_write(tmp_path, "high_school_physics_val.csv", text))
    (request,) = exam_requests(questions, questions, preset=preset, shots=5, scoring=["letter"])
    assert request.header == header
    assert request.prompt == asked
    assert request.prefix == (asked + answer + "\n\n",)
    assert request.continuations[1] == answer
    assert request.tags["category"] == category
    assert "high school" in request.tags["difficulty"]


def test_subjects_are_sorted_as_their_authors_sort_them() -> None:
    assert {exam: len(known) for exam, known in subjects().items()} == {
        "ceval": 52, "cmmlu": 67, "mmlu": 57,
    }  # fmt: skip
    hard = [name for name, known in subjects()["ceval"].items() if "hard" in known.difficulty]
    assert len(hard) == 8
    assert subjects()["cmmlu"]["ancient_chinese"].categories == ("Social Science", "China specific")


def test_all_subjects_of_the_published_files_are_known(shared_data: Path) -> None:
    for exam, folder in (("ceval", "ceval/val"), ("cmmlu", "cmmlu/test")):
        for path in (shared_data / "eval" / folder).glob("*.csv"):
            assert path.stem.removesuffix("_val") in subjects()[exam], path


def test_minimal_pairs_stop_at_the_limit_of_each_paradigm(tmp_path: Path) -> None:
    rows = "".join(
        f'{{"sentence_good": "好{i}", "sentence_bad": "坏{i}", "UID": "u{i % 2}"}}\n'
        for i in range(6)
    )
    requests = read_minimal_pairs(_write(tmp_path, "zhoblimp.jsonl", rows), per_paradigm=2)
    assert [request.id for request in requests] == [f"zhoblimp/{i}" for i in (1, 2, 3, 4)]
    assert requests[0].continuations == ("好0", "坏0")
    assert requests[0].group == "zhoblimp"


def test_blimp_is_sorted_by_field_and_phenomenon(tmp_path: Path) -> None:
    row = (
        '{"sentence_good": "a", "sentence_bad": "b", "UID": "adjunct_island", "field": "syntax", '
        '"linguistics_term": "island_effects"}\n'
    )
    (request,) = read_minimal_pairs(_write(tmp_path, "blimp.jsonl", row), per_paradigm=0)
    assert request.tags == {
        "paradigm": ("adjunct_island",), "field": ("syntax",), "phenomenon": ("island_effects",),
    }  # fmt: skip


def test_own_tasks_are_choices_or_free_answers(tmp_path: Path) -> None:
    rows = (
        '{"prompt": "猫吃什么？", "options": ["米", "鱼"], "answer": 1, "category": "动物"}\n'
        '{"prompt": "Two?", "options": ["1", "2", "3"], "answer": "B"}\n'
        '{"prompt": "Two?", "options": ["one", "two"], "answer": "two"}\n'
        "\n"
        '{"prompt": "写一句诗。", "references": ["春眠不觉晓"]}\n'
        '{"prompt": "Name it.", "references": "a cat"}\n'
    )
    one, two, three, poem, name = read_own_tasks(_write(tmp_path, "mine.jsonl", rows))
    assert [request.right for request in (one, two, three)] == [1, 1, 1]  # type: ignore[union-attr]
    assert (one.group, one.continuations, one.is_whole) == ("own_mine", ("米", "鱼"), True)  # type: ignore[union-attr]
    assert one.tags == {"category": ("动物",)}  # type: ignore[union-attr]
    assert two.continuations == (" 1", " 2", " 3")  # type: ignore[union-attr]
    assert poem == Task("mine/5", "mine", "写一句诗。", ("春眠不觉晓",))
    assert name == Task("mine/6", "mine", "Name it.", ("a cat",))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"prompt": "?", "options": ["a", "b"], "answer": "c"}', "answer 'c' is none of the 2"),
        ('{"prompt": "?", "options": ["a", "b"], "answer": 2}', "answer 2 is none of the 2"),
        ('{"prompt": "?", "options": ["a"]}', r"expected `prompt` with `references`"),
        ('{"prompt": ', "no JSON"),
        ("[1]", "expected a JSON object"),
    ],
)
def test_a_poisoned_task_names_its_line(tmp_path: Path, row: str, message: str) -> None:
    with pytest.raises(ValueError, match=r"bad\.jsonl, line 1: .*" + message):
        list(read_own_tasks(_write(tmp_path, "bad.jsonl", row + "\n")))


def test_real_ceval_files_all_read(shared_data: Path) -> None:
    files = sorted((shared_data / "eval" / "ceval" / "val").glob("*.csv"))
    questions = [question for path in files for question in read_questions(path)]
    assert len(questions) == 1346
    assert all(len(question.options) == 4 for question in questions)
