"""Ask a multimodal language model for plans or for grades, at any endpoint that speaks OpenAI's chat protocol.

    python tools/mllm.py plan --data pairs.jsonl --out planned.jsonl --api URL --model NAME
    python tools/mllm.py judge --data results.jsonl --out judged.jsonl --api URL --model NAME --protocol complex-edit

plan   Adds to every row of a training file (data.py) an expressive plan: one to five steps, from the first source image, its
       caption and the instruction. The row keeps its keys; `plan` and `row`, its line number, are set.
judge  Grades edits. Input rows: {"id": text or number, "instruction": text, "source": path or null, "output": path} and whatever
       else; an edit is told from others by id and output. --protocol complex-edit (Complex-Edit's judge): IF, IP, PQ in 0..10 and
       their mean, overall; one entry in `samples` for each of --samples repetitions. --protocol madi (the paper's judge): IF,
       IDP, PQ in 1..10 or null, by five questions that all edits of one (source, instruction) share.

Paths are relative to the file they stand in, in OUT too. Every reply is kept as it came in OUT with the suffix .raw.jsonl, madi's
questions with .questions.jsonl. A run that was stopped goes on with the same command. The key is read from the environment.
"""
import argparse
import base64
import http.client
import io
import itertools
import json
import os
import random
import re
import sys
import threading
import time
import urllib.request
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path
from statistics import mean
from urllib.parse import urlsplit

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import add_command, open_image, read_rows  # noqa: E402
from model import InputError  # noqa: E402

BACKOFF, MOST_WAIT = 1.0, 60.0            # seconds: before the second try, doubled before each further one; at most
MOST_BYTES, MOST_TEXT = 2 * 2**20, 10**5  # of a reply: bytes of its body, characters of its message
MOST_PIXELS = 1024                        # of a side of an image that is sent
WRITING = threading.Lock()

# ------------------------------------------------------------------------------------------- what is asked

PLAN = """You plan image edits. You get a picture, a caption of it where there is one, and an instruction that says how the picture is
to change. Divide the edit into one to five short steps, in the order in which they would be carried out. Each step is one plain
sentence: which thing, where in the picture, and how it looks afterwards. A simple edit takes one step. Ask for nothing that the
instruction does not ask for; a last step may name what has to stay. If there is no picture, say what is put where in an empty one.
Reply with JSON only: {"steps": ["...", "..."]}. One to five steps, each of at most 200 characters, without any markup."""

ALIGNMENT = """You judge an edited image. You get the source image, the edited image and the instruction of the edit. Give two grades,
whole numbers from 0 to 10. They are independent: neither may raise or lower the other.
instruction_following: has what was asked for happened? Divide the instruction into its single edits, grade each, and take the
average. 10: all are carried out exactly as asked; 5: about half, or all of them roughly; 0: none.
identity_preservation: is everything else as it was: people and their faces, objects, text, background, light, style, framing?
What the instruction asks to change, and what has to change with it, does not count. Take the average over the things that should
have stayed. 10: no difference that was not asked for; 5: clear differences in the same scene; 0: another scene.
First write down what you compare and find, then the grades.
Reply with JSON only, in this order: {"reasoning": "...", "instruction_following": 0-10, "identity_preservation": 0-10}"""

QUALITY = """You judge how well an image is made, whatever it shows. Look for artefacts, seams, smears, noise, broken shapes and hands,
unreadable text, light and shadows that do not agree, wrong perspective. 10: nothing to find fault with; 5: clear faults that do
not spoil the image; 0: not recognizable. Reply with JSON only: {"perceptual_quality": 0-10}, a whole number."""

QUESTIONS = """You prepare the examination of image edits. You get a source image, where there is one, and the instruction of an edit;
the edited images will be seen by somebody else. Write five questions about an edited image that tell a good edit from a bad one.
Each has a tag: IF (was the instruction followed?), IDP (is what should stay still as in the source image?) or PQ (is the image
well made?). At least one IF, and at least one IDP if there is a source image, none without one. Each question has six possible
answers, from the worst (0) to the best (5), concrete enough that two people would choose the same.
Reply with JSON only: {"questions": [{"tag": "IF", "question": "...", "answers": ["worst", "...", "...", "...", "...", "best"]}, ...]}"""

