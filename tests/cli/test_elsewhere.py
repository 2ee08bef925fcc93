"""Options of other programs: whoever types one is told ours."""

import re

import pytest

from koala.cli import command_named, main
from koala.cli.command import Parser
from koala.cli.elsewhere import _OF, COMMANDS, told


def parser_of(name: str) -> Parser:
    parser = Parser(prog=name)
    command_named(name).arguments(parser)
    return parser


@pytest.mark.parametrize("name", _OF)
def test_what_is_told_exists_and_what_is_answered_does_not(name):
    options = {o for action in parser_of(name)._actions for o in action.option_strings}
    for ours, theirs in _OF[name].items():
        assert not {*theirs.split()} & options
        if found := re.match(r"--[a-z-]+", ours):
            assert found[0] in options


@pytest.mark.parametrize("name", _OF)
def test_no_option_of_another_program_stands_for_two(name):
    theirs = [option for names in _OF[name].values() for option in names.split()]
    assert len(theirs) == len({*theirs})


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["generate", "a fox", "--cfg_scale=7"], "'--cfg_scale': write --guidance;"),
        (["generate", "--prompt", "a fox"], "'--prompt': write the prompt without an option"),
        (["generate", "a fox", "-W", "512"], "'-W': write --size WIDTHxHEIGHT"),
        (["prepare", "images", "--output_dir", "x"], "'--output_dir': write --out"),
        (["distill", "koala-mini", "--learning_rate", "1e-4"], "write --set training.lr=X"),
        (["serve", "--listen"], "write --host 0.0.0.0"),
    ],
)
def test_an_option_of_another_program_is_answered_with_ours(arguments, said, capsys):
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_of_another_program_is_answered_with_ours(name, capsys):
    assert main([name, "a fox"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"koala: unknown command {name!r}: that is {COMMANDS[name]}"
    for command in re.findall(r"koala ([a-z]+)", COMMANDS[name]):
        command_named(command)


def test_our_own_options_and_what_stands_after_two_dashes_are_left_alone():
    assert told("generate", ["a fox", "--guidance", "7", "--size", "8x8"]) is None
    assert told("generate", ["--", "--prompt"]) is None
