"""Language models whose every layer takes its own head plan and context."""

from jaxheads.models import presets as presets
from jaxheads.models._loss import token_nats as token_nats
from jaxheads.models.config import ModelConfig as ModelConfig
from jaxheads.models.config import Run as Run
from jaxheads.models.decoder import DecoderBlock as DecoderBlock
from jaxheads.models.decoder import DecoderLM as DecoderLM
from jaxheads.models.generate import generate as generate
from jaxheads.models.reorder import reordered as reordered