CHOICES = """You examine an edited image. You get the source image, where there is one, the edited image, the instruction of the edit,
and five questions with six answers each, numbered from 0 (worst) to 5 (best). Choose for each question the answer that fits the
edited image; -1 if you cannot tell. Reply with JSON only: {"choices": [five whole numbers from -1 to 5, in the order of the questions]}"""


def picture(flags, name, kind="PNG"):
    """An image named in OUT -> the part of a message that shows it. Judges get PNG: JPEG's traces are not the edit's."""
    image, file = open_image(flags.out.parent / name), io.BytesIO()
    image.thumbnail((MOST_PIXELS, MOST_PIXELS))
    image.save(file, kind, quality=92)
    url = f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"
    return {"type": "image_url", "image_url": {"url": url, "detail": "high"}}


def words(text):
    return {"type": "text", "text": text}


def labelled(flags, record, output=True):
    """The source image, if there is one, the output, and the instruction, each under its name."""
    parts = [words("Source image:"), picture(flags, record["source"])] if record["source"] else []
    parts += [words("Edited image:"), picture(flags, record["output"])] if output else []
    return parts + [words(f"Instruction: {record['instruction']}")]


# ------------------------------------------------------------------------------------------- what is accepted as an answer

def check_plan(reply):
    steps = reply.get("steps")
    if not isinstance(steps, list) or not 1 <= len(steps) <= 5 or not all(isinstance(step, str) for step in steps):
        raise ValueError("steps should be a list of one to five strings")
    steps = [" ".join(step.split()) for step in steps]
    # a tag would be taken for one of the prompt's images
    if any(not step or len(step) > 200 or "<|" in step or "<img" in step for step in steps):
        raise ValueError("a step should have 1 to 200 characters and no tags")
    return steps


def check_grades(reply, *names):
    if any(type(reply.get(name)) is not int or not 0 <= reply[name] <= 10 for name in names):
        raise ValueError(f"whole numbers from 0 to 10 are needed for {' and '.join(names)}")
    return [reply[name] for name in names]


def check_alignment(reply):
    if not isinstance(reply.get("reasoning"), str):
        raise ValueError("the reasoning is missing")
    return check_grades(reply, "instruction_following", "identity_preservation")


def check_questions(reply, source):
    def text(value):
        return isinstance(value, str) and value.strip()
    questions = reply.get("questions")
    if not isinstance(questions, list) or len(questions) != 5 or not all(
            isinstance(q, dict) and q.get("tag") in ("IF", "IDP", "PQ") and text(q.get("question"))
            and isinstance(q.get("answers"), list) and len(q["answers"]) == 6 and all(map(text, q["answers"])) for q in questions):
        raise ValueError("five questions with a tag and six answers each are needed")
    tags = {q["tag"] for q in questions}
    if "IF" not in tags or ("IDP" in tags) != bool(source):
        raise ValueError(f"the tags are {', '.join(sorted(tags))}; IF is needed, and IDP exactly if there is a source image")
    return [{key: q[key] for key in ("tag", "question", "answers")} for q in questions]


def check_choices(reply, n):
    choices = reply.get("choices")
    if not isinstance(choices, list) or len(choices) != n or any(type(c) is not int or not -1 <= c <= 5 for c in choices):
        raise ValueError(f"choices should be {n} whole numbers from -1 to 5")
    return choices


def read_reply(text, check):
    """What check() makes of the last JSON object it accepts: models think aloud first, and put fences around."""
    found, why, start = None, "no JSON object in it", text.find("{")
    if len(text) > MOST_TEXT:
        raise Again(f"a message of {len(text)} characters")
    while start >= 0:
        end = start + 1
        try:
            value, end = json.JSONDecoder().raw_decode(text, start)
            found = check(value)
        except json.JSONDecodeError:
            pass                                                       # a brace that begins no object
        except (ValueError, RecursionError) as error:
            why = str(error)
        start = text.find("{", end)
    if found is None:
        raise Again(f"{why}: {text}")
    return found


# ------------------------------------------------------------------------------------------- the endpoint

