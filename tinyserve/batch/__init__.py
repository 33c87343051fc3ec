"""Files of requests, answered: killed at any moment, the same command goes on, and nothing is lost or doubled."""

from tinyserve.batch.counts import BatchProgress
from tinyserve.batch.run import BatchReport, run_batch

__all__ = ["BatchProgress", "BatchReport", "run_batch"]
