"""How good a model is: distances to held-out pictures, retrieval by a judge, and a report."""

from koala.evaluation.report import evaluate
from koala.evaluation.table import Report

__all__ = ["Report", "evaluate"]