class Again(Exception):
    """A try failed, another may not: the reason, and the seconds to wait that the server asks for."""


class Plain(urllib.request.HTTPErrorProcessor):
    """Hands out replies of every status. A redirect is not followed: it would take the key elsewhere."""
    def http_response(self, request, response):
        return response
    https_response = http_response


OPENER = urllib.request.build_opener(Plain)


def clean(flags, text):
    """`text` without the key. A word such as EMPTY, which servers without keys are given, is no secret."""
    for form in (flags.key, flags.key.replace("/", "\\/")) if len(flags.key) >= 8 else ():
        text = text.replace(form, "[key]")
    return text


def short(flags, text):
    """One printable line of at most 200 characters. The key goes first, or half of it could be left."""
    text = " ".join("".join(c if c.isprintable() else " " for c in clean(flags, text)).split())
    return text if len(text) <= 200 else text[:197] + "..."


def post(flags, body):
    """-> the text of the reply. Again: it may work later; InputError: it will not."""
    header = {"Content-Type": "application/json", **({"Authorization": f"Bearer {flags.key}"} if flags.key else {})}
    request = urllib.request.Request(flags.api.rstrip("/") + "/chat/completions", body, header)
    end, data = time.monotonic() + flags.timeout, b""
    try:
        with OPENER.open(request, timeout=flags.timeout) as response:
            while chunk := response.read1(min(2**16, MOST_BYTES + 1 - len(data))):
                data += chunk
                if len(data) > MOST_BYTES:
                    raise Again(f"a reply of more than {MOST_BYTES} bytes")
                if time.monotonic() > end:                             # the socket's own limit is for each read
                    raise TimeoutError("timed out")
    except (OSError, http.client.HTTPException, UnicodeError) as error:
        raise Again(f"no reply: {str(getattr(error, 'reason', error)) or type(error).__name__}") from None
    text = clean(flags, data.decode("utf-8", "replace"))
    if response.status in (408, 429) or response.status >= 500:
        after = response.headers.get("Retry-After", "")
        raise Again(f"HTTP {response.status}: {text}", int(after) if re.fullmatch("[0-9]{1,9}", after) else 0)
    if not 200 <= response.status < 300:
        raise InputError(f"HTTP {response.status}: {short(flags, text)}")
    return text


def ask(flags, record, call, task, parts, check):
    """Put one question -> what check() makes of the answer. A try without an acceptable answer is one of --tries."""
    messages = [{"role": "system", "content": task}, {"role": "user", "content": parts}]
    body = json.dumps({"model": flags.model, "temperature": 1, "messages": messages}).encode()
    for k in range(flags.tries):
        try:
            text = post(flags, body)
            try:
                message = json.loads(text)["choices"][0]["message"]
                reply, refusal = message.get("content"), message.get("refusal")
            except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
                reply, refusal = None, f"not a chat completion: {text}"
            usable = isinstance(reply, str) and reply.strip()
            append(flags, flags.out.with_suffix(".raw.jsonl"), {**identity(flags, record), "call": call, "reply": reply if usable else text})
            if refusal or not usable:
                raise Again(f"no answer: {refusal or 'an empty message'}")
            return read_reply(reply, check)
        except Again as error:
            why, after = (*error.args, 0)[:2]
        if k + 1 < flags.tries:                                        # the jitter keeps threads from coming back together
            time.sleep(min(MOST_WAIT, max(after, BACKOFF * 2 ** min(k, 9) * random.uniform(0.5, 1.5))))
    raise InputError(f"{call}: {flags.tries} tries failed, the last with: {short(flags, why)}")


# ------------------------------------------------------------------------------------------- files and threads

def append(flags, path, record):
    with WRITING, open(path, "a") as file:
        file.write(clean(flags, json.dumps(record)) + "\n")
        file.flush()
        os.fsync(file.fileno())


