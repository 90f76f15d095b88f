"""From what a client asks for to what the engine is asked for."""

import asyncio
import uuid

from jaxheads.data import Tokenizer
from jaxheads.serve.http import schema
from jaxheads.serve.http.errors import ApiError
from jaxheads.serve.http.served import Limits, Served
from jaxheads.serve.request import Request


async def engine_requests(
  asked: schema.Completion | schema.Chat, served: Served, limits: Limits
) -> list[Request]:
  """What the engine is asked for: `n` times each prompt, one by one.

  Raises:
    ApiError: Too much is asked for, or what no engine could do.
  """
  answers = len(asked.prompt) * (asked.n or 1)
  if answers > limits.answers:
    raise ApiError(
      400,
      f"prompts times `n` must be at most {limits.answers}, got {answers}",
      param="n",
      code="out_of_range",
    )
  # Not in the event loop: a long text may take a tokenizer a while.
  prompts = await asyncio.to_thread(
    lambda: [_tokens(prompt, served.tokenizer) for prompt in asked.prompt]
  )
  prefix = "chatcmpl" if isinstance(asked, schema.Chat) else "cmpl"
  name = f"{prefix}-{uuid.uuid4().hex}"
  eot = served.tokenizer.eot
  requests: list[Request] = []
  for prompt in prompts:
    sampling = asked.sampling(
      max_tokens=_max_tokens(asked, len(prompt), served),
      stop_tokens=() if eot is None else (eot,),
    )
    for params in sampling:
      requests.append(
        Request(
          id=f"{name}-{len(requests)}",
          prompt=prompt,
          params=params,
          budget=asked.budget,
        )
      )
  return requests


def _tokens(prompt: schema.Prompt, tokenizer: Tokenizer) -> tuple[int, ...]:
  if not isinstance(prompt, str):
    wrong = [token for token in prompt if not 0 <= token < tokenizer.vocab_size]
    if wrong:
      raise ApiError(
        400,
        f"`prompt` must be of tokens in [0, {tokenizer.vocab_size}), got "
        f"{str(wrong[0])[:30]}",
        param="prompt",
        code="out_of_range",
      )
    return prompt
  tokens = tuple(tokenizer.encode(prompt).tolist())
  if not tokens:
    if tokenizer.eot is None:
      raise ApiError(
        400,
        "`prompt` must not be empty with this tokenizer",
        param="prompt",
        code="invalid_value",
      )
    return (tokenizer.eot,)  # The start of a new document.
  return tokens


def _max_tokens(
  asked: schema.Completion | schema.Chat, prompt_length: int, served: Served
) -> int:
  room = served.context - prompt_length
  if room < 1 or (asked.limit is not None and asked.limit > room):
    param = "messages" if isinstance(asked, schema.Chat) else "prompt"
    wanted = "" if asked.limit is None else f" and {asked.limit} to generate"
    raise ApiError(
      400,
      f"the model's context is {served.context} tokens; the prompt has "
      f"{prompt_length}{wanted}",
      param=param,
      code="context_length_exceeded",
    )
  if asked.limit is not None:
    return asked.limit
  return room if isinstance(asked, schema.Chat) else min(16, room)
