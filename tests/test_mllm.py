"""tools/mllm.py and tools/endpoint.py against a server of our own, which answers as each test wants it to."""
import base64
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import helpers
import pytest
from helpers import ROOT
from PIL import Image

from common.files import InputError
from common.rows import Rows
from tools import endpoint, grades, mllm

KEY = "sk-test/4711-do-not-print-this-key"


class Server(ThreadingHTTPServer):
    """answer(request, n) -> (status, headers, body bytes), for the n-th request; `requests` keeps them."""
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests = []
        self.keys = []
        self.lock = threading.Lock()
        self.release = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request, address):                          # a client that has gone away
        pass


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.requests.append(request)
            self.server.keys.append(self.headers["Authorization"])
            n = len(self.server.requests) - 1
        assert self.path == "/v1/chat/completions"
        status, headers, body = self.server.answer(request, n)
        self.send_response(status, headers.pop("reason", None))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        for piece in [body] if isinstance(body, bytes) else body:
            self.wfile.write(piece)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(endpoint, "BACKOFF", 0.001)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("MLLM_API_KEY", raising=False)
    server = Server()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield server
    server.release.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def waits(monkeypatch):
    """The seconds of each time.sleep, none of which is slept."""
    waits = []
    monkeypatch.setattr(endpoint.time, "sleep", waits.append)
    return waits


def says(content, end="stop", **message):
    """A chat completion with this message: a text, a list of parts, or an answer as JSON."""
    content = json.dumps(content) if isinstance(content, dict) else content
    choice = {"message": {"content": content, **message}, "finish_reason": end}
    return 200, {}, json.dumps({"choices": [choice]}).encode()


def in_turn(*answers):
    return lambda request, n: answers[min(n, len(answers) - 1)]


def text_of(request):
    return "\n".join(part["text"] for part in request["messages"][1]["content"] if part["type"] == "text")


def images_of(request):
    """What the images of a request show: kind, size, gray level of the first pixel."""
    found = []
    for part in request["messages"][1]["content"]:
        if part["type"] == "image_url":
            kind, data = re.fullmatch("data:image/(.*);base64,(.*)", part["image_url"]["url"]).groups()
            image = Image.open(io.BytesIO(base64.b64decode(data)))
            assert image.format.lower() == kind
            found.append((kind, image.size, image.getpixel((0, 0))[0]))
    return found


def call(command, server, data, out, *flags):
    """Run a command in this process -> exit code, or what it says at its exit."""
    flags = ("--api", server.url, "--model", "m", "--data", data, "--out", out, *flags)
    try:
        helpers.call(mllm, command, *flags)
        return 0
    except SystemExit as stop:
        return stop.code


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def training_file(folder, n=1):
    """n rows whose instruction is "edit K". -> path"""
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), (200, 200, 200)).save(folder / "source.png")
    return write_lines(folder / "pairs.jsonl", [
        {"instruction": f"edit {k}", "input_images": ["source.png"], "output_image": f"target{k}.png",
         "source_caption": "a gray field", "extra": k} for k in range(n)])


def results_file(folder, edits):
    """Rows from (id, instruction, gray of the source or None, gray of the output). -> path"""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for name, instruction, source, output in edits:
        for gray in (source, output):
            if gray is not None:
                Image.new("RGB", (8, 8), (gray,) * 3).save(folder / f"{gray}.png")
        source = None if source is None else f"{source}.png"
        row = {"id": name, "instruction": instruction, "source": source, "output": f"{output}.png"}
        rows.append({**row, "seed": 7})
    return write_lines(folder / "results.jsonl", rows)


STEPS = {"steps": ["the sky turns red", "keep the field"]}

# ------------------------------------------------------------------------------------- plans


def test_a_plan_is_asked_with_image_caption_and_instruction(server, tmp_path, monkeypatch):
    data = training_file(tmp_path / "data")
    out = tmp_path / "here/deep/planned.jsonl"
    Image.new("RGB", (3000, 1500), "white").save(tmp_path / "data/source.png")
    server.answer = in_turn(says(STEPS))
    monkeypatch.setenv("OTHER", KEY)
    assert call("plan", server, data, out, "--key-env", "OTHER") == 0
    request, = server.requests
    assert request["model"] == "m" and images_of(request) == [("jpeg", (1024, 512), 255)]
    assert text_of(request) == "Caption: a gray field\nInstruction: edit 0"
    assert server.keys == [f"Bearer {KEY}"]
    row, = lines(out)
    assert row["plan"] == STEPS["steps"] and row["row"] == 1
    assert row["extra"] == 0 and row["instruction"] == "edit 0"
    assert os.path.samefile(out.parent / row["input_images"][0], tmp_path / "data/source.png")
    assert row["output_image"] == "../../data/target0.png"
    assert lines(out.with_suffix(".raw.jsonl")) == [{"row": 1, "call": "plan", "reply": json.dumps(STEPS)}]
    (_, again), = Rows(out)                                       # it is a training file
    assert again["plan"] == STEPS["steps"]
    assert call("plan", server, data, out) == 0 and len(server.requests) == 1