def resume(path):
    """The records of an earlier run -> [(line number, record)]; the file is made if need be. A torn last line is removed."""
    records = []
    with open(path, "a+b") as file:
        file.seek(0)
        for number, line in enumerate(file, 1):
            try:
                record = json.loads(line)
                if not isinstance(record, dict):
                    raise ValueError("not an object")
            except ValueError as error:
                if line.endswith(b"\n"):
                    raise InputError(f"{path}:{number}: not a record of an earlier run ({error}); remove it, or take another --out") from None
                file.truncate(file.tell() - len(line))
                break
            if not line.endswith(b"\n"):                               # whole: only its end was not written
                file.write(b"\n")
            records.append((number, record))
    return records


def identity(flags, record):
    return {name: record.get(name) for name in (("row",) if flags.run is plan else ("id", "output"))}


def key_of(flags, record):
    return json.dumps(identity(flags, record))


def finished(flags, rows):
    """What OUT holds already -> {key: record}. It has to be of these rows, {key: (line number, record)}, and of the same judge."""
    done = {}
    for number, record in resume(flags.out):
        key = key_of(flags, record)
        if key not in rows or any(json.dumps(record.get(name)) != json.dumps(value) for name, value in rows[key][1].items()):
            raise InputError(f"{flags.out}:{number}: of another input row, model, protocol or number of samples than {flags.data} "
                             f"and the flags now say; take another --out")
        done[key] = record
    return done


def parallel(flags, job, items, title, ready=0):
    """Yield (item, job(item), "") as they finish, or (item, None, why not). No more are begun than run at once."""
    pool, waiting, running = ThreadPoolExecutor(flags.concurrency), iter(items), {}
    try:
        with tqdm(desc=title, total=len(items) + ready, initial=ready) as bar:
            while True:
                for item in itertools.islice(waiting, flags.concurrency - len(running)):
                    running[pool.submit(job, item)] = item
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    item = running.pop(future)
                    try:
                        yield item, future.result(), ""
                    except InputError as error:
                        yield item, None, str(error)
                    bar.update()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def complete(flags, rows, done, job):
    """Append to OUT every row that is not done, with what job(record) adds; when none is missing, sort OUT as the input is."""
    todo, failed = [item for key, item in rows.items() if key not in done], []
    for (number, record), result, reason in parallel(flags, lambda item: job(item[1]), todo, "rows", len(done)):
        if reason:
            failed.append((number, reason))
            continue
        done[key_of(flags, record)] = whole = {**record, **result}
        append(flags, flags.out, whole)
    if failed:
        for number, reason in sorted(failed):
            print(f"{flags.data}:{number}: {reason}")
        print(f"{flags.out}: {len(failed)} of {len(rows)} rows failed; the same command asks for them again")
        sys.exit(1)
    sorted_out = flags.out.with_name(flags.out.name + ".new")
    with open(sorted_out, "w") as file:
        file.writelines(clean(flags, json.dumps(done[key])) + "\n" for key in rows)
        file.flush()
        os.fsync(file.fileno())
    os.replace(sorted_out, flags.out)
    print(f"{flags.out}: {len(rows)} rows, {len(todo)} of them new")


def from_out(flags, name):
    """A path as seen from OUT's folder, through no link, so that `..` is what it seems."""
    return os.path.relpath(os.path.realpath(name), os.path.realpath(flags.out.parent))


# ------------------------------------------------------------------------------------------- the commands

def plan(flags):
    """Add an expressive plan of up to five steps to every row of a training file."""
    rows = {}
    for number, row in read_rows(flags.data):
        record = {key: value for key, value in row.items() if key != "plan"} | {"row": number}
        record["input_images"] = [from_out(flags, name) for name in row["input_images"]]
        record |= {key: from_out(flags, row[key]) for key in ("output_image", "mask") if row.get(key)}
        rows[key_of(flags, record)] = number, record

    def job(record):
        # the model would repeat the tags of images; it knows a picture by its number
        instruction = re.sub(r"(?:<img>)?<\|image_(\d+)\|>(?:</img>)?", r"image \1", record["instruction"])
        parts = [picture(flags, name, "JPEG") for name in record["input_images"][:1]] or [words("There is no picture.")]
        caption = f"Caption: {record['source_caption']}\n" if record.get("source_caption") else ""
        return {"plan": ask(flags, record, "plan", PLAN, [*parts, words(f"{caption}Instruction: {instruction}")], check_plan)}
    complete(flags, rows, finished(flags, rows), job)


