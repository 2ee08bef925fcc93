"""`import koala`: its names, and what they cost."""

import subprocess
import sys
from importlib.resources import files

import koala


def test_every_public_name_is_there():
    named = [name for names in koala._HOME.values() for name in names]
    assert sorted([*named, "__version__"]) == koala.__all__
    for name in koala.__all__:
        assert getattr(koala, name) is not None


def test_importing_it_loads_nothing():
    code = "import sys, koala; sys.exit(any(name.startswith('koala.') for name in sys.modules))"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_it_is_marked_as_typed():
    assert files(koala).joinpath("py.typed").is_file()
