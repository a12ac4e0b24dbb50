"""Sources are known by fingerprints that depend neither on layout nor on the Python that reads them."""

import pytest

from dancegrpo_fast.patch._fingerprints import fingerprint, fingerprint_source

STRINGS = r'''
def described(x, width, names):
    """Not part of it."""
    plain = f"{x!r:>{width}} of {len(names)} {{not a field}} {x['key']}"
    joined = "a" f"{x}" rf"\d{x:,.2f}" "b"
    wide = f"é {x} ü" + "ß"
    long = f"""
        {x:
        {width}}  # not a comment
        {", ".join(f'{name}=' for name in names)}
    """
    f"{x}"
    return f"{x}{plain}", f'{joined=}', F"{long}{wide}", f""
'''
# What Python 3.11 made of it, whose tokenizer reads an f-string as one string.
KNOWN = "adab0e6d3997c540"


def test_every_source_is_known() -> None:
    from dancegrpo_fast.patch.__main__ import main

    assert main() == 0


def test_f_strings_have_one_fingerprint_on_every_python() -> None:
    assert fingerprint_source(STRINGS) == KNOWN
    for old, new in (("{x!r:>{width}}", "{x!s:>{width}}"), ("'{name}='", "'{name}'"), ("{{not", "{{now")):
        assert fingerprint_source(STRINGS.replace(old, new)) != KNOWN


@pytest.mark.parametrize(
    "source", ['f"{f"{f"{1}"}"}"\n', 't"{x} of {y:>{width}}"\n', "f\"{x:{\"a\"}}\" f'''{\n\"b\"}'''\n"]
)
def test_newer_strings_have_a_fingerprint(source: str) -> None:
    """Quotes used again inside, and templates: from Python 3.12 and 3.14 on."""
    assert fingerprint_source("y = " + source) != fingerprint_source("z = " + source)


def test_fingerprints_see_code_and_not_layout() -> None:
    first = 'def f(a):\n    """Text."""\n    # A remark.\n    return (a + 1)\n'
    second = "def f(a):\n\n  return (\n      a   # first\n      + 1)\n"
    assert fingerprint_source(first) == fingerprint_source(second)
    assert fingerprint_source(first) != fingerprint_source(second.replace("1", "2"))
    assert fingerprint_source(first) != fingerprint_source(second.replace("(\n", "('text',\n"))


def test_a_function_has_the_fingerprint_of_its_source() -> None:
    def f(a):
        return a + 1

    assert fingerprint(f) == fingerprint_source("def f(a):\n    return a + 1\n")
