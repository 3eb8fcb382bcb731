"""Averages of an MLLM's grades."""
import json

import pytest
from helpers import call

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


