"""Ask a multimodal language model for expressive plans, or for grades of edits.

    python -m tools.mllm plan --data pairs.jsonl --out planned.jsonl --api URL --model NAME
    python -m tools.mllm judge --data results.jsonl --out judged.jsonl --api URL --model NAME --protocol madi

plan   Adds a plan (Eq. 7) to every row of a training file (common/rows.py): one to five steps, from the first
       source image, its caption and the instruction. A row keeps its keys; `plan` and `row`, its line, are
       set.
judge  Grades edits for instruction following (IF), identity preservation (IP, IDP) and quality (PQ). A row is
       {"id": text or number, "instruction": text, "source": path or null, "output": path} and further keys;
       id and output together tell it from the others.
       --protocol complex-edit (Complex-Edit's judge): IF, IP and PQ in 0..10 and their mean, overall, each a
       mean of --samples repetitions, which are kept in `samples`.
       --protocol madi (the paper's judge): IF, IDP and PQ in 1..10 or null, from five questions, the same for
       all edits of one (source, instruction).

Paths are relative to the file they stand in, in OUT too. Every reply is kept as it came in OUT with suffix
.raw.jsonl, madi's questions with .questions.jsonl. A run that was stopped goes on with the same command.
"""
import base64
import io
import json
import math
import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from statistics import mean

from tqdm import tqdm

from common.cli import COUNT, add_command, number, parser, run_script
from common.files import InputError, append, cut_rest, finished, make_folder, relative, rows_of, write_jsonl
from common.images import open_image
from common.rows import Rows, check_tags
from tools.endpoint import Endpoint, StopRun, address, key_from, request_fields

MOST_SIDE = 1024                          # pixels: larger images are scaled down before they are sent
SECONDS = number(float, 0, 86400, above=True)

# what is asked, word for word: "== NAME", then the text
TEXTS = Path(__file__).with_name("prompts.txt").read_text(encoding="utf-8")
PROMPTS = dict(re.findall(r"== (\w+)\n(.*?)\n(?=\n==|\Z)", TEXTS, re.DOTALL))


def text_part(text):
    return {"type": "text", "text": text}


def image_part(flags, name, kind="PNG"):
    """An image that OUT names. Judges get PNG: JPEG's artefacts would count against the edit."""
    image = open_image(flags.out.parent / name)
    image.thumbnail((MOST_SIDE, MOST_SIDE))
    file = io.BytesIO()
    image.save(file, kind, quality=92)
    url = f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"
    return {"type": "image_url", "image_url": {"url": url, "detail": "high"}}


def edit_parts(flags, record, keys=("source", "output")):
    """The images of an edit under their names, a source only if there is one, and the instruction."""
    parts = []
    for key in keys:
        if record[key]:
            name = {"source": "Source image:", "output": "Edited image:"}[key]
            parts += [text_part(name), image_part(flags, record[key])]
    return [*parts, text_part(f"Instruction: {record['instruction']}")]


# ------------------------------------------------------------------------------------- acceptable answers

def need(condition, message):
    if not condition:
        raise InputError(message)


def whole_numbers(values, low, high):
    """8, 8.0, "8" and " 8.0 " are the whole number 8; True and "8/10" are none."""
    texts = [str(value).strip() if type(value) in (int, float, str) else "" for value in values]
    for text in texts:
        need(re.fullmatch(r"[+-]?\d{1,3}(\.0+)?", text, re.ASCII) and low <= float(text) <= high,
             f"whole numbers from {low} to {high} are needed")
    return [int(float(text)) for text in texts]


def check_plan(answer):
    steps = answer.get("steps")
    need(isinstance(steps, list) and 1 <= len(steps) <= 5, "steps should be a list of one to five strings")
    need(all(isinstance(step, str) for step in steps), "steps should be strings")
    steps = [" ".join(re.sub(r"[\x00-\x1f\x7f]", " ", step).split()) for step in steps]
    for step in steps:                                                 # a tag would stand for an image
        need(1 <= len(step) <= 200, "a step should have 1 to 200 characters")
        need("<|" not in step and "<img" not in step, "a step should have no tags")
        check_tags(step, 0)
    return steps


def check_alignment(answer):
    need(isinstance(answer.get("reasoning"), str), "the reasoning is missing")
    return whole_numbers([answer.get("instruction_following"), answer.get("identity_preservation")], 0, 10)


def check_quality(answer):
    return whole_numbers([answer.get("perceptual_quality")], 0, 10)


