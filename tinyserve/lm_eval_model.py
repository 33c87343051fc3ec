"""The documented import path of `tinyserve.evaluation.lm_eval_model`."""

from tinyserve.evaluation.lm_eval_model import TASKS_FOLDER, TinyserveLM

__all__ = ["TASKS_FOLDER", "TinyserveLM"]