RESULTS = ("IF", "IP", "IDP", "PQ", "overall", "samples", "questions", "choices", "judge")


def read_results(flags):
    """The edits to judge -> {key: (line number, record)}, paths as seen from OUT, with who judges them and how."""
    rows = {}
    for number, line in enumerate(Path(flags.data).read_bytes().decode("utf-8", "replace").split("\n"), 1):
        if not line.strip():
            continue
        where = f"{flags.data}:{number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where}: not JSON ({error})") from None
        if not isinstance(row, dict):
            raise InputError(f"{where}: a row is a JSON object, this is {type(row).__name__}")
        for key, kinds, needed in (("id", (str, int, float), "text or a number"), ("instruction", (str,), "text"),
                                   ("source", (str, type(None)), "a path or null"), ("output", (str,), "a path")):
            if key not in row:
                raise InputError(f"{where}: the key {key!r} is missing; there are {sorted(row)}")
            if type(row[key]) not in kinds or row[key] == "":
                raise InputError(f"{where}: {key} should be {needed}, not {json.dumps(row[key])[:60]}")
        if taken := sorted(set(row) & set(RESULTS)):
            raise InputError(f"{where}: the key {taken[0]!r} is one of those that judging adds; rename it")
        if flags.protocol == "complex-edit" and row["source"] is None:
            raise InputError(f"{where}: complex-edit compares with the source, and source is null; leave the row out or take --protocol madi")
        record = row | {key: from_out(flags, Path(flags.data).parent / row[key]) for key in ("source", "output") if row[key]}
        record["judge"] = {"model": flags.model, "protocol": flags.protocol, "samples": flags.samples}
        first, _ = rows.setdefault(key_of(flags, record), (number, record))
        if first != number:
            raise InputError(f"{where}: the same id and output as line {first}; give every edit its own")
    if not rows:
        raise InputError(f"{flags.data}: no rows")
    return rows


def judge(flags):
    """Grade edits by Complex-Edit's protocol or by the paper's."""
    if flags.protocol == "madi" and flags.samples > 1:
        raise InputError(f"--samples {flags.samples}: madi asks its questions once; --samples is for complex-edit")
    rows = read_results(flags)
    done = finished(flags, rows)
    if flags.protocol == "complex-edit":
        return complete(flags, rows, done, lambda record: complex_edit(flags, record))
    questions, failed = ask_questions(flags, [record for key, (_, record) in rows.items() if key not in done])
    complete(flags, rows, done, lambda record: choose(flags, record, questions, failed))


def complex_edit(flags, record):
    """IF and IP from both images, PQ from the output alone; the numbers of one repetition stay together."""
    both, output, samples = labelled(flags, record), [picture(flags, record["output"])], []
    for k in range(flags.samples):
        IF, IP = ask(flags, record, f"alignment {k}", ALIGNMENT, both, check_alignment)
        PQ, = ask(flags, record, f"quality {k}", QUALITY, output, lambda reply: check_grades(reply, "perceptual_quality"))
        samples.append({"IF": IF, "IP": IP, "PQ": PQ, "overall": (IF + IP + PQ) / 3})
    return {**{name: mean(sample[name] for sample in samples) for name in samples[0]}, "samples": samples}


def ask_questions(flags, records):
    """The five questions of each (source, instruction), asked once -> {pair: questions}, {pair: why there are none}."""
    path = flags.out.with_suffix(".questions.jsonl")
    questions = {(old["source"], old["instruction"]): old["questions"] for _, old in resume(path) if old["model"] == flags.model}
    pairs = {(record["source"], record["instruction"]): record for record in records}
    todo, failed = [record for pair, record in pairs.items() if pair not in questions], {}

    def job(record):
        return ask(flags, record, "questions", QUESTIONS, labelled(flags, record, output=False),
                   lambda reply: check_questions(reply, record["source"]))
    for record, found, reason in parallel(flags, job, todo, "questions", len(questions)):
        pair = record["source"], record["instruction"]
        if reason:
            failed[pair] = reason
            continue
        append(flags, path, {"source": pair[0], "instruction": pair[1], "model": flags.model, "questions": found})
        questions[pair] = found
    return questions, failed


