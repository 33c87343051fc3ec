"""Files of requests, answered: killed at any moment, the same command goes on, and nothing is lost or doubled."""

from tinyserve.batch.run import BatchProgress, BatchReport, run_batch

__all__ = ["BatchProgress", "BatchReport", "run_batch"]
