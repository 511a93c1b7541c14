"""Batch runs: a kernel for each GPU or share of the processor, and a grid of notebooks on them."""
from bcos_nb.batch.grid_run import Job, WorkerPool, plan_jobs, run_grid, run_jobs
from bcos_nb.batch.kernels import install_kernels
from bcos_nb.batch.runs import find_path, find_training, finish_run, is_complete, report_progress, run_name, start_run

__all__ = [
    "Job", "WorkerPool", "find_path", "find_training", "finish_run", "install_kernels", "is_complete", "plan_jobs", "report_progress", "run_grid",
    "run_jobs", "run_name", "start_run",
]
