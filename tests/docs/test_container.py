"""The Dockerfile without Docker: what it copies, installs, runs and listens to is there."""

import json
import re
import shlex
import tomllib
from pathlib import Path
from urllib.error import URLError

import pytest

from koala.cli import command_named
from koala.generation import load
from toy_server import running

ROOT = Path(__file__).parents[2]
FILE = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
STEPS = [tuple(step.split(None, 1)) for step in FILE.replace("\\\n", " ").splitlines() if step]
SERVING = ("koala", "serve")


def steps(kind: str) -> list[str]:
    """What follows that instruction, in order."""
    return [rest for word, rest in STEPS if word == kind]


def copied() -> set[str]:
    return {source for step in steps("COPY") for source in shlex.split(step)[:-1]}


def docker(verb: str) -> list[list[str]]:
    """The commands `docker VERB ...` of the page, without these two words."""
    page = (ROOT / "docs" / "install.md").read_text()
    blocks = "".join(re.findall(r"```sh\n(.*?)```", page, re.DOTALL)).replace("\\\n", " ")
    commands = map(shlex.split, blocks.splitlines())
    return [command[2:] for command in commands if command[:2] == ["docker", verb]]


def test_what_is_copied_is_there_and_nothing_else_is_sent():
    assert all((ROOT / source).exists() for source in copied())
    ignored = (ROOT / ".dockerignore").read_text().split("\n")
    assert {line[1:] for line in ignored if line.startswith("!")} == copied()
    assert "*" in ignored


def test_what_is_copied_is_enough_to_install():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (install,) = (step for step in steps("RUN") if "--editable" in step)
    assert {project["readme"], *project["license-files"], "pyproject.toml", "koala"} <= copied()
    words = shlex.split(install)
    assert words[words.index("--constraint") + 1] in copied()
    (extra,) = re.findall(r"\.\[(\w+)\]", install)
    assert extra in project["optional-dependencies"] and extra == "serve"
    oldest = project["requires-python"].removeprefix(">=")
    assert next(step.partition("=")[2] for step in steps("ARG")) >= oldest


def test_the_command_starts_a_server_on_the_port_that_is_exposed():
    (command,) = map(json.loads, steps("CMD"))
    assert tuple(command[:2]) == SERVING
    options = command_named("serve").parse(command[2:])
    assert options.host == "0.0.0.0"
    assert steps("EXPOSE") == [str(options.port)]


def test_it_runs_without_privileges_and_may_write_where_it_keeps_things():
    (user,) = steps("USER")
    (volume,) = steps("VOLUME")
    (made,) = (step for step in steps("RUN") if "useradd" in step)
    assert user != "root" and made.split("&&")[0].split()[-1] == user
    assert f"install --directory --owner={user} {volume}" in made
    (settings,) = steps("ENV")
    kept = dict(each.split("=") for each in settings.split())
    assert kept.keys() == {"KOALA_DATA", "KOALA_CACHE", "HF_HOME"}
    assert all(folder.startswith(f"{volume}/") for folder in kept.values())


def test_the_health_check_tells_a_live_server_from_a_dead_one(toy_sdxl, tmp_path):
    (check,) = (step[step.index("CMD") + 3 :] for step in steps("HEALTHCHECK"))
    python, flag, program = json.loads(check)
    assert (python, flag) == ("python", "-c")
    (port,) = steps("EXPOSE")
    with running(load(toy_sdxl, "cpu"), tmp_path / "data") as server:
        here = program.replace(f"http://127.0.0.1:{port}", server.url)
        assert here != program
        exec(here, {})
    with pytest.raises(URLError):
        exec(here, {})


def test_the_pages_commands_fit_the_file():
    arguments = {step.partition("=")[0] for step in steps("ARG")}
    given = [each[each.index("--build-arg") + 1] for each in docker("build") if len(each) > 3]
    assert given and {each.partition("=")[0] for each in given} <= arguments
    (port,), (volume,) = steps("EXPOSE"), steps("VOLUME")
    for command in docker("run"):
        assert command[command.index("-p") + 1].endswith(f":{port}")
        assert command[command.index("-v") + 1].endswith(f":{volume}")
        if "serve" in command:
            command_named("serve").parse(command[command.index("serve") + 1 :])
    assert len(docker("build")) == 2 and len(docker("run")) == 3
