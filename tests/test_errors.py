"""Errors: safe to print, short, whole after a trip through a pickle, each with its exit code."""

import pickle

import pytest

from icm_ray.errors import (
    MAX_PROBLEM_LENGTH,
    ClusterError,
    ICMRayError,
    InputError,
    RecipeError,
    ResourceError,
    did_you_mean,
    masked,
    one_line,
)

CODES = {RecipeError: 2, InputError: 3, ResourceError: 4, ClusterError: 5}


@pytest.mark.parametrize(("kind", "code"), CODES.items())
def test_each_error_ends_a_command_with_its_code(kind: type[ICMRayError], code: int) -> None:
    assert kind.exit_code == code
    assert issubclass(kind, ICMRayError)


@pytest.mark.parametrize("kind", CODES)
def test_errors_survive_a_pickle(kind: type[ICMRayError]) -> None:
    error = pickle.loads(pickle.dumps(kind(["one\n", "two\x1b[31m"])))
    assert type(error) is kind
    assert error.problems == ("one\\x0a", "two\\x1b[31m")
    assert str(error) == "one\\x0a\ntwo\\x1b[31m"


def test_a_single_problem_may_be_a_string() -> None:
    assert InputError("one").problems == ("one",)


@pytest.mark.parametrize(
    "char", ["\n", "\r", "\x1b", "\x85", "\u2028", "\u2029", "\u202e", "\u200b", "\ud800", "\x00"]
)
def test_what_could_rewrite_the_screen_is_escaped(char: str) -> None:
    safe = one_line(f"a{char}b")
    assert safe == f"a\\x{ord(char):02x}b"
    assert safe.splitlines() == [safe]
    safe.encode()


def test_plain_words_of_any_language_stay() -> None:
    text = "café 東京 naïve - “quoted”"
    assert one_line(text) == text


@pytest.mark.parametrize("length", [10, MAX_PROBLEM_LENGTH, MAX_PROBLEM_LENGTH + 1, 10_000])
def test_long_problems_lose_their_middle(length: int) -> None:
    text = "start" + "x" * (length - 8) + "end"
    safe = one_line(text)
    assert len(safe) <= MAX_PROBLEM_LENGTH
    assert safe.startswith("start")
    assert safe.endswith("end")
    assert (safe == text) == (length <= MAX_PROBLEM_LENGTH)
    assert one_line(safe) == safe


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("base 'https://user:pass@host/x': no", "base 'https://***@host/x': no"),
        ("s3://key:se/c@ret@bucket/x?a=1", "s3://***@bucket/x?a=1"),
        ("https://token@host", "https://***@host"),
        ("see https://host/a@b and me@host.org", "see https://host/a@b and me@host.org"),
        ("https://h/?x=1&X-Amz-Signature=ab%2F&y=2", "https://h/?x=1&X-Amz-Signature=***&y=2"),
        ("https://h/?api_key=k token=no", "https://h/?api_key=*** token=no"),
    ],
)
def test_passwords_and_tokens_of_addresses_are_masked(text: str, expected: str) -> None:
    assert masked(text) == one_line(text) == expected
    assert InputError(text).problems == (expected,)
    assert masked(expected) == expected


def test_the_nearest_word_is_offered() -> None:
    assert did_you_mean("sope", ["soup", "svd"]) == " Did you mean 'soup'?"
    assert did_you_mean("zzz", ["soup", "svd"]) == ""
    assert did_you_mean("soup", []) == ""
