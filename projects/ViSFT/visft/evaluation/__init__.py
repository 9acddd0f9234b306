"""Evaluators of what the heads predict on the data sets they were trained for."""

from .heads import HeadsEvaluator, build_evaluator

__all__ = ["HeadsEvaluator", "build_evaluator"]
