"""EBNF as SGLang documents it, in Lark's syntax as llguidance reads it."""

from __future__ import annotations

import pytest
from llguidance import LLMatcher, LLTokenizer

from trunkline.plugins.generation.grammar.ebnf import MAX_RULES, lark_of_ebnf


@pytest.fixture(scope="module")
def tokenizer(byte_level_json: str) -> LLTokenizer:
    return LLTokenizer(byte_level_json)


@pytest.fixture(scope="module")
def byte_level_json() -> str:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer.to_str()


CAPITALS = """
root ::= city | description
city ::= "London" | "Paris" | "Berlin" | "Rome"
description ::= city " is " status
status ::= "the capital of " country
country ::= "England" | "France" | "Germany" | "Italy"
"""
JSON = r"""
root ::= object
object ::= "{" ws ( string ":" ws value ("," ws string ":" ws value)* )? "}"
value ::= object | array | string | number | "true" | "false" | "null"
array ::= "[" ws ( value ("," ws value)* )? "]"
string ::= "\"" ( [^"\\\x7F\x00-\x1F] | "\\" (["\\/bfnrt] | "u" [0-9a-fA-F]{4}) )* "\""
number ::= "-"? ("0" | [1-9] [0-9]*) ("." [0-9]+)?
ws ::= " "?   # a comment
"""


@pytest.mark.parametrize(
    ("grammar", "fitting", "others"),
    [
        ('root ::= "Hello" | "Hi" | "Hey"', ["Hello", "Hi"], ["", "Hell", "Hii", "hi"]),
        (CAPITALS, ["Paris", "Rome is the capital of Italy"], ["Madrid", "Rome is", "Rome is the capital"]),
        ('root ::= [0-9]{3} "-" [0-9]{4,5} # phone', ["123-4567", "123-45678"], ["12-3456", "123-456", "123-456789"]),
        ('root ::= "a"{2} | "b"{1,} | "c"? "d"+ "e"*', ["aa", "bbb", "d", "cdde"], ["a", "aaa", "c", "e", ""]),
        ("root ::= x\nx ::= | \"y\"", ["", "y"], ["yy"]),
        ('root ::= ("a" | )  "/\\\\é\\u00e9" [/\\]é-ü^-]', ["a/\\éé]", "/\\éé-", "/\\ééï", "/\\éé^"], ["/\\éé"]),
        ('root ::= [^a-c\\n] .', ["dx", "é🙂"], ["ax", "d\n", "d", "\nx"]),
        ('root ::= expr\nexpr ::= term ("+" term)*\nterm ::= "x" | "(" expr ")"', ["x", "((x+x))+x"], ["", "(x", "x+"]),
        (JSON, ['{"a": [1, -2.5, {"b":null}], "é\\n": "x"}', "{}"], ["[]", '{"a"}', '{"a": 01}', '{"a": "\n"}']),
        ('root ::= foo-bar foo_bar FooBar\nfoo-bar ::= "1"\nfoo_bar ::= "2"\nFooBar ::= "3"', ["123"], ["12", "111"]),
        ('root ::=\n  "a"\n  | "b"\n\n# end\n', ["a", "b"], ["ab"]),
    ],
)  # fmt: skip
def test_the_language(grammar: str, fitting: list[str], others: list[str], tokenizer: LLTokenizer) -> None:
    source = LLMatcher.grammar_from_lark(lark_of_ebnf(grammar))

    def fits(text: str) -> bool:
        matcher = LLMatcher(tokenizer, source, log_level=0)
        assert not matcher.is_error(), matcher.get_error()
        ids = tokenizer.tokenize_str(text)
        return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()

    assert [text for text in fitting if not fits(text)] == []
    assert [text for text in others if fits(text)] == []


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        ("", "line 1: a grammar begins with NAME ::="),
        ("start: /x/", "line 1: unexpected ': /x/'"),
        ('x ::= "a"', "there is no rule named root"),
        ('root ::= "a"\nroot ::= "b"', "line 2: rule 'root' is defined twice"),
        ("root ::= a", "line 1: rule 'root' refers to 'a', which is not defined"),
        ('root ::= "a"\n  ("b"', "line 1: a parenthesis of this rule is not closed"),
        ('root ::= "a")', "line 1: unexpected ')'"),
        ("root ::= *", "line 1: there is nothing to repeat before '*'"),
        ('root ::= "a"**', "line 1: there is nothing to repeat before '*'"),
        ('root ::= "a"{5,2}', "line 1: in {5,2} the first number exceeds the second"),
        ('root ::= "a"{200000}', "line 1: {200000} repeats more than 100000 times"),
        ('root ::= "abc', "line 1: unexpected '\"abc'"),
        ("root ::= []", "line 1: an empty character class"),
        ('root ::= "\\ud800"', "line 1: there is no character with the code d800"),
        ('root ::= "a" ::= "b"', "line 1: '\"a\"' is not the name of a rule"),
        (f"root ::= {'(' * 21}", "line 1: more than 20 nested parentheses"),
        (f'root ::= "{"x" * 8193}"', "line 1: a literal may have at most 8192 characters, got 8193"),
        ('root ::= "a"\n' + "".join(f'r{i} ::= "a"\n' for i in range(MAX_RULES)), "it has 1001 rules; at most 1000"),
    ],
)
def test_refused(grammar: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        lark_of_ebnf(grammar)
    assert str(caught.value).startswith(message)


def test_a_long_chain_of_rules_takes_linear_time() -> None:
    rules = "".join(f"r{i} ::= r{i + 1}\n" for i in range(998))
    lark = lark_of_ebnf(f'root ::= r0\n{rules}r998 ::= "x"')
    assert lark.count("\n") == 1000