def test_tags_of_images_are_neither_sent_nor_accepted(server, tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    row = {"instruction": "put <img><|image_2|></img> on <|image_1|>", "input_images": ["a.png", "a.png"]}
    data = write_lines(tmp_path / "pairs.jsonl", [{**row, "output_image": "a.png"}])
    server.answer = in_turn(says({"steps": ["put <|image_2|> there"]}), says({"steps": ["put <img> there"]}),
                            says(STEPS))
    assert call("plan", server, data, tmp_path / "out.jsonl") == 0
    assert len(server.requests) == 3 and len(images_of(server.requests[0])) == 1
    assert text_of(server.requests[0]) == "Instruction: put image 2 on image 1"


def test_a_row_without_images_says_so(server, tmp_path):
    row = {"instruction": "a cat", "input_images": [], "output_image": "a.png"}
    data = write_lines(tmp_path / "pairs.jsonl", [row])
    server.answer = in_turn(says(STEPS))
    assert call("plan", server, data, tmp_path / "out.jsonl") == 0
    assert text_of(server.requests[0]) == "There is no picture.\nInstruction: a cat"


@pytest.mark.parametrize("reply", [
    "```json\n" + json.dumps(STEPS) + "\n```",
    "The plan {of sorts} is " + json.dumps(STEPS) + " I hope {it} helps.",
    '<think>{"steps": ["a draft"]}</think> ' + json.dumps(STEPS),
    '{"steps": ["the  sky\\nturns red ", "keep the field"]}',
    '{"steps": ["the sky\nturns\x1fred", "keep the field"]}'])
def test_what_stands_around_an_answer_does_not_matter(server, tmp_path, reply):
    server.answer = in_turn(says(reply))
    assert call("plan", server, training_file(tmp_path), tmp_path / "o.jsonl", "--tries", 1) == 0
    assert lines(tmp_path / "o.jsonl")[0]["plan"] == STEPS["steps"]
    assert lines(tmp_path / "o.raw.jsonl")[0]["reply"] == reply


DRAFT = '{"steps": ["a draft"]}'


@pytest.mark.parametrize("reply", [
    f"<think>first {DRAFT}", f"<think>{DRAFT}</think> <think>or {DRAFT}", f"{DRAFT} <think>no, that is",
    f"<thinking>{DRAFT}", f"<Think>{DRAFT}</thi", f"[THINK]{DRAFT}", f"\u25c1think\u25b7{DRAFT}",
    f"{DRAFT}</think>", f"{DRAFT}</thinking> then", f"<think>a {{ {DRAFT} </think>"])
def test_a_thought_is_no_answer(server, tmp_path, capsys, reply):
    server.answer = in_turn(says(reply), says(f"<think>a <think> b {DRAFT}</think>{json.dumps(STEPS)}"))
    assert call("plan", server, training_file(tmp_path), tmp_path / "o.jsonl", "--tries", 1) == 1
    printed = capsys.readouterr().out
    assert "the last with: a thought without an end" in printed or "no JSON object in it" in printed
    assert call("plan", server, tmp_path / "pairs.jsonl", tmp_path / "o.jsonl", "--tries", 1) == 0
    assert lines(tmp_path / "o.jsonl")[0]["plan"] == STEPS["steps"]


@pytest.mark.parametrize("end", [
    '{"steps": ["the sky tur', '{"steps": ["a", "b"', '{"steps": []}',
    '{"before": ' + DRAFT + ', "steps": 12' + "0" * 5000 + "}",
    '{"before": ' + DRAFT + ', "steps": ["the', '{"before": ' + DRAFT + ', "steps": ["a" "b"]}'[:-1]])
def test_the_last_object_is_the_answer_or_none_is(server, tmp_path, end):
    server.answer = in_turn(says(f"first {DRAFT}, no: {end}"))
    assert call("plan", server, training_file(tmp_path), tmp_path / "o.jsonl", "--tries", 1) == 1
    assert lines(tmp_path / "o.jsonl") == []


def test_the_text_parts_of_a_list_are_joined(server, tmp_path):
    text = json.dumps(STEPS)
    parts = [{"type": "thinking", "thinking": [{"type": "text", "text": DRAFT}]},
             {"type": "text", "text": text[:9]}, {"type": "text", "text": text[9:]},
             {"type": "reasoning", "text": DRAFT}]
    server.answer = in_turn(says(parts, reasoning_content=DRAFT))
    assert call("plan", server, training_file(tmp_path), tmp_path / "o.jsonl", "--tries", 1) == 0
    assert lines(tmp_path / "o.jsonl")[0]["plan"] == STEPS["steps"]
    assert lines(tmp_path / "o.raw.jsonl")[0]["reply"] == text


def test_half_of_an_emoji_is_asked_again_and_does_not_spoil_the_log(server, tmp_path):
    data = training_file(tmp_path)
    server.answer = in_turn(says('{"steps": ["draw \\ud83d"]}'), says('{"no": "steps \ud83d"}'), says(STEPS))
    for _ in range(2):                                                 # the second run reads the files
        assert call("plan", server, data, tmp_path / "o.jsonl") == 0
    assert len(server.requests) == 3 and lines(tmp_path / "o.jsonl")[0]["plan"] == STEPS["steps"]


@pytest.mark.parametrize("bad, why", [
    (says("no JSON at all"), "no JSON object"),
    (says('{"steps": ["cut'), "a broken JSON object"),
    (says(STEPS, "length"), "cut off by a limit on tokens (finish_reason length); --max-tokens"),
    (says("", "length", reasoning_content=json.dumps(STEPS)), "--max-tokens"),
    (says(STEPS, "content_filter"), "withheld by the endpoint's filter (finish_reason content_filter)"),
    (says("", reasoning_content=json.dumps(STEPS)), "empty"),
    (says({"steps": ["put <image1> there"]}), "looks like an image tag"),
    (says({"steps": []}), "one to five"),
    (says({"steps": ["a"] * 6}), "one to five"),
    (says({"steps": ["a", " "]}), "1 to 200"),
    (says({"steps": ["a" * 201]}), "1 to 200"),
    (says({"steps": [1]}), "strings"),
    (says({"steps": "a"}), "list"),
    (says('{"a":' * 4000), ""),
    (says("x" * 100000 + json.dumps(STEPS)), "characters"),
    (says(STEPS, refusal="I would rather not"), "rather not"),
    (says(None), "empty"),
    (says("  "), "empty"),
    ((200, {}, b'{"choices": []}'), "not a chat completion"),
    ((200, {}, b'{"choices": [{"message": 3}]}'), "not a chat completion"),
    ((200, {}, b"<html>"), "not a chat completion"),
    ((200, {}, says(STEPS)[2].replace(b"sky", b"sk\xff")), "a reply that is not UTF-8"),
    (says([{"type": "text", "text": None}]), "not a chat completion"),
    ((200, {"Content-Length": "9999"}, says(STEPS)[2][:-5]), "not a chat completion"),
    ((500, {}, b"oops"), "HTTP 500: oops"),
    ((429, {"Retry-After": "soon"}, b""), "HTTP 429"),
    ((408, {}, b""), "HTTP 408"),
    ((200, {}, says(STEPS)[2] + b" " * 10 * 2**20), "more than 2097152 bytes")])
def test_a_bad_reply_is_a_failed_try(server, tmp_path, capsys, bad, why):
    data = training_file(tmp_path)
    server.answer = in_turn(bad, bad, says(STEPS))
    assert call("plan", server, data, tmp_path / "o.jsonl", "--tries", 2) == 1
    assert len(server.requests) == 2 and lines(tmp_path / "o.jsonl") == []
    printed = capsys.readouterr().out.splitlines()
    message, = [line for line in printed if line.startswith(f"{data}:1: plan: 2 tries failed")]
    assert why in message and len(message) < 350
    # a failed row is asked again
    assert call("plan", server, data, tmp_path / "o.jsonl", "--tries", 2) == 0
    assert len(server.requests) == 3 and lines(tmp_path / "o.jsonl")[0]["plan"] == STEPS["steps"]


def test_retry_after_is_honoured_and_bounded(server, tmp_path, waits):
    busy = [(503, {"Retry-After": seconds}, b"") for seconds in ("7", "86400")]
    server.answer = in_turn(*busy, (500, {}, b""), says(STEPS))
    assert call("plan", server, training_file(tmp_path), tmp_path / "o.jsonl") == 0
    assert waits[:2] == [7, 60] and waits[2] < 0.1 and len(waits) == 3 and len(server.requests) == 4


def test_the_wait_doubles(server, tmp_path, monkeypatch, waits):
    monkeypatch.setattr(endpoint, "BACKOFF", 1.0)
    server.answer = in_turn((500, {}, b""))
    assert call("plan", server, training_file(tmp_path), tmp_path / "o.jsonl", "--tries", 9) == 1
    assert len(waits) == 8
    assert all(min(60, 0.5 * 2**k) <= wait <= min(60, 1.5 * 2**k) for k, wait in enumerate(waits))
    assert len({wait / 2**k for k, wait in enumerate(waits[:5])}) == 5                 # jitter


@pytest.mark.parametrize("how", ["hang", "trickle"])
def test_a_reply_that_does_not_come_in_time(server, tmp_path, how):
    def trickle():                                                     # every single read succeeds
        for _ in range(50):
            yield b" "
            time.sleep(0.02)
        yield says(STEPS)[2]

    def answer(request, n):
        if n == 0 and how == "hang":
            server.release.wait(10)
        return (200, {}, trickle()) if n == 0 else says(STEPS)
    server.answer = answer
    start = time.monotonic()
    assert call("plan", server, training_file(tmp_path), tmp_path / "o.jsonl", "--timeout", 0.2) == 0
    assert len(server.requests) == 2 and time.monotonic() - start >= 0.2


def test_nobody_listens(tmp_path, capsys, waits):
    closed = Server()
    closed.server_close()
    assert call("plan", closed, training_file(tmp_path), tmp_path / "o.jsonl", "--tries", 2) == 1
    assert re.search("2 tries failed, the last with: no reply: .*refused", capsys.readouterr().out)


def test_other_errors_fail_the_row_at_once(server, tmp_path, capsys):
    data = training_file(tmp_path, 3)
    out = tmp_path / "o.jsonl"
    no_model = (400, {}, b"no such\n\x1b[31m model" + b"!" * 500)
    server.answer = lambda request, n: no_model if "edit 1" in text_of(request) else says(STEPS)
    assert call("plan", server, data, out) == 1
    message = capsys.readouterr().out.splitlines()
    assert message[0].startswith(f"{data}:2: HTTP 400: no such [31m model!!")
    assert message[0].endswith("!; --no-system, --max-tokens and --extra change what is sent")
    assert len(message[0]) < len(str(data)) + 290
    assert "1 of 3 rows failed" in message[1] and len(server.requests) == 3 and len(lines(out)) == 2
    (tmp_path / "source.png").unlink()
    assert call("plan", server, data, out) == 1
    assert "there is no such image" in capsys.readouterr().out and len(server.requests) == 3


@pytest.mark.parametrize("status", [302, 401, 402, 403, 404, 405])
def test_what_no_request_can_pass_stops_the_run(server, tmp_path, monkeypatch, status):
    data = training_file(tmp_path, 40)
    out = tmp_path / "o.jsonl"
    wrong = (status, {"Location": server.url + "/elsewhere"}, b"a wrong\nkey " + KEY.encode())
    monkeypatch.setenv("MLLM_API_KEY", KEY)
    server.answer = lambda request, n: wrong if n == 2 else says(STEPS)
    with pytest.raises(InputError) as error:
        call("plan", server, data, out, "--concurrency", 1)
    assert str(error.value).startswith(f"HTTP {status}: a wrong key [key]; check the key, --api and --model.")
    assert "\n" not in str(error.value)
    assert len(server.requests) == 3 and [row["row"] for row in lines(out)] == [1, 2]
    assert call("plan", server, data, out) == 0 and [row["row"] for row in lines(out)] == [*range(1, 41)]


def test_nothing_is_sent_after_the_end_of_a_run(server, tmp_path):
    server.answer = in_turn((401, {}, b"no"))
    one = endpoint.Endpoint(server.url, "m", "", 10, 3, tmp_path / "raw.jsonl")
    for _ in range(2):                                                 # the second row of another thread, say
        with pytest.raises(endpoint.StopRun, match="HTTP 401: no"):
            one.ask({}, "plan", "task", [], mllm.check_plan)
    assert len(server.requests) == 1


def test_a_log_that_cannot_be_written_stops_the_run(server, tmp_path, monkeypatch):
    def full(path, record):
        raise InputError(f"{path}: No space left on device")
    monkeypatch.setattr(endpoint, "append", full)
    server.answer = in_turn(says(STEPS))
    with pytest.raises(InputError, match="o.raw.jsonl: No space left"):
        call("plan", server, training_file(tmp_path, 40), tmp_path / "o.jsonl", "--concurrency", 2)
    assert len(server.requests) <= 2


def test_flags_change_the_fields_of_a_request(server, tmp_path):
    data = training_file(tmp_path)
    server.answer = in_turn(says(STEPS))
    extra = '{"max_tokens": null, "max_completion_tokens": 9, "temperature": null, "top_k": [1]}'
    for k, flags in enumerate([[], ["--max-tokens", 300],
                               ["--max-tokens", 300, "--extra", extra, "--no-system"]]):
        assert call("plan", server, data, tmp_path / f"{k}.jsonl", *flags) == 0
    plain, limited, other = server.requests
    assert set(plain) == {"model", "temperature", "messages"} and limited == {**plain, "max_tokens": 300}
    assert {**other, "messages": 0} == {"model": "m", "max_completion_tokens": 9, "top_k": [1], "messages": 0}
    (system, user), (both,) = plain["messages"], other["messages"]
    assert system == {"role": "system", "content": mllm.PROMPTS["PLAN"]}
    assert both == {"role": "user", "content": [mllm.text_part(system["content"]), *user["content"]]}


def escaped(answer):
    """The same reply, in which a key is a key only when it has been read as JSON."""
    status, headers, body = answer
    return status, headers, body.replace(b"-", b"\\u002d")


def test_the_key_is_written_nowhere(server, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("MLLM_API_KEY", KEY + "\n")
    seen = f"the key {KEY} is wrong"
    slashes = KEY.replace("/", "\\/").encode()
    echoes = [(400, {"reason": KEY}, seen.encode()), (429, {}, json.dumps({"error": seen}).encode()),
              escaped(says(seen)), escaped(says(None, refusal=seen)), says({"steps": [seen]}),
              (400, {}, b"x" * 180 + KEY.encode()), (400, {}, slashes), (200, {}, slashes),
              says(json.dumps({"steps": [seen]}).replace("-", "\\u002d"))]
    data = training_file(tmp_path / "data", len(echoes))
    out = tmp_path / "out/o.jsonl"
    server.answer = lambda request, n: echoes[int(text_of(request)[-1])]
    assert call("plan", server, data, out, "--tries", 2) == 1
    assert [row["row"] for row in sorted(lines(out), key=lambda row: row["row"])] == [5, 9]
    server.answer = in_turn(escaped(says({"steps": [seen]})))          # now OUT is sorted
    assert call("plan", server, data, out, "--tries", 2) == 0
    assert set(server.keys) == {f"Bearer {KEY}"}
    assert {row["plan"][0] for row in lines(out)} == {"the key [key] is wrong"}
    printed = capfd.readouterr()
    written = "".join(path.read_text() for path in tmp_path.rglob("*.jsonl"))
    assert len(list(out.parent.iterdir())) == 2 and "[key]" in written and "[key]" in printed.out
    for text in (printed.out, printed.err, written):
        assert KEY[:7] not in text and KEY[-12:] not in text
    monkeypatch.setenv("MLLM_API_KEY", "two words of it")
    with pytest.raises(InputError, match="the key in MLLM_API_KEY has characters") as error:
        call("plan", server, data, out)
    assert "words" not in str(error.value)


def test_killed_and_started_again(server, tmp_path):
    data = training_file(tmp_path, 12)
    out = tmp_path / "o.jsonl"
    asked = Counter()

    def answer(request, n):
        instruction = text_of(request).split(": ")[-1]
        with server.lock:
            asked[instruction] += 1
            blocked = instruction == "edit 0" or len(asked) > 6
        if blocked:
            server.release.wait(30)
        return says({"steps": [instruction]})
    server.answer = answer
    command = [sys.executable, "-m", "tools.mllm", "plan", "--data", data, "--out", out]
    command += ["--api", server.url, "--model", "m", "--concurrency", "2"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 60
    while time.monotonic() < end and process.poll() is None:
        if out.exists() and out.read_bytes().count(b"\n") == 5 and sum(asked.values()) == 7:
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert [row["row"] for row in lines(out)] == [2, 3, 4, 5, 6]
    assert asked == {f"edit {k}": 1 for k in range(7)}
    with open(out, "ab") as file:                                      # a kill can tear a line
        file.write(b'{"instruction": "edit 6", "input_ima')
    with open(out.with_suffix(".raw.jsonl"), "ab") as file:
        file.write(b'{"row": 7')
    server.release.set()
    assert call("plan", server, data, out, "--concurrency", 2) == 0
    # these two were under way
    assert asked == {f"edit {k}": 1 + (k in (0, 6)) for k in range(12)}
    assert [(row["row"], row["plan"]) for row in lines(out)] == [(k + 1, [f"edit {k}"]) for k in range(12)]
    assert sorted(reply["row"] for reply in lines(out.with_suffix(".raw.jsonl"))) == list(range(1, 13))
    assert sorted(path.name for path in tmp_path.glob("o*")) == ["o.jsonl", "o.raw.jsonl"]


def test_a_record_without_its_line_end_is_asked_again(server, tmp_path):
    data = training_file(tmp_path, 3)
    out = tmp_path / "o.jsonl"
    server.answer = in_turn(says(STEPS))
    assert call("plan", server, data, out) == 0
    out.write_text("\n".join(out.read_text().splitlines()[:2]))        # the second could be half of a line
    server.answer = lambda request, n: (400, {}, b"") if "edit 2" in text_of(request) else says(STEPS)
    assert call("plan", server, data, out) == 1
    assert len(server.requests) == 3 + 2 and [row["row"] for row in lines(out)] == [1, 2]


# ------------------------------------------------------------------------------------- grades

def test_complex_edit_keeps_what_belongs_together(server, tmp_path):
    data = results_file(tmp_path / "in", [(k, f"edit {k}", 100 + k, 10 * k) for k in range(10)])
    out = tmp_path / "judged.jsonl"
    times = Counter()

    def answer(request, n):
        images = images_of(request)
        kind, size, gray = images[-1]
        assert kind == "png"
        with server.lock:
            times[gray, len(images)] += 1
            turn = times[gray, len(images)]
        time.sleep(0.003 * (n * 7 % 5))
        if len(images) == 1:
            assert text_of(request) == ""                              # neither source nor instruction
            return says({"perceptual_quality": (gray // 10 + turn) % 11})
        assert images[0][2] == 100 + gray // 10 and f"Instruction: edit {gray // 10}" in text_of(request)
        return says({"reasoning": "...", "instruction_following": gray // 10, "identity_preservation": turn})
    server.answer = answer
    flags = ("--protocol", "complex-edit", "--samples", 3, "--concurrency", 5)
    assert call("judge", server, data, out, *flags) == 0
    assert len(server.requests) == 10 * 3 * 2
    rows = lines(out)
    assert [row["id"] for row in rows] == list(range(10))
    for k, row in enumerate(rows):
        samples = [(k, turn, (k + turn) % 11) for turn in (1, 2, 3)]
        assert [(s["IF"], s["IP"], s["PQ"]) for s in row["samples"]] == samples
        assert [s["overall"] for s in row["samples"]] == pytest.approx([sum(s) / 3 for s in samples])
        means = [sum(column) / 3 for column in zip(*samples)]
        means.append(sum(means) / 3)
        assert [row[name] for name in ("IF", "IP", "PQ", "overall")] == pytest.approx(means)
        assert row["seed"] == 7 and os.path.samefile(tmp_path / row["output"], tmp_path / f"in/{10 * k}.png")
    raw = lines(out.with_suffix(".raw.jsonl"))
    calls = {reply["call"] for reply in raw if reply["id"] == 3}
    assert len(raw) == 60 and calls == {f"{c} {k}" for c in ("alignment", "quality") for k in range(3)}


GOOD = {"reasoning": "", "instruction_following": 10, "identity_preservation": 0}


@pytest.mark.parametrize("change", [
    {"instruction_following": 11}, {"identity_preservation": -1}, {"instruction_following": 7.5},
    {"instruction_following": True}, {"instruction_following": "7/10"}, {"reasoning": None},
    {"instruction_following": "7.5"}, {"instruction_following": [7]}, {"instruction_following": float("nan")},
    {"instruction_following": float("inf")}, {"identity_preservation": 10**400},
    {"identity_preservation": ""}])
def test_grades_outside_the_range_are_asked_again(server, tmp_path, change):
    data = results_file(tmp_path, [("a", "x", 1, 2)])
    server.answer = in_turn(says({**GOOD, **change}), says(GOOD), says({"perceptual_quality": 11}),
                            says({"perceptual_quality": 3}))
    assert call("judge", server, data, tmp_path / "o.jsonl", "--protocol", "complex-edit") == 0
    row, = lines(tmp_path / "o.jsonl")
    assert len(server.requests) == 4 and (row["IF"], row["IP"], row["PQ"]) == (10, 0, 3)


def test_a_whole_number_is_one_however_it_is_written(server, tmp_path, capsys):
    data = results_file(tmp_path, [("a", "x", 1, 2)])
    written = {"reasoning": "", "instruction_following": 8.0, "identity_preservation": " 10 "}
    server.answer = in_turn(says(written), says({"perceptual_quality": "7.0"}))
    assert call("judge", server, data, tmp_path / "o.jsonl", "--protocol", "complex-edit", "--tries", 1) == 0
    row, = lines(tmp_path / "o.jsonl")
    assert row["samples"] == [{"IF": 8, "IP": 10, "PQ": 7, "overall": 25 / 3}]
    helpers.call(grades, tmp_path / "o.jsonl")
    assert "IF 8.000  IP 10.000  PQ 7.000" in capsys.readouterr().out


def five(tags, **change):
    questions = []
    for tag in tags.split():
        answers = [f"{tag}{grade}" for grade in range(6)]
        questions.append({"tag": tag, "question": f"{tag}?", "answers": answers, **change})
    return {"questions": questions}


def test_madi_asks_its_questions_once(server, tmp_path, capsys):
    # two instructions on one source, of three and two outputs; one edit without a source
    edits = [("a", "one", 1, 10), ("b", "one", 1, 11), ("c", "two", 1, 12),
             ("d", "one", 1, 13), ("e", "two", 1, 14), ("f", "one", None, 15)]
    data = results_file(tmp_path / "in", edits)
    out = tmp_path / "judged.jsonl"
    choices = {10: [5, 4, 0, -1, 4], 12: [0, 1, 2, 3, 4]}
    broken = True

    def answer(request, n):
        grays = [gray for _, _, gray in images_of(request)]
        if grays in ([1], []):                                         # the questions: no output is seen
            return says(five("IF IDP IF PQ IDP") if grays else five("IF IF IF IF IF"))
        assert "IF?\n   0: IF0\n" in text_of(request) and "5: IF5" in text_of(request)
        if broken and grays[-1] == 13:
            return 400, {}, b"not now"
        return says({"choices": choices.get(grays[-1], [1, 1, 1, 1, 1])})
    server.answer = answer
    flags = ("--protocol", "madi", "--concurrency", 3)
    assert call("judge", server, data, out, *flags) == 1
    assert len(server.requests) == 3 + 6 and len(lines(out)) == 5
    assert f"{data}:4: HTTP 400: not now" in capsys.readouterr().out
    broken = False
    assert call("judge", server, data, out, *flags) == 0 and len(server.requests) == 3 + 6 + 1
    assert call("judge", server, data, out, *flags) == 0 and len(server.requests) == 3 + 6 + 1
    rows = {row["id"]: row for row in lines(out)}
    assert list(rows) == list("abcdef") and rows["a"]["choices"] == choices[10]
    assert (rows["a"]["IF"], rows["a"]["IDP"], rows["a"]["PQ"]) == (5.5, pytest.approx(8.2), None)
    assert rows["c"]["IF"] == pytest.approx((1 + 4.6) / 2) and rows["c"]["PQ"] == pytest.approx(6.4)
    assert rows["f"]["IDP"] is None and rows["f"]["IF"] == pytest.approx(2.8) and rows["f"]["source"] is None
    assert rows["a"]["questions"] == five("IF IDP IF PQ IDP")["questions"]
    assert len(lines(out.with_suffix(".questions.jsonl"))) == 3


@pytest.mark.parametrize("source, bad", [
    (1, five("IF IDP PQ PQ")), (1, five("IF IDP PQ PQ PQ PQ")), (1, five("IF IF IF PQ PQ")),
    (1, five("IDP IDP IDP PQ PQ")), (1, five("IF IDP PQ PQ XY")), (None, five("IF IDP PQ PQ PQ")),
    (1, five("IF IDP PQ PQ PQ", question="")), (1, five("IF IDP PQ PQ PQ", answers=["a"] * 5)),
    (1, five("IF IDP PQ PQ PQ", answers=[1] * 6)), (1, {"questions": ["IF", "IDP", "PQ", "PQ", "PQ"]})])
def test_bad_questions_are_asked_again(server, tmp_path, source, bad):
    good = five("IF IDP PQ PQ PQ" if source else "IF IF PQ PQ PQ")
    server.answer = in_turn(says(bad), says(good), says({"choices": [5] * 5}))
    data = results_file(tmp_path, [("a", "x", source, 2)])
    assert call("judge", server, data, tmp_path / "o.jsonl", "--protocol", "madi") == 0
    assert len(server.requests) == 3 and lines(tmp_path / "o.jsonl")[0]["questions"] == good["questions"]


@pytest.mark.parametrize("bad", [
    [5] * 4, [5] * 6, [5, 5, 5, 5, 6], [-2, 5, 5, 5, 5], [5, 5, 5, 5, 4.5], [True] * 5, "55555"])
def test_bad_choices_are_asked_again(server, tmp_path, bad):
    good = says({"choices": ["0", 5.0, -1, " 5", 5]})
    server.answer = in_turn(says(five("IF IDP PQ PQ PQ")), says({"choices": bad}), good)
    data = results_file(tmp_path, [("a", "x", 1, 2)])
    assert call("judge", server, data, tmp_path / "o.jsonl", "--protocol", "madi") == 0
    assert len(server.requests) == 3 and lines(tmp_path / "o.jsonl")[0]["IF"] == 1


def test_questions_that_cannot_be_had_fail_their_rows(server, tmp_path, capsys):
    data = results_file(tmp_path, [("a", "x", 1, 2), ("b", "x", 1, 3)])
    server.answer = in_turn((400, {}, b"no"))
    assert call("judge", server, data, tmp_path / "o.jsonl", "--protocol", "madi") == 1
    assert len(server.requests) == 1 and capsys.readouterr().out.count(": HTTP 400: no") == 2


def test_questions_of_another_model_are_not_used(server, tmp_path):
    data = results_file(tmp_path, [("a", "x", 1, 2)])
    old = {"source": "1.png", "instruction": "x", "model": "another", **five("IF IF IF IF IDP")}
    questions = write_lines(tmp_path / "o.questions.jsonl", [old])
    server.answer = in_turn(says(five("IF IDP PQ PQ PQ")), says({"choices": [5] * 5}))
    assert call("judge", server, data, tmp_path / "o.jsonl", "--protocol", "madi") == 0
    assert len(server.requests) == 2 and [row["model"] for row in lines(questions)] == ["another", "m"]
    for bad in ({**old, "questions": [5]}, {"model": "m"}, {**old, "model": "m", "source": [1]}):
        write_lines(questions, [old, bad])
        with pytest.raises(InputError, match="o.questions.jsonl:2: not a line of questions"):
            call("judge", server, data, tmp_path / "o.jsonl", "--protocol", "madi")


# --------------------------------------------------------------------------------- one line for what is wrong

ROW = {"id": 1, "instruction": "x", "source": "1.png", "output": "2.png"}


@pytest.mark.parametrize("row, message", [
    ("{not", "not JSON"),
    ([1], "a row is a JSON object"),
    ({"id": 2}, "the key 'instruction' is missing"),
    ({**ROW, "id": True}, "id should be text or a number, not true"),
    ({**ROW, "id": float("nan")}, "id should be text or a number, not NaN"),
    ({**ROW, "id": [1]}, "id should be text or a number"),
    ('{"id": 1' + "0" * 5000 + "}", "not JSON"),
    ('{"id": ' + "[" * 5000 + "]" * 5000 + "}", "nested too deeply"),
    ({**ROW, "output": "a\0.png"}, "is no path"),
    ({**ROW, "source": 3}, "source should be a path or null"),
    ({**ROW, "output": ""}, "output should be a path"),
    ({**ROW, "source": None}, "source is null"),
    (ROW, "the same id and output as line 1"),
    ({**ROW, "PQ": 3}, "judging adds PQ itself; rename the key")])
def test_bad_rows_are_named_by_line(server, tmp_path, row, message):
    data = tmp_path / "results.jsonl"
    data.write_text(json.dumps(ROW) + "\n\n" + (row if isinstance(row, str) else json.dumps(row)) + "\n")
    with pytest.raises(InputError, match=message) as error:
        call("judge", server, data, tmp_path / "o.jsonl", "--protocol", "complex-edit")
    assert f"{data}:3:" in str(error.value) and "\n" not in str(error.value) and not server.requests


@pytest.mark.parametrize("flag, value, message", [
    ("--api", "ftp://host/v1", "--api: 'ftp://host/v1': an address"),
    ("--api", "host", "an address"),
    ("--api", "http://h:x/", "an address"),
    ("--api", "http://me:secret@h/", "--api: 'http://...@h/'"),
    ("--api", "http://h/a b", "an address"),
    ("--api", "http://h/v1?a=b", "an address"),
    ("--api", "http:///v1", "an address"),
    ("--concurrency", "0", "--concurrency: 0 is not"),
    ("--tries", "-1", "--tries: -1 is not"),
    ("--timeout", "0", "--timeout: 0 is not"),
    ("--timeout", "nan", "--timeout: nan is not"),
    ("--max-tokens", "0", "--max-tokens: 0 is not"),
    ("--extra", "{", "--extra: not JSON"),
    ("--extra", "[1]", "--extra: '[1]' is not a JSON object"),
    ("--extra", '{"top_p": NaN}', "--extra: "),
    ("--extra", '{"messages": []}', "--extra: this program sets messages itself"),
    ("--extra", '{"stream": true}', "--extra: this program sets stream itself"),
    ("--data", "none.jsonl", "none.jsonl: there is no such file"),
    ("--data", ".", ".: Is a directory"),
    ("--out", "/proc/x/o.jsonl", "cannot write there"),
    ("--out", "/dev/null/o.jsonl", "cannot write there"),
    ("--out", "out", "ends in .jsonl"),
    ("--out", "SAME", "another file than --data")])
def test_bad_flags(server, tmp_path, flag, value, message):
    data = training_file(tmp_path)
    try:
        said = call("plan", server, data, tmp_path / "o.jsonl", flag, data if value == "SAME" else value)
    except InputError as error:
        said = str(error)
    assert message in said and "\n" not in said and "secret" not in said and not server.requests


@pytest.mark.parametrize("url", ["http://localhost:8000/v1", "https://host.org/a@b/v1/", "http://[::1]:80"])
def test_good_addresses(url):
    assert endpoint.address(url) == url


def test_another_run_is_not_continued(server, tmp_path):
    data = results_file(tmp_path, [("a", "x", 1, 2)])
    out = tmp_path / "o.jsonl"
    server.answer = in_turn(says(GOOD), says({"perceptual_quality": 3}))
    assert call("judge", server, data, out, "--protocol", "complex-edit") == 0
    before = out.read_text()
    for other in (["madi"], ["complex-edit", "--samples", 2], ["complex-edit", "--model", "n"],
                  ["complex-edit", "--no-system"], ["complex-edit", "--extra", '{"temperature": null}']):
        with pytest.raises(InputError, match="o.jsonl:1: of another input row, model"):
            call("judge", server, data, out, "--protocol", *other)
    limits = ("--max-tokens", 9, "--extra", '{"max_completion_tokens": 9}')         # these change no grade
    assert call("judge", server, data, out, "--protocol", "complex-edit", *limits) == 0
    ungraded = {key: value for key, value in json.loads(before).items() if key != "PQ"}
    write_lines(out, [ungraded])
    with pytest.raises(InputError, match="o.jsonl:1: of another input row"):
        call("judge", server, data, out, "--protocol", "complex-edit")
    out.write_text(before)
    results_file(tmp_path, [("a", "y", 1, 2)])
    with pytest.raises(InputError, match="o.jsonl:1: of another input row"):
        call("judge", server, data, out, "--protocol", "complex-edit")
    for nonsense, message in (("nonsense", "not JSON"), ("[1]", "a row is a JSON object")):
        out.write_text(nonsense + "\n" + before)
        with pytest.raises(InputError, match=f"o.jsonl:1: {message}"):
            call("judge", server, data, out, "--protocol", "complex-edit")
        assert out.read_text() == nonsense + "\n" + before
    with pytest.raises(InputError, match="--samples 2: madi asks"):
        call("judge", server, data, out, "--protocol", "madi", "--samples", 2)
    assert len(server.requests) == 2


def test_the_script_prints_one_line_and_waits_for_nothing(server, tmp_path):
    data = training_file(tmp_path, 9)

    def answer(request, n):
        if "edit 1" in text_of(request):
            server.release.wait(60)                                    # under way when the run ends
        return says(STEPS) if "edit 0" in text_of(request) else (403, {}, b"not yours")
    server.answer = answer
    start = time.monotonic()
    done = helpers.run("-m", "tools.mllm", "plan", "--data", data, "--out", tmp_path / "o.jsonl", "--api",
                       server.url, "--model", "m", "--concurrency", 2, check=1)
    assert time.monotonic() - start < 50 and len(server.requests) == 3
    assert [row["row"] for row in lines(tmp_path / "o.jsonl")] == [1]
    assert "Traceback" not in done.stderr and done.stderr.splitlines()[-1].startswith(
        "mllm.py: HTTP 403: not yours; check the key, --api and --model.")
