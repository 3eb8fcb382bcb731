"""A client for language models behind any endpoint that speaks OpenAI's chat protocol.

Endpoint.ask repeats a question until an acceptable answer comes back. It never gives the key away.
"""
import argparse
import http.client
import json
import os
import random
import re
import threading
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

from common.files import InputError, append, parse_json

BACKOFF = 1.0                             # seconds before the second try, doubled before each further one
MOST_WAIT = 60.0                          # seconds between two tries
MOST_BYTES = 2 * 2**20                    # of a reply's body
MOST_TEXT = 10**5                         # characters of a reply's message, thoughts left out
# begins or ends a thought: <think>, </think>, <thinking>, [THINK], <|/think|>; group 1 is / at its end
THOUGHT = r"(?i)[<\[◁]\|?(/?)\s*(?:\w+:)?(?:think|thinking|thoughts?|reasoning)\s*\|?[>\]▷]"
DECODER = json.JSONDecoder(strict=False)  # with line breaks in strings, which models do not escape

# scheme, host or [IPv6 address], port, and a path of printable ASCII but # and ?
ADDRESS = r"https?://([\w.-]+|\[[\da-fA-F:.]+\])(:(?P<port>\d{1,5}))?(/[!\"$->@-~]*)?"

# without error handlers: a reply of any status is returned, and no redirect takes the key elsewhere
OPENER = urllib.request.OpenerDirector()
for handler in (urllib.request.ProxyHandler, urllib.request.HTTPHandler, urllib.request.HTTPSHandler):
    OPENER.add_handler(handler())


class FailedTry(Exception):
    """FailedTry(reason, seconds that the server asks to wait): the same request may succeed later."""


class StopRun(InputError):
    """No other request will fare better, or no reply can be kept: the whole run ends."""


def address(text):
    """The type of --api."""
    match = re.fullmatch(ADDRESS, text, re.ASCII)
    if not match or not 0 < int(match["port"] or 80) < 2**16:
        shown = re.sub("//.*@", "//...@", text)                        # what is hidden may be a password
        raise argparse.ArgumentTypeError(f"{shown!r}: an address such as https://host/v1 is needed, "
                                         f"http or https, without user, ? or #")
    return text


def request_fields(text):
    """The type of --extra."""
    try:
        fields = parse_json(text)
        json.dumps(fields, allow_nan=False)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if not isinstance(fields, dict):
        raise argparse.ArgumentTypeError(f"{text!r:.60} is not a JSON object such as {{\"top_p\": 0.9}}")
    if taken := sorted({"messages", "model", "stream"} & set(fields)):
        raise argparse.ArgumentTypeError(f"this program sets {', '.join(taken)} itself")
    return fields


def key_from(variable):
    """The key in an environment variable, "" if it is not set."""
    key = os.environ.get(variable, "").strip()
    if re.search(r"[^!-~]|[\"\\]", key):
        raise InputError(f"the key in {variable} has characters that no key has; "
                         f"set it again, without quotes or spaces")
    return key


