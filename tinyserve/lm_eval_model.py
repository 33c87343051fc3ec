"""Where programs import lm-evaluation-harness's model from; it is in evaluation/lm_eval_model.py."""

from tinyserve.evaluation.lm_eval_model import TASKS_FOLDER, TinyserveLM

__all__ = ["TASKS_FOLDER", "TinyserveLM"]
