"""Client of Flamboyance, the few-shot inference server for Flamingo-family vision-language models.

with Client() as client:
    prompt = [*shot("cat.jpg", "This is a cat."), image("dog.jpg"), "This is a"]
    print(client.complete(prompt, max_tokens=5).text)
"""

from flamboyance_client.api import Options, StructuredOutputs
from flamboyance_client.client import AsyncClient, Client
from flamboyance_client.errors import (
    ApiError,
    BadRequest,
    FlamboyanceError,
    NotAuthorised,
    NotConnected,
    NotFound,
    ServerFault,
    StreamFailed,
    TimedOut,
    TransportError,
    Unavailable,
    UnexpectedReply,
)
from flamboyance_client.prompt import Part, Prompt, end_of_chunk, image, shot, text, video
from flamboyance_client.replies import Choice, Completion, Health, Logprobs, Model, Usage
from flamboyance_client.retries import Retries

__all__ = [
    "ApiError",
    "AsyncClient",
    "BadRequest",
    "Choice",
    "Client",
    "Completion",
    "FlamboyanceError",
    "Health",
    "Logprobs",
    "Model",
    "NotAuthorised",
    "NotConnected",
    "NotFound",
    "Options",
    "Part",
    "Prompt",
    "Retries",
    "ServerFault",
    "StreamFailed",
    "StructuredOutputs",
    "TimedOut",
    "TransportError",
    "Unavailable",
    "UnexpectedReply",
    "Usage",
    "end_of_chunk",
    "image",
    "shot",
    "text",
    "video",
]
