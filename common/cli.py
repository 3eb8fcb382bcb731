"""Flags and commands: one line for whatever is wrong with them."""
import argparse
import math
import os
import sys
from pathlib import Path

from common.files import InputError


class Parser(argparse.ArgumentParser):
    """argparse whose error is one line, without the usage."""

    def error(self, message):
        sys.exit(f"{Path(sys.argv[0]).name}: {message}")


def parser(doc):
    """A Parser that shows the docstring of a script as it is written."""
    return Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def add_command(commands, function):
    """A subcommand of the function's name, with its docstring as help."""
    help_line = function.__doc__.split("\n")[0]
    command = commands.add_parser(function.__name__, help=help_line, description=function.__doc__,
                                  formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    command.set_defaults(run=function)
    return command


def add_device(command):
    command.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto",
                         help="auto: CUDA where it is, else the CPU")


def number(kind, low=-math.inf, high=math.inf, above=False):
    """The type of a flag: an int or a float in [low, high], or in (low, high] if `above`."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high or (above and value == low) or abs(value) == math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not in {'(' if above else '['}{low}, {high}]")
        return value
    parse.__name__ = {int: "whole number", float: "number"}[kind]  # shown in argparse's message
    return parse


COUNT = number(int, 1, 10**9)
NONE_OR_MORE = number(int, 0, 10**9)
SEED = number(int, 0, 2**63 - 1)          # what torch and random take alike
SHARE = number(float, 0, 1)
POSITIVE = number(float, 0, above=True)
ZERO_OR_MORE = number(float, 0)
FINITE = number(float)
GUIDANCE = number(float, 0, 1000)         # much larger ones overflow


def utf8_text(given):
    """The type of a flag that is a text: the bytes of the command line as UTF-8, whatever the locale."""
    try:
        return os.fsencode(given).decode()
    except UnicodeError:
        raise argparse.ArgumentTypeError(f"{ascii(given)} is not UTF-8 text") from None


def numbers(high):
    """The type of a flag: a list of different whole numbers from 0 to `high`."""
    def parse(text):
        try:
            values = [int(part) for part in text.split(",")]
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers such as 0,8,16,32") from None
        if min(values) < 0 or max(values) > high or len(set(values)) < len(values):
            raise argparse.ArgumentTypeError(f"{text!r}: different numbers from 0 to {high} are needed")
        return values
    return parse


def two_times(text):
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        low = high = math.nan
    if not 0 <= low <= high <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not two times from 0 (noise) to 1, such as 0.1,0.6")
    return low, high


def width_and_height(text):
    sides = text.split("x")
    good = all(side.isdecimal() and int(side) > 0 and int(side) % 16 == 0 for side in sides)
    if len(sides) != 2 or not good:
        raise argparse.ArgumentTypeError(f"{text!r} is not WIDTHxHEIGHT in multiples of 16, such as 1024x768")
    return [int(side) for side in sides]


def run_script(main):
    """Run a script's main(); what is wrong, or out of memory, becomes one line and exit code 1."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")                  # not every console knows every letter
    try:
        main()
        sys.stdout.flush()
    except InputError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:                                            # of `| head`, say
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "memory" not in str(error):
            raise
        reason = str(error).split("\n")[0] or "a MemoryError"
        sys.exit(f"{Path(sys.argv[0]).name}: out of memory, smaller sizes or batches need less ({reason})")
