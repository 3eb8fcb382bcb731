"""Files in and out. Every reader says in one line what is wrong with a file; every writer leaves the old
file or the new one, never half of one."""
import hashlib
import importlib
import json
import os
from contextlib import contextmanager
from pathlib import Path


class InputError(ValueError):
    """Something the user gave is wrong. The scripts print it as one line, without a traceback."""

    def __str__(self):                    # the name of a file may hold anything
        return "".join(c if c.isprintable() else " " for c in super().__str__())


def optional(name, package=None):
    """Import a module that only some commands need; InputError says which package to install, if it is not
    the one of that name."""
    try:
        return importlib.import_module(name)
    except ImportError:
        package = package or name.split(".")[0]
        raise InputError(f"this needs the optional package {package}: pip install {package}") from None


def decode(raw, first_line=1):
    """bytes of UTF-8, with or without a byte order mark -> str. InputError names the first bad byte."""
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise InputError("this is UTF-16 text; save it as UTF-8")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = first_line + raw[:error.start].count(b"\n")
        column = error.start - raw.rfind(b"\n", 0, error.start)
        raise InputError(f"not UTF-8 text: byte 0x{raw[error.start]:02x} at line {line}, byte {column}; "
                         f"save it as UTF-8") from None


def parse_json(text):
    """The value of a JSON text, or InputError."""
    try:
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False).encode()                 # fails on half of a surrogate pair
        return value
    except RecursionError:
        raise InputError("not JSON that can be read: it is nested too deeply") from None
    except UnicodeEncodeError:
        raise InputError("not text: it has half of a surrogate pair, such as half of an emoji") from None
    except ValueError as error:
        raise InputError(f"not JSON ({error})") from None


@contextmanager
def reading(path, hint=""):
    """Open a file of bytes; what goes wrong is one line, an InputError. `hint` says where such a file comes
    from."""
    try:
        with open(path, "rb") as file:
            yield file
    except InputError:
        raise
    except (OSError, ValueError) as error:                             # ValueError: no name of a file
        reason = getattr(error, "strerror", None) or error
        if isinstance(error, FileNotFoundError):
            reason = "there is no such file"
        raise InputError(f"{path}: {reason}. {hint}".rstrip(". ")) from None


def read_bytes(path, hint=""):
    """All bytes of a file, or InputError."""
    with reading(path, hint) as file:
        return file.read()


def read_lines(path, hint=""):
    """The lines of a file as bytes, each with its end, one at a time; or InputError."""
    with reading(path, hint) as file:
        yield from file


def file_checksum(path, hint=""):
    """sha256 of a file's bytes, or InputError."""
    with reading(path, hint) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path, kind=dict, hint=""):
    """A JSON file that holds a value of type `kind`."""
    raw = read_bytes(path, hint)
    try:
        value = parse_json(decode(raw))
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    if not isinstance(value, kind):
        raise InputError(f"{path}: a JSON {kind.__name__} is expected, this is a {type(value).__name__}")
    return value


def parse_line(line, number):
    """bytes of one line of JSONL -> dict, or InputError."""
    value = parse_json(decode(line, number))
    if not isinstance(value, dict):
        raise InputError(f"a row is a JSON object, this is {type(value).__name__}")
    return value


def json_lines(lines):
    """Lines of JSONL as bytes: yield (line number, dict or InputError, offset of the line in bytes, line) for
    each that is not blank."""
    offset = 0
    for number, line in enumerate(lines, 1):
        start = offset
        offset += len(line)
        if not line.strip():
            continue
        line = line.removesuffix(b"\n")
        try:
            value = parse_line(line, number)
        except InputError as error:
            value = error
        yield number, value, start, line
        if line[:2] in (b"\xff\xfe", b"\xfe\xff"):
            return                                                     # UTF-16: said once, not for every line


def rows_of(path, hint="", lines=None):
    """A JSONL file, or some of its lines -> [(line number, dict)]. The first bad line raises, by number."""
    rows = []
    for number, row, *_ in json_lines(read_lines(path, hint) if lines is None else lines):
        if isinstance(row, InputError):
            raise InputError(f"{path}:{number}: {row}")
        rows.append((number, row))
    return rows


@contextmanager
def writing(path, mode="w"):
    """Open a file that takes the place of `path` when it is whole and on disk; a failure leaves nothing.

    The caller does nothing but write inside."""
    path = Path(path)
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        text = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}
        with open(temporary, mode, **text) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except InputError:
        raise
    except Exception as error:            # torch and safetensors have types of their own for a full disk
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        reason = getattr(cause, "strerror", None) or str(cause).split("\n")[0] or type(cause).__name__
        kept = "; the one that was there is still whole" if path.exists() else ""
        raise InputError(f"{path}: cannot be written ({reason}){kept}") from None
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path, text):
    with writing(path) as file:
        file.write(text)


def write_json(path, value):
    write_text(path, json.dumps(value, indent=1))


def write_jsonl(path, records):
    write_text(path, "".join(json.dumps(record) + "\n" for record in records))


def relative(path, start):
    """`path` as seen from the folder `start`; on another drive of Windows, the absolute path."""
    try:
        return os.path.relpath(path, start)
    except ValueError:
        return os.path.abspath(path)


def make_folder(path):
    """A folder that can be written to, made if need be: found out before the work, not after it."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        probe = Path(path) / ".probe"
        probe.touch()
        probe.unlink(missing_ok=True)                                  # another process may be faster
    except OSError as error:
        raise InputError(f"{path}: cannot write there ({error.strerror})") from None
    return Path(path)


def append(path, record):
    """Add one line to a JSONL file; on return it is on disk."""
    try:
        with open(path, "a", encoding="utf-8", newline="\n") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); what was there is whole") from None


def whole_lines(path):
    """The lines of a JSONL file that `append` wrote, without what a killed run left of a last line."""
    return (line for line in read_lines(path) if line.endswith(b"\n"))


def cut_rest(path):
    """Remove that rest from the file, before more is appended. Only the process that writes it may."""
    if Path(path).exists():
        end = sum(map(len, whole_lines(path)))
        if end < os.path.getsize(path):
            os.truncate(path, end)


def finished(path):
    """The records of a JSONL file that `append` wrote -> [dict]."""
    if not Path(path).exists():
        return []
    return [row for _, row in rows_of(path, lines=whole_lines(path))]
