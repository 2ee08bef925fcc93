"""OpenAI's responses API with its image tool, asked by OpenAI's own package."""

import base64
import io

import openai
import pytest
from PIL import Image

from koala.generation import load, read_settings
from koala.serving.settings import Limits
from toy import toy_pipeline
from toy_server import running

TOOL = {"type": "image_generation", "size": "64x64", "steps": 2, "seed": 3}
FOX = {"type": "input_text", "text": "a fox"}


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    pipeline = load(toy_pipeline(tmp_path_factory.mktemp("toy") / "toy"), "cpu")
    told = {"model_aliases": ("gpt-5", "gpt-image-1")}
    data, limits = tmp_path_factory.mktemp("data"), Limits(max_batch=4, rate=0)
    with running(pipeline, data, limits, **told) as server:
        yield openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def address(image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def message(*parts) -> list:
    return [{"role": "user", "content": list(parts)}]


def test_a_text_is_drawn_as_by_the_images_api(client):
    answer = client.responses.create(
        model="gpt-5", input="a fox", tools=[TOOL | {"model": "gpt-image-1", "n": 2}]
    )
    assert answer.status == "completed" and answer.output_text == ""
    asked = {"prompt": "a fox", "size": "64x64", "n": 2, "extra_body": {"steps": 2, "seed": 3}}
    images = client.images.generate(**asked).data
    assert [call.type for call in answer.output] == ["image_generation_call"] * 2
    for call, image in zip(answer.output, images, strict=True):
        drawn, plain = (
            Image.open(io.BytesIO(base64.b64decode(text))) for text in (call.result, image.b64_json)
        )
        assert drawn.tobytes() == plain.tobytes()
        assert (call.size, call.revised_prompt, call.action) == ("64x64", "a fox", "generate")
    assert read_settings(io.BytesIO(base64.b64decode(answer.output[1].result))).seed == 4
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens


def test_what_is_for_language_models_has_no_effect(client):
    spoken = {
        "include": [], "text": {"format": {"type": "text"}},
        "truncation": "auto", "service_tier": "auto", "prompt_cache_key": "k", "max_tool_calls": 2,
        "top_logprobs": 0,
    }  # fmt: skip
    plain, with_them = (
        client.responses.create(model="gpt-5", input="a fox", tools=[TOOL], **more)
        for more in ({}, spoken)
    )
    assert with_them.output[0].result == plain.output[0].result


def test_an_image_of_the_last_message_is_edited_within_its_mask(client):
    colour, half = Image.new("RGB", (64, 64), (9, 90, 200)), Image.new("RGBA", (64, 64))
    half.paste((0, 0, 0, 255), (0, 0, 32, 64))  # what is not transparent is kept
    image = {"type": "input_image", "image_url": address(colour)}
    mask = {"input_image_mask": {"image_url": address(half)}}
    told = {"model": "gpt-5", "tool_choice": {"type": "image_generation"}}
    talk = [*message({"type": "input_text", "text": "an owl"}), *message(FOX, image)]
    (call,) = client.responses.create(input=talk, tools=[TOOL], **told).output
    assert (call.action, call.revised_prompt) == ("edit", "a fox")
    (masked,) = client.responses.create(input=talk, tools=[TOOL | mask], **told).output
    kept = [
        Image.open(io.BytesIO(base64.b64decode(one.result))).crop((0, 0, 24, 64)).tobytes()
        for one in (call, masked)
    ]
    assert kept[0] != kept[1] == colour.crop((0, 0, 24, 64)).tobytes()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"stream": True}, "stream"),
        ({"background": True}, "background"),
        ({"instructions": "draw well"}, "unknown field 'instructions'"),
        ({"model": "gpt-9"}, "unknown model 'gpt-9'"),
        ({"tools": []}, "tools: this server has one"),
        ({"tools": [TOOL, {"type": "web_search"}]}, "tools: this server has one"),
        ({"tools": [TOOL | {"model": "other"}]}, "unknown model 'other'"),
        ({"tools": [TOOL | {"prompt": "x"}]}, "unknown field 'prompt'"),
        ({"tools": [TOOL | {"partial_images": 1}]}, "unknown field 'partial_images'"),
        ({"tools": [TOOL | {"colour": "red"}]}, "unknown field 'colour'"),
        ({"tools": [TOOL | {"steps": 0}]}, "steps"),
        ({"tools": [TOOL | {"action": "edit"}]}, "action 'edit': allowed are auto and generate"),
        ({"tools": [TOOL | {"input_image_mask": {"image_url": "data:"}}]}, "needs an image"),
        ({"previous_response_id": "resp_1"}, "responses are not kept here; send what is to be"),
        ({"conversation": {"id": "conv_1"}}, "conversation: responses are not kept here"),
        ({"tool_choice": "none"}, "tool_choice"),
        ({"tool_choice": {"type": "web_search"}}, "tool_choice: allowed are"),
        ({"input": []}, "input: its last item must be a message"),
        ({"input": [{"role": "assistant", "content": "a fox"}]}, "the role user"),
        ({"input": message()}, "must hold a text"),
        ({"input": message(FOX, {"type": "input_file"})}, "allowed are parts of the type"),
        (
            {"input": message(FOX, {"type": "input_image", "image_url": "http://127.0.0.1/a"})},
            "give image_url as a data: URL; nothing is fetched",
        ),
        (
            {"input": message(FOX, {"type": "input_image", "image_url": "data:;base64,é"})},
            "not valid base64",
        ),
    ],
)  # fmt: skip
def test_what_it_cannot_do_is_refused_by_name(client, change, words):
    asked = {"input": "a fox", "tools": [TOOL], **change}
    with pytest.raises(openai.APIStatusError) as refused:
        client.post("/responses", cast_to=object, body=asked)
    assert refused.value.status_code in (400, 404) and words in refused.value.body["message"]
