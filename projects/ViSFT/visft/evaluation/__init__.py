"""Evaluators of the heads' predictions on the data sets they were trained for."""

from visft.evaluation.caption_metrics import CaptionEvaluator
from visft.evaluation.evaluator import HeadsEvaluator, InstancesEvaluator, build_evaluator

__all__ = ["CaptionEvaluator", "HeadsEvaluator", "InstancesEvaluator", "build_evaluator"]
