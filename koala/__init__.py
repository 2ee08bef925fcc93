"""KOALA: Stable-Diffusion-XL-class text-to-image models, made small and fast.

    import koala
    koala.load("koala-mini")("a red fox, flat twemoji style", seed=7).images[0].save("fox.png")

The functions mirror the commands of `koala --help`; beside them are the types that they take and
return. Each is imported when it is first used, so that importing this package costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from koala.checkpoints.compress import CompressReport, compress
    from koala.checkpoints.convert import ConvertReport, convert
    from koala.checkpoints.inspect import Inspection, inspect
    from koala.data.prepare import PrepareReport, prepare
    from koala.data.preprocess import Filters, Preparation
    from koala.distillation.settings import DistillationSettings, Hardware, Tap, Training
    from koala.errors import Failure, UserError
    from koala.evaluation.report import evaluate
    from koala.evaluation.table import EvaluationReport
    from koala.generation.drawing import Result
    from koala.generation.export import ExportReport, export
    from koala.generation.loader import load
    from koala.generation.pipeline import Pipeline
    from koala.generation.requests import Request, Settings
    from koala.lora.training import LoraSettings
    from koala.mini.settings import Autoencoder, Base, Tiny
    from koala.recipes.recipe import Custom, Finetune, Mixture, Recipe, Student, Teacher
    from koala.recipes.train import distill, finetune

__version__ = "0.2.0"

_HOME = {
    "checkpoints.compress": ("CompressReport", "compress"),
    "checkpoints.convert": ("ConvertReport", "convert"),
    "checkpoints.inspect": ("Inspection", "inspect"),
    "data.prepare": ("PrepareReport", "prepare"),
    "data.preprocess": ("Filters", "Preparation"),
    "distillation.settings": ("DistillationSettings", "Hardware", "Tap", "Training"),
    "errors": ("Failure", "UserError"),
    "evaluation.report": ("evaluate",),
    "evaluation.table": ("EvaluationReport",),
    "generation.opening": ("load",),
    "generation.drawing": ("Result",),
    "generation.export": ("ExportReport", "export"),
    "generation.pipeline": ("Pipeline",),
    "generation.requests": ("Request", "Settings"),
    "mini.settings": ("Autoencoder", "Base", "Tiny"),
    "lora.training": ("LoraSettings",),
    "recipes.recipe": ("Custom", "Finetune", "Mixture", "Recipe", "Student", "Teacher"),
    "recipes.train": ("distill", "finetune"),
}
__all__ = [
    "Autoencoder",
    "Base",
    "CompressReport",
    "ConvertReport",
    "Custom",
    "DistillationSettings",
    "EvaluationReport",
    "ExportReport",
    "Failure",
    "Filters",
    "Finetune",
    "Hardware",
    "Inspection",
    "LoraSettings",
    "Mixture",
    "Pipeline",
    "Preparation",
    "PrepareReport",
    "Recipe",
    "Request",
    "Result",
    "Settings",
    "Student",
    "Tap",
    "Teacher",
    "Tiny",
    "Training",
    "UserError",
    "__version__",
    "compress",
    "convert",
    "distill",
    "evaluate",
    "export",
    "finetune",
    "inspect",
    "load",
    "prepare",
]

if not TYPE_CHECKING:  # a type checker knows the names above, and no others

    def __getattr__(name: str) -> Any:
        for module, names in _HOME.items():
            if name in names:
                try:
                    return getattr(import_module(f"koala.{module}"), name)
                except ModuleNotFoundError as error:
                    from koala.utils.extras import explained

                    raise explained(f"koala.{name}", error) from error
        raise AttributeError(f"module 'koala' has no attribute {name!r}")
