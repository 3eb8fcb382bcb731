"""Averages of the grades that an MLLM gave (python -m tools.mllm judge), by Complex-Edit's rule and by the
paper's.

    python -m tools.grades judged.jsonl
"""
from common.cli import SHARE, number, parser, run_script
from common.files import InputError, rows_of


def read_grades(path):
    """The rows of a judged file, all of one judge: IF, IP, PQ in 0..10, or IF, IDP in 1..10 or null."""
    rows = rows_of(path, "python -m tools.mllm judge makes such a file")
    if not rows:
        raise InputError(f"{path}: no rows")
    first_line, first = rows[0]
    low, keys = (0, ("IF", "IP", "PQ")) if "IP" in first else (1, ("IF", "IDP"))
    for line, row in rows:
        for key in keys:
            value = row.get(key, "missing")
            good = value is None and low or type(value) in (int, float) and low <= value <= 10
            if not good:
                raise InputError(f"{path}:{line}: {key} is {value!r:.60}; {', '.join(keys)} should be "
                                 f"numbers from {low} to 10{' or null' if low else ''}")
        if row.get("judge") != first.get("judge"):
            raise InputError(f"{path}:{line}: another judge than in line {first_line}; average each alone")
    return [row for _, row in rows]


def complex_edit_average(rows):
    """Complex-Edit: rows with IF, IP, PQ in 0..10 -> the means, and overall, the mean of the three."""
    scores = {key: sum(row[key] for row in rows) / len(rows) for key in ("IF", "IP", "PQ")}
    return {**scores, "overall": sum(scores.values()) / 3}


def madi_average(rows, if_high=7.0, idp_low=3.0, idp_high=7.0, if_low=3.0, weight=0.5):
    """The paper's aggregate of IF and IDP -> average, number left out, number with less weight.

    Samples with IF > if_high and IDP < idp_low are left out (another image, not an edit); IDP > idp_high
    with IF < if_low (nearly a copy) weighs `weight`; else (IF + IDP) / 2. The paper gives the first two
    numbers; the others are ours."""
    kept = [row for row in rows if not (row["IF"] > if_high and row["IDP"] < idp_low)]
    copies = [row["IDP"] > idp_high and row["IF"] < if_low for row in kept]
    weights = [weight if copy else 1.0 for copy in copies]
    total = sum(w * (row["IF"] + row["IDP"]) / 2 for w, row in zip(weights, kept))
    return (total / sum(weights) if any(weights) else None), len(rows) - len(kept), sum(copies)


def main():
    p = parser(__doc__)
    p.add_argument("file", help="made by python -m tools.mllm judge")
    limits = {"if-high": 7.0, "idp-low": 3.0, "idp-high": 7.0, "if-low": 3.0, "weight": 0.5}
    for name, value in limits.items():
        kind = SHARE if name == "weight" else number(float)
        p.add_argument(f"--{name}", type=kind, default=value, help=f"see madi_average ({value:g})")
    flags = p.parse_args()
    rows = read_grades(flags.file)
    if "IP" in rows[0]:
        scores = "  ".join(f"{key} {value:.3f}" for key, value in complex_edit_average(rows).items())
        print(f"Complex-Edit: {scores}  ({len(rows)} samples)")
        rows = [{**row, "IDP": row["IP"]} for row in rows]
    both = [row for row in rows if row["IF"] is not None and row["IDP"] is not None]
    value, left_out, less = madi_average(both, flags.if_high, flags.idp_low, flags.idp_high, flags.if_low,
                                         flags.weight)
    average = "none" if value is None else f"{value:.3f}"
    print(f"the paper's average of IF and IDP: {average}  ({len(both)} samples: {left_out} with "
          f"IF > {flags.if_high:g} and IDP < {flags.idp_low:g} left out, {less} with IDP > "
          f"{flags.idp_high:g} and IF < {flags.if_low:g} at weight {flags.weight:g}; "
          f"{len(rows) - len(both)} without both scores)")


if __name__ == "__main__":
    run_script(main)