def check_questions(answer, source):
    questions = answer.get("questions")
    need(isinstance(questions, list) and len(questions) == 5, "five questions are needed")
    for question in questions:
        need(isinstance(question, dict), "a question should be an object")
        need(question.get("tag") in ("IF", "IDP", "PQ"), "a question needs a tag: IF, IDP or PQ")
        answers = question.get("answers")
        need(isinstance(answers, list) and len(answers) == 6, "a question needs six answers")
        for text in (question.get("question"), *answers):
            need(isinstance(text, str) and text.strip(), "questions and answers should be text")
    tags = {question["tag"] for question in questions}
    need("IF" in tags, "a question with the tag IF is needed")
    need(("IDP" in tags) == bool(source), "the tag IDP is needed exactly if there is a source image")
    return [{key: question[key] for key in ("tag", "question", "answers")} for question in questions]


def check_choices(answer):
    choices = answer.get("choices")
    need(isinstance(choices, list) and len(choices) == 5, "choices should be a list of five")
    return whole_numbers(choices, -1, 5)


# ------------------------------------------------------------------------------------- rows and threads
# A record is a row as OUT has it. `rows` is {key: (line number, record)}, `done` is {key: finished record}.

def from_out(flags, line, path):
    """A path in a line of --data, seen from OUT's folder. Links are resolved: `..` could lead elsewhere."""
    try:
        path = relative(os.path.realpath(path), os.path.realpath(flags.out.parent))
        path.encode()                                                  # or OUT could not be read again
    except ValueError:
        raise InputError(f"{flags.data}:{line}: {str(path)!r:.200} is no path that a text file can name"
                         ) from None
    return path


def identity(flags, record):
    """The keys that tell a record from the others, also in the log."""
    return {name: record.get(name) for name in flags.identity}


def ask(flags, record, call, prompt, parts, check):
    return flags.endpoint.ask(identity(flags, record), call, PROMPTS[prompt], parts, check)


def records_so_far(flags, rows):
    """What an earlier run left in OUT -> done. It must be of these rows and of the same judge."""
    make_folder(flags.out.parent)
    open(flags.out, "a", encoding="utf-8").close()                     # fails before anything is paid for
    cut_rest(flags.endpoint.log)
    done = {}
    cut_rest(flags.out)
    for line, record in enumerate(finished(flags.out), 1):
        key = json.dumps(identity(flags, record))
        same = key in rows and json.dumps({**record, **rows[key][1]}) == json.dumps(record)
        need(same and flags.result in record,
             f"{flags.out}:{line}: of another input row, model, protocol, number of samples, --extra or "
             f"--no-system than {flags.data} and the flags now say; take another --out")
        done[key] = record
    return done


def run_missing(flags, path, records, done, job, title):
    """Append job(record) to a file and to `done` for each key that `done` lacks -> {key: why it failed}."""
    failed = {}
    futures = {}
    pool = ThreadPoolExecutor(flags.concurrency)
    try:
        futures.update((pool.submit(job, record), key) for key, record in records.items() if key not in done)
        for future in tqdm(as_completed(futures), desc=title, total=len(futures)):
            key = futures[future]
            try:
                done[key] = future.result()
            except StopRun:
                raise
            except InputError as error:
                failed[key] = error
                continue
            append(path, done[key])
    except BaseException:                                              # what has come is kept all the same
        flags.endpoint.stopped = flags.endpoint.stopped or StopRun("the run was stopped")
        pool.shutdown(wait=False, cancel_futures=True)
        for future, key in futures.items():
            if key not in done and future.done() and not future.cancelled() and not future.exception():
                append(path, future.result())
        raise
    pool.shutdown()
    return failed


def complete(flags, rows, done, job):
    """Run job(record) for the rows that OUT lacks; once OUT has all of them, sort it as the input is."""
    missing = len(rows) - len(done)
    records = {key: record for key, (_, record) in rows.items()}
    failed = run_missing(flags, flags.out, records, done, job, "rows")
    for key, (line, _) in rows.items():
        if key in failed:
            print(f"{flags.data}:{line}: {failed[key]}")
    if failed:
        print(f"{flags.out}: {len(failed)} of {len(rows)} rows failed; the same command asks for them again")
        sys.exit(1)
    write_jsonl(flags.out, [done[key] for key in rows])
    print(f"{flags.out}: {len(rows)} rows, {missing} of them new")


# ------------------------------------------------------------------------------------- the commands

