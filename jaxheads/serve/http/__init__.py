"""The HTTP server (extra `serve`): the OpenAI schema, metrics, and a page.

| path | what |
| --- | --- |
| `/v1/completions`, `/v1/chat/completions` | answers, whole or streamed |
| `/v1/models` | the one model that is served |
| `/v1/heads` | what each head of each running sequence keeps |
| `/health`, `/metrics` | for supervisors and Prometheus |
| `/` | a page to try it and to watch the heads |
"""

from .app import create_app as create_app
from .served import Limits as Limits
from .served import Served as Served
from .server import serve as serve
