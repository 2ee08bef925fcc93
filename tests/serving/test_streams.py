"""Answers that wait: what is left when their client is gone."""

import asyncio
import gc

import pytest
from starlette.requests import Request

from koala.generation import load
from koala.serving.api.a1111 import Work, _drawn
from koala.serving.api.streams import drawn
from koala.serving.errors import Refusal
from koala.serving.image_request import Order
from koala.serving.service import Service
from koala.serving.settings import Limits
from toy import toy_pipeline


async def gone() -> dict[str, str]:
    return {"type": "http.disconnect"}


def test_a_client_that_is_gone_leaves_no_picture_and_no_complaint(tmp_path):
    pipeline = load(toy_pipeline(tmp_path / "toy", architecture="koala"), "cpu")
    service, complaints = Service(pipeline, Limits(max_batch=2, steps=1000)), []
    service.start()
    order = Order("a", size="16x16", steps=900, guidance=1.0)

    async def ask() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, what: complaints.append(what))
        request = Request({"type": "http"}, gone)
        for wait in (drawn, lambda *given: _drawn(*given[:2], Work("a"), given[2])):
            drawing = service.submit(order)
            with pytest.raises(Refusal, match="gone"):
                await wait(request, service, drawing)
            assert drawing.done
            await asyncio.sleep(0)
            del drawing
        await asyncio.sleep(0.1)
        gc.collect()

    asyncio.run(ask())
    service.close()
    assert not complaints
