"""Imports of single modules, without what their packages bring along.

Importing `diffusers.models.unets.unet_2d_condition` runs the `__init__` of each package above and
beside it: all transformers that diffusers has, torch's compiler for one decorator, peft for one
probe. That takes longer than drawing a small image.

Inside `deferred`, the code of some packages does not run. Afterwards nothing is hidden: a package
of which single modules were imported runs its code at the first use of a name that it lacks, in the
same module object; any other is forgotten, so that whoever imports it gets all of it. What was
imported inside holds stand-ins, which import the real thing when they are used.
"""

import functools
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module, metadata
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import spec_from_loader
from types import ModuleType
from typing import Any, TypeAlias

# What stands for `name` of a module, made of both.
StandIn: TypeAlias = Callable[[str, str], Any]
# Nothing of the package is imported, and these names, which others import from it, have stand-ins.
Deferral: TypeAlias = Mapping[str, StandIn]


class Alone(dict[str, StandIn]):
    """A deferral of a package whose own code alone is put off: its modules are imported.

    A name that one of its modules has is that module. Other names may have stand-ins.
    """


@contextmanager
def deferred(packages: Mapping[str, Deferral]) -> Iterator[None]:
    """Defers the code of `packages` that are first imported inside the block.

    Whoever asks one for a name without a stand-in runs it at once: slower, and correct.
    """
    finder = _Finder(packages)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        if not any(isinstance(one, _Retry) for one in sys.meta_path):
            sys.meta_path.append(_Retry())
        for name, stand_ins in packages.items():
            module = sys.modules.get(name)
            if not isinstance(module, _Deferred) or module.started:
                continue
            if isinstance(stand_ins, Alone):
                for stand_in in stand_ins:  # from now on whoever asks gets the real thing
                    vars(module).pop(stand_in, None)
                continue
            del sys.modules[name]
            above, _, last = name.rpartition(".")
            if above in sys.modules:
                vars(sys.modules[above]).pop(last, None)


# --- stand-ins ------------------------------------------------------------------------------


def of(module: str, made: StandIn) -> StandIn:
    """The stand-in `made` for a name that a package has from that module."""
    return lambda _, name: made(module, name)


def itself(module: str, name: str) -> Any:
    """The real thing, for a name that a package has from a module that costs nothing."""
    return getattr(import_module(module), name)


def version_of(module: str, name: str) -> str:
    """A package's version, as it is installed."""
    return metadata.version(module)


def called_later(module: str, name: str) -> Callable[..., Any]:
    """A function that calls the real one."""

    def stand_in(*args: Any, **options: Any) -> Any:
        return _real(module, name)(*args, **options)

    return stand_in


def wrapped_later(module: str, name: str) -> Callable[..., Any]:
    """A decorator; what it returns is decorated by the real one at its first call."""

    def stand_in(given: Any = None, *args: Any, **options: Any) -> Callable[..., Any]:
        if given is None:  # called for its options, as in @disable(recursive=False)
            return lambda function: stand_in(function, *args, **options)

        @functools.cache
        def real() -> Callable[..., Any]:
            made: Callable[..., Any] = _real(module, name)(given, *args, **options)
            return made

        @functools.wraps(given)
        def call(*args: Any, **options: Any) -> Any:
            return real()(*args, **options)

        return call

    return stand_in


def marked_later(module: str, name: str) -> Callable[[Any], Any]:
    """A decorator that returns what it is given, for `mark` to decorate by the real one."""

    def stand_in(given: Any) -> Any:
        _UNMARKED.append((module, name, given))
        return given

    return stand_in


_UNMARKED: list[tuple[str, str, Any]] = []


def mark() -> None:
    """Does what `marked_later` has put off. It imports the decorators' modules."""
    while _UNMARKED:
        module, name, given = _UNMARKED.pop()
        _real(module, name)(given)


def class_later(module: str, name: str) -> type:
    """A class that has the real one's instances, subclasses and attributes."""

    class Meta(type):
        def __call__(cls, *args: Any, **options: Any) -> Any:
            return _real(module, name)(*args, **options)

        def __getattr__(cls, attribute: str) -> Any:
            return getattr(_real(module, name), attribute)

        def __instancecheck__(cls, instance: object) -> bool:
            return _has_run(module) and isinstance(instance, _real(module, name))

        def __subclasscheck__(cls, subclass: type) -> bool:
            return _has_run(module) and issubclass(subclass, _real(module, name))

    return Meta(name, (), {"__module__": module})