def plan(flags):
    """Add an expressive plan of up to five steps to every row of a training file."""
    rows = {}
    for line, row in Rows(flags.data):
        record = {key: value for key, value in row.items() if key != "plan"}
        record["row"] = line
        record["input_images"] = [from_out(flags, line, path) for path in row["input_images"]]
        for key in ("output_image", "mask"):
            if row.get(key):
                record[key] = from_out(flags, line, row[key])
        rows[json.dumps(identity(flags, record))] = line, record

    def write_plan(record):
        parts = [image_part(flags, name, "JPEG") for name in record["input_images"][:1]]
        # the model would repeat image tags in its steps, so it reads numbers
        text = re.sub(r"(?:<img>\s*)?<\|image_(\d+)\|>(?:\s*</img>)?", r"image \1", record["instruction"])
        text = f"Instruction: {text}"
        if record.get("source_caption"):
            text = f"Caption: {record['source_caption']}\n{text}"
        parts = parts or [text_part("There is no picture.")]
        return {**record, "plan": ask(flags, record, "plan", "PLAN", [*parts, text_part(text)], check_plan)}
    complete(flags, rows, records_so_far(flags, rows), write_plan)


NEEDED = {"id": ((str, int, float), "text or a number"), "instruction": ((str,), "text"),
          "source": ((str, type(None)), "a path or null"), "output": ((str,), "a path")}
ADDED = {"IF", "IP", "IDP", "PQ", "overall", "samples", "questions", "choices", "judge"}


def read_edits(flags):
    """The edits to judge -> rows."""
    rows = {}
    for line, row in rows_of(flags.data):
        where = f"{flags.data}:{line}"
        for key, (kinds, what) in NEEDED.items():
            need(key in row, f"{where}: the key {key!r} is missing; there are {sorted(row)}")
            finite = not isinstance(row[key], float) or math.isfinite(row[key])
            need(type(row[key]) in kinds and finite and row[key] != "",
                 f"{where}: {key} should be {what}, not {json.dumps(row[key])[:60]}")
        taken = sorted(ADDED & set(row))
        need(not taken, f"{where}: judging adds {', '.join(taken)} itself; rename the key")
        need(row["source"] or flags.protocol == "madi",
             f"{where}: complex-edit compares with the source, and source is null; "
             f"leave the row out or take --protocol madi")
        record = dict(row)
        for key in ("source", "output"):
            if row[key]:
                record[key] = from_out(flags, line, flags.data.parent / row[key])
        record["judge"] = {"model": flags.model, "protocol": flags.protocol, "samples": flags.samples,
                           **flags.asked}
        first, _ = rows.setdefault(json.dumps(identity(flags, record)), (line, record))
        need(first == line, f"{where}: the same id and output as line {first}; give every edit its own")
    need(rows, f"{flags.data}: no rows")
    return rows


def judge(flags):
    """Grade edits by Complex-Edit's protocol or by the paper's."""
    need(flags.protocol == "complex-edit" or flags.samples == 1,
         f"--samples {flags.samples}: madi asks its questions once; --samples is for complex-edit")
    rows = read_edits(flags)
    done = records_so_far(flags, rows)
    if flags.protocol == "complex-edit":
        return complete(flags, rows, done, lambda record: grade_directly(flags, record))
    questions = ask_questions(flags, [record for key, (_, record) in rows.items() if key not in done])
    complete(flags, rows, done, lambda record: grade_by_questions(flags, record, questions))


def grade_directly(flags, record):
    """Complex-Edit's judge: IF and IP from both images, PQ from the output -> the record with grades."""
    both = edit_parts(flags, record)
    output = [image_part(flags, record["output"])]
    samples = []
    for k in range(flags.samples):
        IF, IP = ask(flags, record, f"alignment {k}", "ALIGNMENT", both, check_alignment)
        [PQ] = ask(flags, record, f"quality {k}", "QUALITY", output, check_quality)
        samples.append({"IF": IF, "IP": IP, "PQ": PQ, "overall": (IF + IP + PQ) / 3})
    means = {name: mean(sample[name] for sample in samples) for name in samples[0]}
    return {**record, **means, "samples": samples}


def pair_of(record):
    return record["source"], record["instruction"]


def ask_questions(flags, records):
    """The questions of each (source, instruction), asked once -> {pair: {"questions": ...} or InputError}."""
    path = flags.out.with_suffix(".questions.jsonl")
    asker = {"model": flags.model, **flags.asked}
    done = {}
    cut_rest(path)
    for line, old in enumerate(finished(path), 1):
        try:
            check_questions(old, old["source"])
            if {key: old[key] for key in old if key not in ("source", "instruction", "questions")} == asker:
                done[pair_of(old)] = old
        except (InputError, LookupError, TypeError):
            raise InputError(f"{path}:{line}: not a line of questions as they are written here; remove it"
                             ) from None

    def job(record):
        questions = ask(flags, record, "questions", "QUESTIONS", edit_parts(flags, record, ["source"]),
                        lambda answer: check_questions(answer, record["source"]))
        return {"source": record["source"], "instruction": record["instruction"], **asker,
                "questions": questions}
    failed = run_missing(flags, path, {pair_of(record): record for record in records}, done, job, "questions")
    return {**done, **failed}


