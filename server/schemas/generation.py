"""Requests that generate, completions and chats, and the options of every route that does.

A chat has OpenAI's names for length, form of the answer and log-probabilities.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, NamedTuple

from pydantic import ConfigDict, Discriminator, Field, Tag, field_validator, model_validator

from server.errors import InvalidRequest, UnsupportedParameter
from server.schemas.base import ModelRequest, PrioritizedRequest, Schema, form_of, tag_of, with_example
from server.schemas.json_object import JsonObject
from server.schemas.prompt import AttentionFields, Prompts, TaggedMediaPart, TextPart, Written

MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_ANSWERS = 16
# the beam width of the Flamingo paper
BEAM_WIDTH = 3

StopString = Annotated[str, Field(min_length=1, max_length=1024)]
Stop = Annotated[
    Annotated[StopString, Tag("<string>")]
    | Annotated[list[StopString], Field(max_length=MAX_STOP_STRINGS), Tag("<list>")],
    Discriminator(form_of),
]


class StreamOptions(Schema):
    include_usage: bool = Field(False, description="Send a last chunk with the usage.")
    continuous_usage_stats: bool = Field(False, description="Send the usage so far in every chunk.")
    # only the value that matches the server's behaviour
    include_obfuscation: Literal[False] = False


class StructuredOutputs(Schema):
    """A constraint on the answer: exactly one of the fields is set."""

    choice: list[Annotated[str, Field(min_length=1, max_length=4096)]] = Field([], max_length=1024)
    regex: str = Field("", max_length=4096, description="The answer matches this regular expression.")
    json_schema: Annotated[
        Annotated[str, Tag("<string>")] | Annotated[JsonObject, Tag("<object>")],
        Discriminator(form_of),
    ] = Field("", alias="json", description="The answer conforms to this JSON schema.")


class GenerationFields(PrioritizedRequest):
    """Sampling and stopping options of every route that generates."""

    temperature: float = Field(1.0, ge=0, le=100, description="The temperature of sampling; 0 is greedy decoding.")
    top_p: float = Field(1.0, ge=0, le=1, description="Sample from the most likely tokens that reach this probability.")
    top_k: int = Field(0, ge=-1, le=2**31 - 1, description="Number of most likely tokens to sample from; 0 or -1: all.")
    min_p: float = Field(0.0, ge=0, le=1, description="Minimum probability, relative to that of the most likely token.")
    presence_penalty: float = Field(0.0, ge=-2, le=2, description="Subtracted from the logits of tokens in the answer.")
    frequency_penalty: float = Field(0.0, ge=-2, le=2, description="Subtracted once per occurrence in the answer.")
    repetition_penalty: float = Field(1.0, gt=0, le=100, description="Above 1: repeat tokens less often.")
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] = Field(
        {}, max_length=1024, description="Numbers that are added to the logits, by token id."
    )
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1, description="The same seed gives the same answer.")
    min_tokens: int = Field(0, ge=0, le=2**31 - 1, description="Minimum number of generated tokens.")
    ignore_eos: bool = Field(False, description="Continue after an end of sequence.")
    stop: Stop = Field([], validate_default=False, description="The answer ends before the first string that appears.")
    stop_token_ids: list[Annotated[int, Field(ge=0)]] = Field(
        [], max_length=128, description="Tokens that end the answer."
    )
    include_stop_str_in_output: bool = Field(False, description="The answer ends after the stop string instead.")
    n: int = Field(1, ge=1, le=MAX_ANSWERS, description="Number of answers.")
    best_of: int | None = Field(None, ge=1, le=MAX_ANSWERS, description="Number of beams. Default: max(3, `n`).")
    use_beam_search: bool = Field(
        False,
        description="Search with `best_of` beams and return the `n` best answers. Excludes `top_p`, `top_k`, `min_p`, "
        "penalties, `logit_bias`, `structured_outputs`, and a `temperature` other than 0 and 1.",
    )
    length_penalty: float = Field(
        1.0, ge=-10, le=10, description="Beam search: scores are divided by the length of the answer to this power."
    )
    early_stopping: bool = Field(False, description="Beam search: stop as soon as `best_of` answers have ended.")
    structured_outputs: StructuredOutputs | None = Field(None, description="A constraint on the answer.")
    stream: bool = Field(False, description="Return server-sent events.")
    stream_options: StreamOptions = StreamOptions()
    return_token_ids: bool = Field(False, description="Return the token ids of prompt and answer.")


class CompletionFields(GenerationFields):
    """The fields of a completion besides its prompt."""

    max_tokens: int = Field(16, ge=0, le=2**31 - 1, description="Maximum number of tokens; 0 only computes the prompt.")
    echo: bool = Field(False, description="The text of the response begins with the prompt.")
    logprobs: int | None = Field(
        None,
        ge=0,
        le=MAX_LOGPROBS,
        description="Return log-probabilities, and this number of likely tokens per position.",
    )
    prompt_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS, description="As `logprobs`, for the prompt.")


class CompletionRequest(CompletionFields, AttentionFields):
    model_config = with_example(prompt="A flamingo is", max_tokens=8)

    prompt: Prompts = Field(description="One prompt, or a list of prompts. Each has `n` answers.")


MAX_MESSAGES = 2048
# answers of a Flamingo are short; one that never ends its chunk would continue to the end of the context
DEFAULT_MAX_TOKENS = 256


class InputTextPart(Schema):
    type: Literal["input_text"]
    text: str


class InputImagePart(Schema):
    """An image in the form of the Responses API."""

    type: Literal["input_image"]
    image_url: str = Field(description="The URL of an image, or the id of an uploaded image or video.")
    detail: Literal["auto", "low", "high", "original"] = "auto"


UserPart = Annotated[
    Annotated[TextPart, Tag("<text>")]
    | TaggedMediaPart
    | Annotated[InputTextPart, Tag("<input_text>")]
    | Annotated[InputImagePart, Tag("<input_image>")],
    Discriminator(tag_of("type")),
]
Content = Annotated[Annotated[str, Tag("<string>")] | Annotated[list[UserPart], Tag("<list>")], Discriminator(form_of)]


class ParticipantMessage(Schema):
    """A message of a participant, who may have a name."""

    name: Annotated[str, Field(min_length=1, max_length=64)] | None = Field(
        None, description="The same name in all messages of a role. The prompt does not show it."
    )


class SystemMessage(ParticipantMessage):
    role: Literal["system", "developer"]
    content: Written


class UserMessage(ParticipantMessage):
    role: Literal["user"]
    content: Content


MAX_TOOLS = 128

FunctionName = Annotated[str, Field(min_length=1, max_length=64)]
CallId = Annotated[str, Field(min_length=1, max_length=256)]


# what OpenAI's client adds to an answer that it has parsed
PARSED = "Accepted and not used."


class SentFunctionCall(Schema):
    name: FunctionName
    arguments: str
    parsed_arguments: Any = Field(None, description=PARSED)


class SentCall(Schema):
    """A function call, as in a response."""

    id: CallId
    type: Literal["function"]
    function: SentFunctionCall
    index: int | None = Field(None, description="The index in a stream. Accepted and not used.")


class AssistantMessage(ParticipantMessage):
    """A message of a response. Its fields without a value may be null."""

    model_config = ConfigDict(json_schema_extra={"additionalProperties": {"type": "null"}})

    role: Literal["assistant"]
    content: Written = ""
    tool_calls: list[SentCall] = Field([], max_length=MAX_TOOLS)
    parsed: Any = Field(None, description=PARSED)

    @model_validator(mode="after")
    def _content_or_calls(self) -> AssistantMessage:
        if "content" not in self.model_fields_set and not self.tool_calls:
            raise ValueError("give content, tool_calls, or both")
        return self


class ToolMessage(Schema):
    """The result of a function call."""

    role: Literal["tool"]
    content: Written
    tool_call_id: CallId = Field(description="The `id` of a call in an earlier message.")


Message = Annotated[
    Annotated[SystemMessage, Tag("<system>")]
    | Annotated[SystemMessage, Tag("<developer>")]
    | Annotated[UserMessage, Tag("<user>")]
    | Annotated[AssistantMessage, Tag("<assistant>")]
    | Annotated[ToolMessage, Tag("<tool>")],
    Discriminator(tag_of("role")),
]


class TextFormat(Schema):
    type: Literal["text"]


class JsonObjectFormat(Schema):
    type: Literal["json_object"]


class NamedSchema(Schema):
    """A JSON schema with a name. `strict` has no effect: an answer always conforms to its schema."""

    name: str = Field(max_length=256)
    description: str = ""
    json_schema: JsonObject = Field(alias="schema")
    strict: bool = True


class JsonSchemaFormat(Schema):
    type: Literal["json_schema"]
    json_schema: NamedSchema


ResponseFormat = Annotated[
    Annotated[TextFormat, Tag("<text>")]
    | Annotated[JsonObjectFormat, Tag("<json_object>")]
    | Annotated[JsonSchemaFormat, Tag("<json_schema>")],
    Discriminator(tag_of("type")),
]


class Function(Schema):
    name: FunctionName
    description: str | None = None
    parameters: JsonObject = Field({}, description="A JSON schema of an object.")
    strict: bool | None = Field(None, description="No effect: the arguments always conform to the schema.")

    @field_validator("parameters")
    @classmethod
    def _of_an_object(cls, parameters: dict[str, Any]) -> dict[str, Any]:
        if parameters.get("type", "object") != "object":
            raise ValueError('the type of a function\'s parameters must be "object"')
        return {"type": "object", **parameters}


class Tool(Schema):
    type: Literal["function"]
    function: Function


class ChosenFunction(Schema):
    name: FunctionName


class NamedToolChoice(Schema):
    type: Literal["function"]
    function: ChosenFunction


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("<string>")] | Annotated[NamedToolChoice, Tag("<object>")],
    Discriminator(form_of),
]


class ChatTemplateOptions(Schema):
    """Options of chat templates. Only `false` is accepted: the model does not think before it answers."""

    enable_thinking: Literal[False] = False
    thinking: Literal[False] = False


class ConversationFields(ModelRequest):
    """The fields that make messages a prompt."""

    template: Annotated[str, Field(min_length=1, max_length=128)] | None = Field(
        None,
        description="How turns are written. Default: `vqa` for a first question about one image or video, else `plain`.",
    )
    tools: list[Tool] = Field(
        [], max_length=MAX_TOOLS, description="Functions that `tool_choice` can select, and no part of the prompt."
    )
    # only the values that match the server's behaviour: the answer follows the last message
    add_generation_prompt: Literal[True] = True
    continue_final_message: Literal[False] = False
    chat_template_kwargs: ChatTemplateOptions = ChatTemplateOptions()

    @field_validator("tools")
    @classmethod
    def _with_different_names(cls, tools: list[Tool]) -> list[Tool]:
        names = [tool.function.name for tool in tools]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"several functions have the name {repeated[0]!r}")
        return tools


class Form(NamedTuple):
    """The form of an answer, and the field of a chat that states it."""

    outputs: StructuredOutputs | None
    field: str


class ChatRequest(GenerationFields, ConversationFields, AttentionFields):
    model_config = with_example(messages=[{"role": "user", "content": "What is a flamingo?"}], max_tokens=8)

    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_tokens: int | None = Field(None, ge=0, le=2**31 - 1, description="The same as `max_completion_tokens`.")
    max_completion_tokens: int | None = Field(
        None, ge=0, le=2**31 - 1, description=f"Maximum number of generated tokens. Default: {DEFAULT_MAX_TOKENS}."
    )
    logprobs: bool = Field(False, description="Return the log-probabilities of the tokens.")
    top_logprobs: int | None = Field(
        None, ge=0, le=MAX_LOGPROBS, description="Number of most likely tokens per position. Requires `logprobs`."
    )
    response_format: ResponseFormat = TextFormat(type="text")
    tool_choice: ToolChoice = Field(
        "auto",
        description="A function to call, or `required` with exactly one tool. The model does not choose tools: with "
        "`auto` and `none`, the answer is text.",
    )
    # only the values that match the server's behaviour, such as: nothing is stored, the answer is text
    store: Literal[False] = False
    modalities: list[Literal["text"]] = Field([])
    service_tier: Literal["auto", "default"] = "auto"
    reasoning_effort: Literal["none"] = "none"
    verbosity: Literal["medium"] = "medium"
    # labels of answers that are not stored, and hints that need no change: one call at most, a shared prefix cache
    metadata: dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]] = Field(
        {}, max_length=16, description="Accepted and not used."
    )
    parallel_tool_calls: bool = True
    prompt_cache_key: str = Field("", max_length=1024)
    safety_identifier: str = Field("", max_length=1024)

    @property
    def called(self) -> Function | None:
        """The function that the answer calls; None for text. Raises `InvalidRequest` for a choice that is none."""
        choice = self.tool_choice
        if isinstance(choice, NamedToolChoice):
            functions = {tool.function.name: tool.function for tool in self.tools}
            if choice.function.name in functions:
                return functions[choice.function.name]
            message = f"no tool has the name {choice.function.name!r}: the tools are {', '.join(functions)}"
            raise InvalidRequest(message, param="tool_choice.function.name")
        if choice != "required":
            return None
        if not self.tools:
            raise InvalidRequest('tool_choice "required" needs tools', param="tool_choice")
        if len(self.tools) > 1:
            message = "the model does not choose among several tools: name a function in tool_choice"
            raise UnsupportedParameter(message, param="tool_choice")
        return self.tools[0].function

    @property
    def form(self) -> Form:
        """The form of the answer. Raises `InvalidRequest` for a `tool_choice` that is none."""
        if (function := self.called) is not None:
            index = [tool.function for tool in self.tools].index(function)
            return Form(
                StructuredOutputs(json=function.parameters or {"type": "object"}), f"tools[{index}].function.parameters"
            )
        match self.response_format:
            case JsonObjectFormat():
                return Form(StructuredOutputs(json={"type": "object"}), "response_format")
            case JsonSchemaFormat(json_schema=named):
                return Form(StructuredOutputs(json=named.json_schema), "response_format.json_schema.schema")
        return Form(self.structured_outputs, "structured_outputs")

    def completion(self) -> CompletionFields:
        """Return the options by the names that a completion has for them."""
        shared = self.model_fields_set & GenerationFields.model_fields.keys()
        options = {name: getattr(self, name) for name in shared}
        for length in (self.max_tokens, self.max_completion_tokens):
            if length is not None:
                options["max_tokens"] = length
        fields_set = set(options)
        if self.logprobs:
            options["logprobs"] = self.top_logprobs or 0
        options["structured_outputs"] = self.form.outputs
        return CompletionFields.model_construct(fields_set, **{"max_tokens": DEFAULT_MAX_TOKENS, **options})