def _has_run(module: str) -> bool:
    """Whether a module's code has run: before, nothing can be an instance of its classes."""
    found = sys.modules.get(module)
    return found is not None and (not isinstance(found, _Deferred) or found.started)


def _real(module: str, name: str) -> Any:
    found = import_module(module)
    if isinstance(found, _Deferred):
        found.run()
    return getattr(found, name)


# --- what is installed --------------------------------------------------------------------------


class _Packages(Mapping[str, list[str]]):
    """`importlib.metadata.packages_distributions()`, found out when it is first asked."""

    def __init__(self, found: Callable[[], Mapping[str, list[str]]]) -> None:
        self._found = functools.cache(found)

    def __getitem__(self, name: str) -> list[str]:
        return self._found()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._found())

    def __len__(self) -> int:
        return len(self._found())


@contextmanager
def packages_listed_later() -> Iterator[None]:
    """Whoever lists all installed packages inside the block does so when the list is first used.

    diffusers lists them as it is imported, which reads some hundred files, for packages that have
    other names than their modules and are seldom there.
    """
    real = metadata.packages_distributions
    metadata.packages_distributions = lambda: _Packages(real)
    try:
        yield
    finally:
        metadata.packages_distributions = real


# --- modules whose code has not run -----------------------------------------------------------


class _Deferred(ModuleType):
    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._loader: Loader | None = None  # until the import system has set the module up
        self._lock = threading.RLock()
        self.started = self.alone = False

    def __getattr__(self, name: str) -> Any:
        if name == "__path__":  # asked by the import system of what is no package
            raise AttributeError(name)
        if (
            self.alone
            and not self.started
            and PathFinder.find_spec(f"{self.__name__}.{name}", self.__path__)
        ):
            return import_module(f"{self.__name__}.{name}")
        self.run()
        there = sys.modules.get(self.__name__)
        if there is not None and there is not self:  # its code has put another in its place
            return getattr(there, name)
        try:
            return self.__dict__[name]
        except KeyError:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}") from None

    def run(self) -> None:
        """Runs the module's code and that of the packages above, unless it has run."""
        with self._lock:
            loader, self._loader = self._loader, None
            if loader is not None:
                self.started = True
                above = sys.modules.get(self.__name__.rpartition(".")[0])
                if isinstance(above, _Deferred) and not above.alone:
                    above.run()
                loader.exec_module(self)

    def defer(self, loader: Loader, stand_ins: Deferral) -> None:
        assert self.__spec__ is not None
        self.alone = isinstance(stand_ins, Alone)
        self._loader = self.__spec__.loader = self.__loader__ = loader
        for name, made in stand_ins.items():
            setattr(self, name, made(self.__name__, name))


class _Finder(MetaPathFinder):
    def __init__(self, packages: Mapping[str, Deferral]) -> None:
        self.packages = packages

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        above = name.rpartition(".")[0]
        if name not in self.packages:
            package = sys.modules.get(above)
            if isinstance(package, _Deferred) and not isinstance(self.packages[above], Alone):
                package.run()  # as if it had just been imported; that may have imported this one
                if name in sys.modules:
                    return spec_from_loader(name, _There())
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Deferring(spec.loader, self.packages[name])
        return spec


class _Retry(MetaPathFinder):
    """For modules that nobody finds until their package's own code has run."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package = sys.modules.get(name.rpartition(".")[0])
        if not isinstance(package, _Deferred) or package.started:
            return None
        package.run()
        others = (finder for finder in sys.meta_path if finder is not self)
        found = (finder.find_spec(name, path, target) for finder in others)
        return next((spec for spec in found if spec is not None), None)


class _Deferring(Loader):
    def __init__(self, loader: Loader, stand_ins: Deferral) -> None:
        self.loader, self.stand_ins = loader, stand_ins

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Deferred(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        assert isinstance(module, _Deferred)
        module.defer(self.loader, self.stand_ins)


class _There(Loader):
    """Of a module that is imported already."""

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return sys.modules[spec.name]

    def exec_module(self, module: ModuleType) -> None:
        pass
