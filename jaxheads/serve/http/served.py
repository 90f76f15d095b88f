"""What is served, and how much of it one request may have."""

import dataclasses
from typing import Any

from jaxheads.data import Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
  """What one request may ask of the server.

  Attributes:
    body_bytes: Size of its body.
    body_s: Seconds that it may take to send it.
    answers: Answers of one response: prompts times `n`.
    seconds: Seconds from there to the end of the response.
    retry_s: What a client is told to wait when the queue is full.
  """

  body_bytes: int = 1 << 20
  body_s: float = 30.0
  answers: int = 32
  seconds: float = 600.0
  retry_s: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Served:
  """What is served.

  Attributes:
    name: The model's, as clients call it.
    tokenizer: Text to tokens and back.
    context: Tokens that prompt and answer may have together.
    created: When it was trained, in seconds since 1970.
    about: What /v1/heads says of the cache besides: policy, budget and so on.
  """

  name: str
  tokenizer: Tokenizer
  context: int
  created: int = 0
  about: dict[str, Any] = dataclasses.field(default_factory=dict)
