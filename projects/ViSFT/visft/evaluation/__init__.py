"""Evaluators of what the heads predict on the data sets they were trained for."""

from .captions import CaptionEvaluator
from .heads import HeadsEvaluator, InstancesEvaluator, build_evaluator

__all__ = ["CaptionEvaluator", "HeadsEvaluator", "InstancesEvaluator", "build_evaluator"]
