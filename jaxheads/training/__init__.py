"""Training: config, step, loop, checkpoints, and what a run leaves behind.

`train` teaches a language model text; `fit` is the loop under it, for any
module that maps tokens to logits and any batches; `run_job` is what
`experiments/train_moh.py` and `train_s2.py` call; `restore_model` reads a
trained model back.
"""

from .checkpoint import Checkpointer as Checkpointer
from .checkpoint import newest_run as newest_run
from .checkpoint import restore_model as restore_model
from .command_line import Request as Request
from .command_line import parse as parse
from .config import CheckpointOptions as CheckpointOptions
from .config import EvaluationOptions as EvaluationOptions
from .config import OptimizerOptions as OptimizerOptions
from .config import TrainConfig as TrainConfig
from .console import Reporter as Reporter
from .fit import Interrupted as Interrupted
from .fit import fit as fit
from .job import run_job as run_job
from .loop import train as train
from .losses import loss_fn as loss_fn
from .model_options import ModelOptions as ModelOptions
from .model_options import S2Options as S2Options
from .run_folder import RunFolder as RunFolder
from .step import TrainState as TrainState
