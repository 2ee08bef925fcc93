"""OpenAI's responses API, as far as its image tool goes.

https://platform.openai.com/docs/api-reference/responses. No language model reads the input: the
text of its last message is the prompt, and an image there is edited. Each image is an output item.
"""

import time
import uuid
from typing import Any, Literal

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from pydantic import BaseModel, ConfigDict, model_validator

from koala.errors import UserError
from koala.serving import uploads
from koala.serving.api.openai import as_base64, described, edit_spec, to_spec, usage
from koala.serving.api.openai_fields import EditRequest
from koala.serving.api.streams import submit, wait_for_images
from koala.serving.errors import ApiError
from koala.serving.json_bodies import JsonRoute

router = APIRouter(prefix="/v1", route_class=JsonRoute)
TOOL = "image_generation"
NOT_OF_AN_IMAGE = ("type", "action", "input_image_mask")
EARLIER = ("previous_response_id", "conversation")
NOT_OF_THE_TOOL = ("prompt", "stream", "partial_images", "response_format", "user")


class ResponseRequest(BaseModel):
    """The fields of a response. The last ones are for language models, and have no effect here."""

    model_config = ConfigDict(extra="forbid", strict=True)
    input: str | list[dict[str, Any]]
    tools: list[dict[str, Any]] = []
    model: str | None = None
    tool_choice: Literal["auto", "required"] | dict[str, Any] | None = None
    stream: bool | None = None
    background: Literal[False] | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    user: str | None = None
    safety_identifier: str | None = None
    parallel_tool_calls: bool | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: int | None = None
    reasoning: dict[str, Any] | None = None
    include: list[str] | None = None
    text: dict[str, Any] | None = None
    truncation: str | None = None
    service_tier: str | None = None
    prompt_cache_key: str | None = None
    max_tool_calls: int | None = None
    previous_response_id: None = None
    conversation: None = None

    @model_validator(mode="before")
    @classmethod
    def _of_others(cls, given: Any) -> Any:
        """Refuses what goes on from an earlier response."""
        for name in EARLIER if isinstance(given, dict) else ():
            if given.get(name) is not None:
                raise ApiError(
                    400, f"{name}: responses are not kept here; send what is to be edited as an "
                    "input_image of the input", "invalid_value", name,
                )  # fmt: skip
        return given

    def tool(self) -> dict[str, Any]:
        """The image tool. ApiError for anything else."""
        if [tool.get("type") for tool in self.tools] != [TOOL]:
            raise ApiError(
                400, f'tools: this server has one, [{{"type": "{TOOL}"}}]', "invalid_value", "tools"
            )
        if self.stream:
            raise ApiError(
                400, "stream: responses are not streamed here; leave it out, or stream from "
                "/v1/images/generations", "invalid_value", "stream",
            )  # fmt: skip
        choice = self.tool_choice
        if isinstance(choice, dict) and choice != {"type": TOOL}:
            raise ApiError(
                400, f'tool_choice: allowed are auto, required and {{"type": "{TOOL}"}}',
                "invalid_value", "tool_choice",
            )  # fmt: skip
        return self.tools[0]


@router.post("/responses", summary="Generate or edit images, by OpenAI's image tool")
async def responses(body: ResponseRequest, request: Request) -> dict[str, Any]:
    tool = body.tool()
    prompt, image = await run_in_threadpool(_asked, body.input)
    fields = _fields(body, tool, prompt)
    to_spec(request, fields.model_copy(update={"model": body.model}))  # which may be another
    mask = await run_in_threadpool(_mask, tool, image is not None)
    spec = await edit_spec(request, fields, image, mask)
    submission = await submit(request, spec)
    service = request.app.state.service
    images = await wait_for_images(request, service, submission)
    told = described(fields, submission, service.pipeline.known)
    created = told.pop("created")
    counted = usage(submission)
    counted["input_tokens_details"] = {"cached_tokens": 0, "cache_write_tokens": 0}
    output = [
        {
            "id": f"ig_{uuid.uuid4().hex}", "type": f"{TOOL}_call", "status": "completed",
            "action": "generate" if image is None else "edit", "revised_prompt": prompt,
            "result": await as_base64(request, fields, drawn, submission, i),
            **told, "seed": submission.requests[i].settings.seed,
        }
        for i, drawn in enumerate(images)
    ]  # fmt: skip
    return {
        "id": f"resp_{uuid.uuid4().hex}", "object": "response", "status": "completed",
        "created_at": created, "completed_at": int(time.time()), "error": None,
        "incomplete_details": None, "instructions": None, "metadata": body.metadata or {},
        "model": body.model or service.pipeline.name, "output": output,
        "parallel_tool_calls": False, "store": False, "tool_choice": body.tool_choice or "auto",
        "tools": [{name: tool[name] for name in tool if name != "input_image_mask"}],
        "usage": {**counted, "output_tokens_details": {"reasoning_tokens": 0}},
    }  # fmt: skip


def _fields(body: ResponseRequest, tool: dict[str, Any], prompt: str) -> EditRequest:
    """The tool's settings, with those of the images API. ApiError, or pydantic's."""
    other = [name for name in NOT_OF_THE_TOOL if tool.get(name) not in (None, 0)]
    if other:
        raise ApiError(400, f"tools: unknown field {other[0]!r}", "unknown_parameter", "tools")
    told = {name: value for name, value in tool.items() if name not in NOT_OF_AN_IMAGE}
    given = {name: value for name, value in told.items() if value is not None}
    return EditRequest.model_validate({"prompt": prompt, "model": body.model} | given)


def _mask(tool: dict[str, Any], with_image: bool) -> bytes | None:
    """The tool's mask. ApiError where `action`, image and mask do not go together."""
    action, mask = tool.get("action") or "auto", tool.get("input_image_mask")
    allowed = ("auto", "edit") if with_image else ("auto", "generate")
    if action not in allowed:
        raise ApiError(
            400, f"action {action!r}: allowed are {' and '.join(allowed)} "
            f"{'with' if with_image else 'without'} an image", "invalid_value", "tools",
        )  # fmt: skip
    if mask is None:
        return None
    if not with_image:
        raise ApiError(400, "input_image_mask needs an image", "invalid_value", "tools")
    return _data(mask, "input_image_mask")


def _asked(given: str | list[dict[str, Any]]) -> tuple[str, bytes | None]:
    """Prompt and image of the last message. ApiError."""
    if isinstance(given, str):
        return given, None
    last = given[-1] if given else {}
    content = last.get("content")
    parts = [{"type": "input_text", "text": content}] if isinstance(content, str) else content
    if last.get("role") != "user" or not isinstance(parts, list):
        raise _wrong("its last item must be a message with the role user and its content")
    texts, images = [], []
    for part in parts:
        match part:
            case {"type": "input_text", "text": str(text)}:
                texts.append(text)
            case {"type": "input_image"}:
                images.append(_data(part, "input_image"))
            case _:
                raise _wrong("allowed are parts of the type input_text and input_image")
    if not texts or len(images) > 1:
        raise _wrong("the last message must hold a text, and one image at most")
    return "\n".join(texts), next(iter(images), None)


def _data(part: object, what: str) -> bytes:
    """The bytes of an image that is given as a data: URL."""
    match part:
        case {"image_url": str(address)} if address.startswith("data:"):
            try:
                return uploads.decode_base64(address, what)
            except UserError as error:
                raise _wrong(str(error)) from None
    raise _wrong(f"{what}: give image_url as a data: URL; nothing is fetched or kept here")


def _wrong(why: str) -> ApiError:
    return ApiError(400, f"input: {why}", "invalid_value", "input")
