"""Responses that wait for images: what is left when their client is gone."""

import asyncio
import gc

import pytest
from starlette.requests import Request

from koala.generation import load
from koala.serving.api.streams import wait_for_images
from koala.serving.errors import ApiError
from koala.serving.image_request import ImageRequest
from koala.serving.service import Service
from koala.serving.settings import Limits
from toy import toy_pipeline


async def gone() -> dict[str, str]:
    return {"type": "http.disconnect"}


def test_a_client_that_is_gone_leaves_no_image_and_no_complaint(tmp_path):
    pipeline = load(toy_pipeline(tmp_path / "toy", architecture="koala"), "cpu")
    service, complaints = Service(pipeline, Limits(max_batch=2, steps=1000)), []
    service.start()
    order = ImageRequest("a", size="16x16", steps=900, guidance=1.0)

    async def ask() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, what: complaints.append(what))
        request = Request({"type": "http"}, gone)
        for return_exceptions in (False, True):
            submission = service.submit(order)
            with pytest.raises(ApiError, match="disconnected"):
                await wait_for_images(request, service, submission, return_exceptions)
            assert submission.done
            await asyncio.sleep(0)
            del submission
        await asyncio.sleep(0.1)
        gc.collect()

    asyncio.run(ask())
    service.close()
    assert not complaints