def choose(flags, record, questions, failed):
    """An answer to each question -> the means by tag. The paper does not say how 0..5 becomes 1..10; here 1 + 9 * grade / 5."""
    pair = record["source"], record["instruction"]
    if pair in failed:
        raise InputError(failed[pair])
    asked = questions[pair]
    text = "\n".join(f"{n}. {q['question']}\n" + "\n".join(f"   {grade}: {answer}" for grade, answer in enumerate(q["answers"]))
                     for n, q in enumerate(asked, 1))
    choices = ask(flags, record, "choices", CHOICES, [*labelled(flags, record), words(text)],
                  lambda reply: check_choices(reply, len(asked)))
    grades = {tag: [1 + 9 * c / 5 for c, q in zip(choices, asked) if q["tag"] == tag and c >= 0] for tag in ("IF", "IDP", "PQ")}
    return {**{tag: mean(some) if some else None for tag, some in grades.items()}, "questions": asked, "choices": choices}


def check_flags(flags):
    try:
        url = urlsplit(flags.api)
        known = url.hostname and url.port != 0 and not (url.query or url.fragment or url.username)
    except ValueError:                                                 # of the port, for one
        known = False
    if not known or not re.fullmatch("https?://[!-~]+", flags.api):
        shown = re.sub("//.*@", "//...@", flags.api)                   # there may be a password in it
        raise InputError(f"--api {shown!r}: an address such as https://host/v1 is needed, http or https, without user, ? or #")
    for name in ("concurrency", "tries", "samples", "timeout"):
        if not 0 < getattr(flags, name) <= 86400:
            raise InputError(f"--{name} {getattr(flags, name)}: more than 0 and at most 86400 is needed")
    flags.key, flags.out = os.environ.get(flags.key_env, "").strip(), Path(flags.out)
    if re.search(r"[^!-~]|[\"\\]", flags.key):
        raise InputError(f"the key in {flags.key_env} has characters that no key has; set it again, without quotes or spaces")
    try:
        open(flags.data).close()
    except OSError as error:
        raise InputError(f"--data {flags.data}: cannot be read ({error.strerror}); a JSONL file is needed") from None
    if flags.out.suffix != ".jsonl" or os.path.realpath(flags.out) == os.path.realpath(flags.data):
        raise InputError(f"--out {flags.out}: another file than --data is needed, with a name that ends in .jsonl")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.error = lambda message: sys.exit(f"mllm.py: {message}")
    commands = p.add_subparsers(required=True)
    for function in (plan, judge):
        command = add_command(commands, p.error, function)
        command.set_defaults(samples=1)
        command.add_argument("--data", required=True, help="a JSONL file")
        command.add_argument("--out", required=True, help="JSONL file to write, or to go on with")
        command.add_argument("--api", required=True, help="address of the endpoint, up to /chat/completions")
        command.add_argument("--model", required=True, help="its name at the endpoint")
        command.add_argument("--concurrency", type=int, default=4, help="requests at once")
        command.add_argument("--timeout", type=float, default=120, help="seconds for a reply")
        command.add_argument("--tries", type=int, default=6, help="for an acceptable answer to one question")
        command.add_argument("--key-env", default="MLLM_API_KEY", help="environment variable with the key; none is sent if it is not set")
        if function is judge:
            command.add_argument("--protocol", choices=("complex-edit", "madi"), required=True)
            command.add_argument("--samples", type=int, default=1, help="repetitions, averaged (complex-edit)")
    flags = p.parse_args()
    check_flags(flags)
    try:
        flags.out.parent.mkdir(parents=True, exist_ok=True)
        resume(flags.out.with_suffix(".raw.jsonl"))
        flags.run(flags)
    except OSError as error:                                           # those of images and of the network are caught where they arise
        raise InputError(f"--out {flags.out}: cannot write there ({error.strerror})") from None


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"mllm.py: {error}")
    except KeyboardInterrupt:
        print("\nmllm.py: stopped; the same command goes on", file=sys.stderr)
        os._exit(130)                                                  # without waiting for replies: all that came is on disk
