"""Averages of an MLLM's grades."""
import json

import pytest
from helpers import call

from common.files import InputError
from tools import grades


def test_averages_by_hand(tmp_path, capsys):
    rows = [{"IF": 8, "IP": 2, "PQ": 5}, {"IF": 6, "IP": 6, "PQ": 9}]
    assert grades.complex_edit_average(rows) == pytest.approx({"IF": 7, "IP": 4, "PQ": 7, "overall": (5 + 7) / 2})
    judged = [{"IF": 8.0, "IDP": 2.0}, {"IF": 1.0, "IDP": 9.0}, {"IF": 6.0, "IDP": 8.0}]
    value, left_out, less = grades.madi_average(judged)
    assert (value, left_out, less) == pytest.approx(((0.5 * 5 + 7) / 1.5, 1, 1))
    assert grades.madi_average(judged, weight=1.0)[0] == pytest.approx(6)
    assert grades.madi_average([{"IF": 7.0, "IDP": 2.9}])[1] == 0     # the limits are strict
    (tmp_path / "j.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*judged, {"IF": None, "IDP": 3.0}]))
    call(grades, tmp_path / "j.jsonl")
    printed = capsys.readouterr().out
    assert "6.333" in printed and "1 with IF > 7 and IDP < 3 left out" in printed and "1 without both scores" in printed


COMPLEX = {"IF": 8, "IP": 2.5, "PQ": 0, "judge": {"model": "m"}}
MADI = {"IF": 5.5, "IDP": None}


@pytest.mark.parametrize("good, bad, message", [
    (COMPLEX, {"IF": 8, "IP": 2}, "PQ is 'missing'; IF, IP, PQ should be numbers from 0 to 10"),
    (COMPLEX, {**COMPLEX, "IF": None}, "IF is None"), (COMPLEX, {**COMPLEX, "PQ": "8"}, "PQ is '8'"),
    (COMPLEX, {**COMPLEX, "PQ": float("nan")}, "PQ is nan"), (COMPLEX, {**COMPLEX, "PQ": 10.1}, "PQ is 10.1"),
    (COMPLEX, {**COMPLEX, "PQ": True}, "PQ is True"), (COMPLEX, MADI, "IP is 'missing'"),
    (COMPLEX, {**COMPLEX, "judge": {"model": "n"}}, "another judge than in line 1"),
    (MADI, {"IF": 5}, "IDP is 'missing'; IF, IDP should be numbers from 1 to 10 or null"),
    (MADI, {**MADI, "IF": 0}, "IF is 0"), (MADI, {**MADI, "IF": -10**400}, "IF is -1000"),
    (MADI, {**COMPLEX, "judge": None}, "IDP is 'missing'"), (MADI, "{", "not JSON"), (MADI, [1], "a row is")])
def test_what_is_no_grade_is_named_by_line(tmp_path, good, bad, message):
    text = bad if isinstance(bad, str) else json.dumps(bad)
    (tmp_path / "j.jsonl").write_text(f"{json.dumps(good)}\n\n{text}\n")
    with pytest.raises(InputError) as error:
        call(grades, tmp_path / "j.jsonl")
    assert str(error.value).startswith(f"{tmp_path}/j.jsonl:3: {message}") and len(str(error.value)) < 350


@pytest.mark.parametrize("flag, value", [("--weight", "-1"), ("--weight", "nan"), ("--if-high", "nan")])
def test_limits_that_are_no_numbers(tmp_path, flag, value):
    with pytest.raises(SystemExit, match=flag):
        call(grades, tmp_path / "j.jsonl", flag, value)
