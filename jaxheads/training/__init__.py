"""Training: config, step, loop, checkpoints, and what a run leaves behind.

`train` is the loop for any module that maps tokens to logits; `run_job` is what
`experiments/train_moh.py` calls; `restore_model` reads a trained model back.
"""

from .checkpoint import Checkpointer as Checkpointer
from .checkpoint import restore_model as restore_model
from .command_line import Request as Request
from .command_line import parse as parse
from .config import CheckpointOptions as CheckpointOptions
from .config import EvaluationOptions as EvaluationOptions
from .config import ModelOptions as ModelOptions
from .config import OptimizerOptions as OptimizerOptions
from .config import TrainConfig as TrainConfig
from .console import Reporter as Reporter
from .job import run_job as run_job
from .loop import Interrupted as Interrupted
from .loop import train as train
from .losses import loss_fn as loss_fn
from .run_folder import RunFolder as RunFolder
from .step import TrainState as TrainState
