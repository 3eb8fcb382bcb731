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

from common.files import InputError, append

BACKOFF = 1.0                             # seconds before the second try, doubled before each further one
MOST_WAIT = 60.0                          # seconds between two tries
MOST_BYTES = 2 * 2**20                    # of a reply's body
MOST_TEXT = 10**5                         # characters of a reply's message

# scheme, host or [IPv6 address], port, and a path of printable ASCII but # and ?
ADDRESS = r"https?://([\w.-]+|\[[\da-fA-F:.]+\])(:(?P<port>\d{1,5}))?(/[!\"$->@-~]*)?"

# without error handlers: a reply of any status is returned, and no redirect takes the key elsewhere
OPENER = urllib.request.OpenerDirector()
for handler in (urllib.request.ProxyHandler, urllib.request.HTTPHandler, urllib.request.HTTPSHandler):
    OPENER.add_handler(handler())


class FailedTry(Exception):
    """FailedTry(reason, seconds that the server asks to wait): the same request may succeed later."""


def address(text):
    """The type of --api."""
    match = re.fullmatch(ADDRESS, text, re.ASCII)
    if not match or not 0 < int(match["port"] or 80) < 2**16:
        shown = re.sub("//.*@", "//...@", text)                        # what is hidden may be a password
        raise argparse.ArgumentTypeError(f"{shown!r}: an address such as https://host/v1 is needed, "
                                         f"http or https, without user, ? or #")
    return text


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
    log: Path                             # JSONL file that gets every reply as it came
    writing: threading.Lock = field(default_factory=threading.Lock)

    def ask(self, about, call, task, parts, check):
        """Ask one question -> what check(answer) returns for the JSON object in the reply, or InputError.

        about (dict) and call (str) name the question in the log. task is the system's message, parts (texts
        and images) the user's. check raises ValueError for an unacceptable answer: that try has failed."""
        messages = [{"role": "system", "content": task}, {"role": "user", "content": parts}]
        body = json.dumps({"model": self.model, "temperature": 1, "messages": messages}).encode()
        for k in range(self.tries):
            try:
                text = self.post(body)
                message, refusal = read_completion(text)
                message = self.clean(message)
                with self.writing:                                     # long lines of two threads would mix
                    append(self.log, {**about, "call": call, "reply": message or text})
                if refusal:
                    raise FailedTry(f"no answer: {refusal}", 0)
                return read_answer(message, lambda answer: check(self.clean_json(answer)))
            except FailedTry as error:
                reason, after = error.args
            if k + 1 < self.tries:                                     # jitter keeps the threads apart
                wait = BACKOFF * 2 ** min(k, 9) * random.uniform(0.5, 1.5)
                time.sleep(min(MOST_WAIT, max(after, wait)))
        raise InputError(f"{call}: {self.tries} tries failed, the last with: {self.one_line(reason)}")

    def post(self, body):
        """One request -> the body of the reply. FailedTry: it may work later; InputError: it will not."""
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
        text = self.clean(data.decode("utf-8", "replace"))
        if response.status in (408, 429) or response.status >= 500:
            after = response.headers.get("Retry-After", "")
            seconds = int(after) if re.fullmatch("[0-9]{1,9}", after) else 0
            raise FailedTry(f"HTTP {response.status}: {text}", seconds)
        if not 200 <= response.status < 300:
            raise InputError(f"HTTP {response.status}: {self.one_line(text)}")
        return text

    def clean(self, text):
        """`text` without the key, and without halves of surrogate pairs, which no file can hold."""
        if len(self.key) >= 8:            # a short one, such as EMPTY, is what servers without keys are given
            text = text.replace(self.key, "[key]").replace(self.key.replace("/", "\\/"), "[key]")
        return text.encode("utf-8", "replace").decode()

    def clean_json(self, value):
        """A value without the key, which JSON's escapes can have hidden from `clean`."""
        return json.loads(self.clean(json.dumps(value, ensure_ascii=False)))

    def one_line(self, text):
        """Up to 200 printable characters. The key goes before the cut, or a part of it could be left."""
        text = "".join(c if c.isprintable() else " " for c in self.clean(text))
        return " ".join(text.split())[:200]


def read_completion(text):
    """The body of a chat completion -> its message, or ""; why there is no answer, or None."""
    try:
        message = json.loads(text)["choices"][0]["message"]
        content = message.get("content")
        refusal = message.get("refusal")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return "", f"not a chat completion: {text}"
    if not isinstance(content, str) or not content.strip():
        return "", refusal or "an empty message"
    return content, refusal


def read_answer(message, check):
    """What check() returns for the last JSON object it accepts: models think aloud first and add fences."""
    if len(message) > MOST_TEXT:
        raise FailedTry(f"a message of {len(message)} characters", 0)
    accepted = None
    reason = "no JSON object in it"
    start = message.find("{")
    while start >= 0:
        end = start + 1
        try:
            answer, end = json.JSONDecoder().raw_decode(message, start)
            accepted = check(answer)
        except json.JSONDecodeError:
            pass                                                       # a brace that begins no object
        except (ValueError, RecursionError) as error:
            reason = str(error)
        start = message.find("{", end)
    if accepted is None:
        raise FailedTry(f"{reason}: {message}", 0)
    return accepted
