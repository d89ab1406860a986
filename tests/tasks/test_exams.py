"""Exam files of three layouts become the prompts that their authors published."""

from pathlib import Path

import pytest

from tasks.exams import exam_requests, preset_hash, read_minimal_pairs, read_questions

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
    assert len({preset_hash(preset) for preset in ("ceval", "mmlu", "plain")}) == 3


def test_minimal_pairs_stop_at_the_limit_of_each_paradigm(tmp_path: Path) -> None:
    rows = "".join(
        f'{{"sentence_good": "好{i}", "sentence_bad": "坏{i}", "UID": "u{i % 2}"}}\n'
        for i in range(6)
    )
    requests = read_minimal_pairs(_write(tmp_path, "zhoblimp.jsonl", rows), per_paradigm=2)
    assert [request.id for request in requests] == [f"zhoblimp/{i}" for i in (1, 2, 3, 4)]
    assert requests[0].continuations == ("好0", "坏0")
    assert requests[0].group == "zhoblimp"


def test_real_ceval_files_all_read(shared_data: Path) -> None:
    files = sorted((shared_data / "eval" / "ceval" / "val").glob("*.csv"))
    questions = [question for path in files for question in read_questions(path)]
    assert len(questions) == 1346
    assert all(len(question.options) == 4 for question in questions)
