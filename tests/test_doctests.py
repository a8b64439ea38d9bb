"""The examples in docstrings of public names run, and each public name says what it does."""

import doctest
import inspect
from typing import Any

import pytest

import cg_lightning

NAMES = cg_lightning.__all__


def documented(name: str) -> Any:
    """Return what has the docstring of a public name: of an object, that is its class."""
    public = getattr(cg_lightning, name)
    return public if callable(public) else type(public)


def examples(name: str) -> list[doctest.DocTest]:
    public = documented(name)
    finder = doctest.DocTestFinder(recurse=inspect.isclass(public), exclude_empty=True)
    return [test for test in finder.find(public, name, globs={}) if test.examples]


def run(test: doctest.DocTest) -> str:
    output: list[str] = []
    doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE).run(
        test, out=output.append
    )
    return "".join(output)


@pytest.mark.parametrize("name", NAMES)
def test_examples_run(name):
    found = examples(name)
    assert found
    assert [run(test) for test in found] == [""] * len(found)


def test_that_a_wrong_example_is_noticed():
    test = doctest.DocTestParser().get_doctest(">>> 1 + 1\n3\n", {}, "wrong", None, None)
    assert "Expected:" in run(test)


@pytest.mark.parametrize("name", NAMES)
def test_each_public_name_says_what_it_does(name):
    text = inspect.getdoc(documented(name)) or ""
    assert text
    assert not text.startswith(("Gives", "Raises"))