@dataclass
class Endpoint:
    """One model at one address; several threads may ask it at once."""
    api: str                              # the address up to /chat/completions
    model: str
    key: str = field(repr=False)          # none is sent if it is empty
    timeout: float                        # seconds for a whole reply
    tries: int                            # for an acceptable answer to one question
    log: Path                             # JSONL file that gets every message, or other reply, as it came
    fields: dict = field(default_factory=dict)     # of each request; without those that are None
    system: bool = True                   # is the task a message of the system, or part of the user's?
    stopped: StopRun | None = None        # why nothing more is sent
    writing: threading.Lock = field(default_factory=threading.Lock)

    def ask(self, about, call, task, parts, check):
        """Ask one question -> what check(answer) returns for the JSON object in the reply, or InputError.

        about (dict) and call (str) name the question in the log. task is the system's message, parts (texts
        and images) the user's. check raises ValueError for an unacceptable answer: that try has failed."""
        if self.system:
            messages = [{"role": "system", "content": task}, {"role": "user", "content": parts}]
        else:
            messages = [{"role": "user", "content": [{"type": "text", "text": task}, *parts]}]
        fields = {"model": self.model, "temperature": 1, "messages": messages, **self.fields}
        body = json.dumps({name: value for name, value in fields.items() if value is not None}).encode()
        for k in range(self.tries):
            if self.stopped:
                raise self.stopped
            try:
                text = self.post(body)
                message, problem = read_completion(text)
                self.keep({**about, "call": call, "reply": self.clean(message or text)})
                if problem:
                    raise FailedTry(f"no answer: {problem}", 0)
                return read_answer(message, lambda answer: check(self.clean_json(answer)))
            except StopRun as error:
                self.stopped = error
                raise
            except FailedTry as error:
                reason, after = error.args
            if k + 1 < self.tries:                                     # jitter keeps the threads apart
                wait = BACKOFF * 2 ** min(k, 9) * random.uniform(0.5, 1.5)
                time.sleep(min(MOST_WAIT, max(after, wait)))
        raise InputError(f"{call}: {self.tries} tries failed, the last with: {self.one_line(reason)}")

    def keep(self, record):
        with self.writing:                                             # long lines of two threads would mix
            try:
                append(self.log, record)
            except InputError as error:
                raise StopRun(str(error)) from None

    def post(self, body):
        """One request -> the body of the reply. FailedTry: it may work later; InputError: it will not;
        StopRun: nor will any other."""
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        request = urllib.request.Request(self.api.rstrip("/") + "/chat/completions", body, headers)
        end = time.monotonic() + self.timeout
        data = b""
        try:
            with OPENER.open(request, timeout=self.timeout) as response:
                while chunk := response.read1(2**16):
                    data += chunk
                    if len(data) > MOST_BYTES:
                        raise FailedTry(f"a reply of more than {MOST_BYTES} bytes", 0)
                    if time.monotonic() > end:                         # the socket's limit is for one read
                        raise TimeoutError("timed out")
        except (OSError, UnicodeError, OverflowError, http.client.HTTPException) as error:
            why = str(getattr(error, "reason", error)) or type(error).__name__
            raise FailedTry(f"no reply: {why}", 0) from None
        text = data.decode("utf-8", "replace")                         # as it is shown in a message
        if response.status in (408, 429) or response.status >= 500:
            after = response.headers.get("Retry-After", "")
            seconds = int(after) if re.fullmatch("[0-9]{1,9}", after) else 0
            raise FailedTry(f"HTTP {response.status}: {text}", seconds)
        if not 200 <= response.status < 300:
            reason = f"HTTP {response.status}: {self.one_line(text)}"
            if response.status in (401, 402, 403, 404, 405) or response.status < 400:
                raise StopRun(f"{reason}; check the key, --api and --model. What is done stays: the same "
                              f"command goes on")
            if response.status in (400, 422):
                reason += "; --no-system, --max-tokens and --extra change what is sent"
            raise InputError(reason)
        try:
            return data.decode("utf-8-sig")
        except UnicodeDecodeError:
            raise FailedTry(f"a reply that is not UTF-8 text: {text}", 0) from None

    def hide_key(self, text):
        if len(self.key) < 8:             # a short one, such as EMPTY, is what servers without keys are given
            return text
        return text.replace(self.key, "[key]").replace(self.key.replace("/", "\\/"), "[key]")

    def clean(self, text):
        """`text` without the key, and without halves of surrogate pairs, which no file can hold."""
        return self.hide_key(text).encode("utf-8", "replace").decode()

    def clean_json(self, value):
        """A value without the key, which JSON's escapes can have hidden; InputError for half of an emoji."""
        return parse_json(self.hide_key(json.dumps(value, ensure_ascii=False)))

    def one_line(self, text):
        """Up to 200 printable characters. The key goes before the cut, or a part of it could be left."""
        text = "".join(c if c.isprintable() else " " for c in self.clean(text))
        return " ".join(text.split())[:200]


def read_completion(text):
    """The body of a chat completion -> its message, or ""; why it is no answer, or None."""
    try:
        choice = json.loads(text, strict=False)["choices"][0]
        content = choice["message"].get("content")
        refusal = choice["message"].get("refusal")
        end = str(choice.get("finish_reason")).lower()
        if isinstance(content, list):                                  # parts; thoughts are of other types
            content = "".join(part["text"] for part in content if part["type"] in ("text", "output_text"))
        content = content or ""
        if not isinstance(content, str):
            raise TypeError
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return "", f"not a chat completion: {text}"
    if end in ("length", "max_tokens", "model_length"):
        return content, f"cut off by a limit on tokens (finish_reason {end}); --max-tokens sets another one"
    if end in ("content_filter", "safety"):
        return content, f"withheld by the endpoint's filter (finish_reason {end})"
    return content, refusal or (None if content.strip() else "an empty message")


def read_answer(message, check):
    """What check() returns for the last JSON object, which should be the answer: models think aloud first, in
    tags or without, and add fences. FailedTry if it is cut off or not acceptable."""
    tags = list(re.finditer(THOUGHT, message))
    if tags and not tags[-1][1]:
        raise FailedTry(f"a thought without an end: {message}", 0)
    text = message[tags[-1].end():] if tags else message
    if len(text) > MOST_TEXT:
        raise FailedTry(f"a message of {len(text)} characters", 0)
    accepted = None
    reason = "no JSON object in it"
    start = text.find("{")
    while start >= 0:
        end = start + 1
        try:
            answer, end = DECODER.raw_decode(text, start)
            accepted = check(answer)
        except json.JSONDecodeError as error:
            if re.compile(r'\{\s*"').match(text, start):               # else a brace that begins no object
                accepted = None
                reason = f"a broken JSON object in it ({error.msg})"
            end = max(end, error.pos)                                  # what stands inside it is no answer
        except (ValueError, RecursionError) as error:
            accepted = None
            reason = str(error)
            if end == start + 1:                                       # nested too deeply, a number too long
                break
        start = text.find("{", end)
    if accepted is None:
        raise FailedTry(f"{reason}: {text}", 0)
    return accepted