def grade_by_questions(flags, record, questions):
    """The paper's judge: choices in 0..5 become grades in 1..10 -> the record with their means by tag."""
    found = questions[pair_of(record)]
    if isinstance(found, InputError):
        raise found
    asked = found["questions"]
    lines = []
    for n, question in enumerate(asked, 1):
        lines.append(f"{n}. {question['question']}")
        lines += [f"   {grade}: {answer}" for grade, answer in enumerate(question["answers"])]
    parts = [*edit_parts(flags, record), text_part("\n".join(lines))]
    choices = ask(flags, record, "choices", "CHOICES", parts, check_choices)
    grades = {"IF": [], "IDP": [], "PQ": []}
    for choice, question in zip(choices, asked):
        if choice >= 0:                                                # -1: the model could not tell
            grades[question["tag"]].append(1 + 9 * choice / 5)         # our rule: the paper gives none
    means = {tag: mean(some) if some else None for tag, some in grades.items()}
    return {**record, **means, "questions": asked, "choices": choices}


def main():
    p = parser(__doc__)
    commands = p.add_subparsers(required=True)
    for function, identity_keys, result in ((plan, ["row"], "plan"), (judge, ["id", "output"], "PQ")):
        command = add_command(commands, function)
        command.set_defaults(identity=identity_keys, result=result)
        command.add_argument("--data", type=Path, required=True, help="a JSONL file")
        command.add_argument("--out", type=Path, required=True, help="JSONL file to write, or to go on with")
        command.add_argument("--api", type=address, required=True, help="address up to /chat/completions")
        command.add_argument("--model", required=True, help="its name at the endpoint")
        command.add_argument("--concurrency", type=COUNT, default=4, help="requests at once")
        command.add_argument("--timeout", type=SECONDS, default=120, help="seconds for a reply")
        command.add_argument("--tries", type=COUNT, default=6, help="to get one acceptable answer")
        command.add_argument("--no-system", action="store_true",
                             help="the task goes into the user's message, for models without a system's")
        command.add_argument("--max-tokens", type=COUNT,
                             help="most tokens of a reply (field max_tokens); for an endpoint that wants "
                                  "another name, --extra '{\"max_completion_tokens\": N}'")
        command.add_argument("--extra", type=request_fields, default={}, metavar="JSON",
                             help="object merged into each request: its fields are added or replace others, "
                                  "null takes one out, as in '{\"temperature\": null, \"top_p\": 0.9}'")
        command.add_argument("--key-env", default="MLLM_API_KEY", help="variable with the key; none if unset")
    command.add_argument("--protocol", choices=("complex-edit", "madi"), required=True)
    command.add_argument("--samples", type=COUNT, default=1, help="repetitions, averaged (complex-edit)")
    flags = p.parse_args()
    need(flags.out.suffix == ".jsonl" and os.path.realpath(flags.out) != os.path.realpath(flags.data),
         f"--out {flags.out}: another file than --data is needed, with a name that ends in .jsonl")
    log = flags.out.with_suffix(".raw.jsonl")
    key = key_from(flags.key_env)
    fields = {"max_tokens": flags.max_tokens, **flags.extra}
    flags.endpoint = Endpoint(flags.api, flags.model, key, flags.timeout, flags.tries, log, fields,
                              not flags.no_system)
    # belongs to the judge as the model does. Limits on tokens do not: what they cut off is never a grade
    extra = {name: value for name, value in flags.extra.items()
             if name not in ("max_tokens", "max_completion_tokens")}
    flags.asked = {**({"extra": extra} if extra else {}), **({"no_system": True} if flags.no_system else {})}
    try:
        flags.run(flags)
    except OSError as error:
        raise InputError(f"--out {flags.out}: cannot write there ({error.strerror})") from None


if __name__ == "__main__":
    try:
        run_script(main)
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        elif end.code == 130:
            print("\nmllm.py: stopped; the same command goes on", file=sys.stderr)
        sys.stdout.flush()
        # replies under way are not waited for
        os._exit(end.code if isinstance(end.code, int) else bool(end.code))
