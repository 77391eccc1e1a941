"""Train a recommender: the loop over epochs, the optimizer step, and the run folder."""

from typing import TYPE_CHECKING

from ..doors import lazy_names

if TYPE_CHECKING:
    from .best_run import BestRun, evaluate_run, load
    from .checkpoints import load_weights, read_checkpoint, save_checkpoint
    from .determinism import deterministic
    from .dry_run import describe_new_run
    from .fused_step import GpuFusedStep, run_stages
    from .initial_weights import read_initial_weights
    from .item_sources import open_source, refuse_missing_libraries
    from .job_runs import JobRunFolder
    from .published_run import write_published
    from .ranking_run import RankingRun, load_ranking
    from .resume_run import resume
    from .run_agreement import refuse_other_runs
    from .run_changes import RunChanges
    from .run_environment import environment
    from .run_folder import RunFolder
    from .run_item_encoder import EncodedItems, open_item_encoder
    from .run_terms import copy_coordinates
    from .run_verification import verify_run
    from .scoring import TermWeights
    from .start_run import check_new_run, train
    from .stored_item_encoder import StoredItemEncoder, load_item_encoder, stored_states
    from .trainer import Trainer
    from .training_step import CapturedStep

__all__ = [
    "BestRun",
    "CapturedStep",
    "EncodedItems",
    "GpuFusedStep",
    "JobRunFolder",
    "RankingRun",
    "RunChanges",
    "RunFolder",
    "StoredItemEncoder",
    "TermWeights",
    "Trainer",
    "check_new_run",
    "copy_coordinates",
    "describe_new_run",
    "deterministic",
    "environment",
    "evaluate_run",
    "load",
    "load_item_encoder",
    "load_ranking",
    "load_weights",
    "open_item_encoder",
    "open_source",
    "refuse_other_runs",
    "read_checkpoint",
    "read_initial_weights",
    "refuse_missing_libraries",
    "resume",
    "run_stages",
    "save_checkpoint",
    "stored_states",
    "train",
    "verify_run",
    "write_published",
]

if not TYPE_CHECKING:  # a type checker reads the imports above, and takes no other name
    __getattr__ = lazy_names(__name__, __file__)
